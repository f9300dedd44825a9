// Opens a page from disk in a headless Chromium with the network off and prints what it saw as one JSON object.
//   node open.mjs PAGE            checks; --screenshots PREFIX also writes PREFIX-{desktop,phone}-{light,dark}.png
//                                 and PREFIX-print.{png,pdf}
// $CHROMIUM names another browser than the bundled one.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [, , page, option, prefix] = process.argv;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SCREENS = { desktop: [1200, 900], phone: [390, 844] };

const browser = await puppeteer.launch({
  args: [...chromium.args, "--force-color-profile=srgb"],
  executablePath: process.env.CHROMIUM ?? (await chromium.executablePath()),
  headless: "shell",
});

async function open(screen, scheme, seen) {
  const tab = await browser.newPage();
  tab.on("console", (message) => seen.messages.push(message.text()));
  tab.on("pageerror", (error) => seen.messages.push(error.message));
  tab.on("request", (request) => { if (!request.url().startsWith("data:")) seen.requests.push(request.url()); });
  await tab.setOfflineMode(true);
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const [width, height] = SCREENS[screen];
  await tab.setViewport({ width, height });
  const start = Date.now();
  await tab.goto(`file://${page}`, { waitUntil: "load" });
  await tab.waitForFunction(() => !document.querySelector("canvas") || document.querySelector("canvas").dataset.drawn);
  seen.milliseconds.push(Date.now() - start);
  return tab;
}

async function figures(tab) {
  return tab.$$eval("figure svg", (all) => all.map((svg) => {
    const box = svg.getBoundingClientRect();
    const hidden = svg.closest(".map-still") !== null;
    return { name: svg.closest("figure").dataset.figure, shapes: svg.querySelectorAll("path, text, use, image").length,
      large: hidden || (box.width > 200 && box.height > 60) };
  }));
}

const pixels = (tab) => tab.$eval("canvas", (canvas) => {
  // A copy is read, so that the page's own canvas is not turned into a slow one (and Chromium does not say so).
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const { data } = pen.getImageData(0, 0, copy.width, copy.height);
  let painted = 0, sum = 0;
  for (let i = 0; i < data.length; i += 4) { if (data[i + 3]) painted += 1; sum += data[i] + 3 * data[i + 1] + 7 * data[i + 2]; }
  return { painted, sum };
});

async function controls(tab) {
  if (!(await tab.$("canvas"))) return null;
  await tab.$eval("canvas", (canvas) => canvas.scrollIntoView({ block: "center", behavior: "instant" }));
  const before = await pixels(tab);
  const box = await (await tab.$("canvas")).boundingBox();
  const shown = () => tab.$eval(".tip", (tip) => (tip.hidden ? "" : tip.innerText));
  let hovered = "";
  for (let y = 0.1; y < 1 && !hovered; y += 0.05) {
    for (let x = 0.1; x < 1 && !hovered; x += 0.05) {
      await tab.mouse.move(box.x + x * box.width, box.y + y * box.height);
      hovered = await shown();
    }
  }
  await tab.mouse.move(0, 0);
  await tab.focus("canvas");
  await tab.keyboard.press("ArrowRight");
  const keyed = await tab.$eval(".said", (said) => said.textContent);
  await tab.keyboard.press("Escape");
  await tab.click('input[value="loss"]');
  const drawn = await tab.$eval("canvas", (canvas) => canvas.dataset.drawn);
  const recoloured = (await pixels(tab)).sum !== before.sum;
  await tab.click('input[value="cluster"]');
  await tab.click(".key button");
  const alone = (await pixels(tab)).sum !== before.sum;
  await tab.click(".key button");
  return { painted: before.painted, hovered, keyed, drawn, recoloured, alone };
}

async function sorting(tab) {
  const column = () => tab.$$eval("table.sortable:first-of-type tbody", (bodies) =>
    [...bodies[0].rows].map((row) => row.cells[1].textContent));
  const button = await tab.$("table.sortable th:nth-child(2) button");
  if (!button) return null;
  await button.click();
  const up = await column();
  await button.click();
  return { up, down: await column() };
}

// What a printer gets, from a page that prefers dark: A4 less its margins is 688 px wide.
async function paper(tab, file) {
  await tab.emulateMediaType("print");
  await tab.setViewport({ width: 688, height: 980 });
  const page = await tab.evaluate(() => {
    const height = (element) => element.getBoundingClientRect().height;
    const shown = (selector) => [...document.querySelectorAll(selector)].some((element) => height(element) > 0);
    return {
      overflow: Math.max(document.documentElement.scrollWidth - innerWidth,
        ...[...document.querySelectorAll(".scroll table")].map((table) => Math.ceil(table.getBoundingClientRect().right - innerWidth))),
      background: getComputedStyle(document.body).backgroundColor,
      folded: [...document.querySelectorAll("details > :not(summary)")].filter((element) => height(element) === 0).length,
      undrawn: [...document.querySelectorAll("figure svg")].filter((svg) => height(svg) < 60).map((svg) => svg.closest("figure").id),
      screenOnly: shown("nav, canvas, .tip, .map fieldset"),
    };
  });
  if (file) await tab.screenshot({ path: `${file}-print.png`, fullPage: true });
  const closed = () => tab.$$eval("details:not([open])", (all) => all.length);
  const before = await closed();
  const pdf = await tab.pdf({ format: "A4", preferCSSPageSize: true, path: file ? `${file}-print.pdf` : undefined });
  const pages = Buffer.from(pdf).toString("latin1").match(/\/Type \/Page\b(?!s)/g)?.length ?? 0;
  return { ...page, pages, foldedAgain: (await closed()) === before };
}

async function faults(tab) {
  await tab.evaluate(axe);
  const { violations } = await tab.evaluate(() => globalThis.axe.run());
  return violations.map(({ id, impact, nodes }) => ({ id, impact, html: nodes[0].html.slice(0, 200) }));
}

const seen = { messages: [], requests: [], milliseconds: [], faults: [], overflow: {}, background: {} };
for (const screen of Object.keys(SCREENS)) {
  for (const scheme of ["light", "dark"]) {
    const tab = await open(screen, scheme, seen);
    seen.overflow[screen] = await tab.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    seen.background[scheme] = await tab.evaluate(() => getComputedStyle(document.body).backgroundColor);
    if (option === "--screenshots") await tab.screenshot({ path: `${prefix}-${screen}-${scheme}.png`, fullPage: true });
    seen.faults.push(...(await faults(tab)));
    if (screen === "desktop" && scheme === "light") {
      seen.figures = await figures(tab);
      seen.controls = await controls(tab);
      seen.sorting = await sorting(tab);
      seen.hacked = await tab.evaluate(() => typeof globalThis.hacked !== "undefined");
    }
    if (screen === "desktop" && scheme === "dark") seen.paper = await paper(tab, option === "--screenshots" && prefix);
    await tab.close();
  }
}
await browser.close();
console.log(JSON.stringify(seen));
