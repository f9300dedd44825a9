"use strict";
// The page works without this script; with it tables sort and the gradient map answers.
document.documentElement.classList.add("js");

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const key = (row) => row.cells[column].textContent.trim();
      const number = (text) => parseFloat(text.replace(/[,\s]/g, ""));
      const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(number(key(row))));
      const order = (a, b) => (numeric ? (number(a) || 0) - (number(b) || 0) : a.localeCompare(b));
      rows.sort((a, b) => (down ? -1 : 1) * order(key(a), key(b)));
      table.tBodies[0].append(...rows);
    });
  });
}
document.querySelectorAll("table.sortable").forEach(sortable);

// On paper every example is open; afterwards those that were closed close again.
const closed = [];
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; closed.push(d); }));
addEventListener("afterprint", () => { closed.forEach((d) => { d.open = false; }); closed.length = 0; });

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

function ramp(t) {
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const at = Math.min(3, Math.floor(t * 4)), part = t * 4 - at;
  return `rgb(${stops[at].map((low, i) => Math.round(low + part * (stops[at + 1][i] - low))).join()})`;
}

function gradientMap(root, data) {
  const [canvas, tip, key, said] = ["canvas", ".tip", ".key", ".said"].map((s) => root.querySelector(s));
  const pen = canvas.getContext("2d");
  const xs = unpack(data.x), ys = unpack(data.y), n = xs.length;
  const values = { cluster: unpack(data.cluster) };
  if (data.source) values.source = unpack(data.source);
  if (data.loss) values.loss = unpack(data.loss);
  const names = { cluster: data.clusters, source: data.sources };
  const colours = { cluster: data.colours, source: data.sourceColours };
  let by = "cluster", only = null, current = -1, width = 0, height = 0;

  const colour = (i) => (by === "loss" ? ramp(values.loss[i] / 65535) : colours[by][values[by][i]]);
  const hidden = (i) => only !== null && values[by][i] !== only;
  const place = (i) => [14 + (xs[i] / 65535) * (width - 28), height - 14 - (ys[i] / 65535) * (height - 28)];

  function paint() {
    const box = canvas.getBoundingClientRect(), scale = devicePixelRatio || 1;
    [width, height] = [box.width, box.height];
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    const radius = width < 500 ? 2 : 2.8;
    for (const faint of [true, false]) {
      for (let i = 0; i < n; i++) {
        if (hidden(i) !== faint) continue;
        const [x, y] = place(i);
        pen.globalAlpha = faint ? 0.06 : 0.7;
        pen.fillStyle = colour(i);
        pen.beginPath();
        pen.arc(x, y, radius, 0, 7);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    if (current >= 0) {
      const [x, y] = place(current);
      pen.strokeStyle = getComputedStyle(root).color;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, y, 6, 0, 7);
      pen.stroke();
    }
    canvas.dataset.drawn = by;
  }

  function describe(i) {
    const parts = [`cluster ${names.cluster[values.cluster[i]]}`];
    if (values.source) parts.push(names.source[values.source[i]]);
    if (values.loss) {
      const [low, high] = data.lossEnds;
      parts.push(`loss ${(low + (values.loss[i] / 65535) * (high - low)).toFixed(2)}`);
    }
    return parts.join(", ");
  }

  function show(i, speak) {
    current = i;
    tip.hidden = i < 0;
    if (i >= 0) {
      tip.replaceChildren();
      const add = (tag, text, kind) => {
        const element = document.createElement(tag);
        element.textContent = text;
        if (kind) element.className = kind;
        tip.append(element);
      };
      add("b", describe(i));
      if (data.prompts) {
        add("span", data.prompts[i]);
        add("span", data.responses[i], "answer");
      }
      const [x, y] = place(i);
      tip.style.left = `${Math.max(0, Math.min(x + 12, width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${y + 14 + tip.offsetHeight > height ? Math.max(0, y - tip.offsetHeight - 12) : y + 14}px`;
      if (speak) said.textContent = tip.innerText;
    }
    paint();
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = -1, distance = 24 * 24;
    for (let i = 0; i < n; i++) {
      if (hidden(i)) continue;
      const [px, py] = place(i);
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < distance) [best, distance] = [i, d];
    }
    return best;
  }

  function drawKey() {
    key.replaceChildren();
    if (by === "loss") {
      const item = document.createElement("li"), bar = document.createElement("div"), ends = document.createElement("div");
      bar.className = "ramp";
      bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(ramp).join()})`;
      ends.className = "ramp-ends";
      data.lossEnds.forEach((end) => ends.append(Object.assign(document.createElement("span"), { textContent: `${end.toFixed(2)} nats` })));
      item.append(bar, ends);
      key.append(item);
      return;
    }
    names[by].forEach((name, j) => {
      const item = document.createElement("li"), button = document.createElement("button"), dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = colours[by][j];
      button.type = "button";
      button.setAttribute("aria-pressed", only === j);
      button.append(dot, name);
      button.addEventListener("click", () => {
        only = only === j ? null : j;
        [...key.querySelectorAll("button")].forEach((other, k) => other.setAttribute("aria-pressed", only === k));
        show(-1);
      });
      item.append(button);
      key.append(item);
    });
  }

  root.querySelectorAll("input").forEach((input) => input.addEventListener("change", () => {
    [by, only] = [input.value, null];
    drawKey();
    show(-1);
  }));
  canvas.addEventListener("pointermove", (event) => { const i = nearest(event); if (i !== current) show(i); });
  canvas.addEventListener("pointerdown", (event) => show(nearest(event)));
  canvas.addEventListener("pointerleave", () => show(-1));
  canvas.addEventListener("blur", () => show(-1));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return show(-1);
    if (!step) return undefined;
    event.preventDefault();
    let i = current;
    for (let tries = 0; tries < n; tries++) {
      i = (i + step + n) % n;
      if (!hidden(i)) break;
    }
    return show(i, true);
  });
  new ResizeObserver(paint).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  drawKey();
}

const packed = document.getElementById("map-data");
if (packed) gradientMap(document.querySelector(".map"), JSON.parse(packed.textContent));
