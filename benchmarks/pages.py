"""Fill the measured parts of README and docs from the committed results files, so that no number is typed by hand.

    python benchmarks/pages.py            # write them
    python benchmarks/pages.py --check    # say which pages differ, write nothing

A page marks a part with `<!-- measured NAME: written by benchmarks/pages.py -->` and `<!-- end of NAME -->`; `PARTS`
says what makes it. `docs/negative-results.md` is history and stays as it was written; what it quotes from a results
file that is still there is compared with that file (`quotes.py`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import alignment_page
import clustering_page
import data_page
import diagnosis_page
import distributed_page
import faults_page
import gradients_page
import paper_page
import quotes
import readme_page
import results_page
import security_page
import serving_page
import training_page

from gradientspace.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ROOT / "docs/negative-results.md"
PARTS: dict[str, Callable[[], str]] = {
    "demo": readme_page.part,
    "real mix": readme_page.real_mix,
    "results": results_page.part,
    "cost of an answer": paper_page.cost,
    "theory": paper_page.theory,
    "quadratics": paper_page.quadratics,
    "theory on the real mix": partial(paper_page.theory, "theory-real-mix"),
    "similarity": paper_page.similarity,
    "ablations": paper_page.ablations,
    "gradients": gradients_page.part,
    "clustering": clustering_page.part,
    "alignment": alignment_page.alignments,
    "ranking": alignment_page.ranking,
    "load": serving_page.load,
    "serving": serving_page.speed,
    "routers": serving_page.routers,
    "diagnosis": diagnosis_page.verdicts,
    "suspicious rows": diagnosis_page.suspicious,
    "processes": distributed_page.processes,
    "dry run": training_page.dry_run,
    "step": training_page.step,
    "parts": training_page.parts,
    "long process": training_page.long_process,
    "streaming": data_page.streaming,
    "fuzz": security_page.fuzz,
}
MARKED = re.compile(
    r"(?P<start><!-- measured (?P<name>[^:]+): written by benchmarks/pages\.py -->\n)"
    r".*?(?P<end><!-- end of (?P=name) -->)",
    flags=re.DOTALL,
)


WRITTEN_ELSEWHERE = re.compile(f"{re.escape(faults_page.START)}.*?{re.escape(faults_page.END)}", re.DOTALL)
"""A test of its own compares it with its results."""


def filled(text: str) -> str:
    """A page with every marked part made anew."""
    return MARKED.sub(lambda found: f"{found['start']}\n{PARTS[found['name']]()}\n\n{found['end']}", text)


def typed(text: str) -> str:
    """What is left of a page without its marked parts: what somebody typed."""
    return WRITTEN_ELSEWHERE.sub("", MARKED.sub("", text))


def gone() -> list[str]:
    """Quotations that the history no longer has, or has with other numbers than the results files."""
    page = " ".join(HISTORY.read_text(encoding="utf-8").split())
    return [quote for quote in quotes.sentences() if quote not in page]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    options = parser.parse_args()
    differing = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in differing:
        print(f"{page.relative_to(ROOT)} {'differs' if options.check else 'written'}")
        if not options.check:
            write_text(page, filled(page.read_text(encoding="utf-8")))
    if not options.check:
        clustering_page.draw()
    lost = gone()
    for quote in lost:
        print(f"{HISTORY.relative_to(ROOT)} does not say, so look at its entry again: {quote}")
    # A table made anew has other numbers than the history quotes: that is no error of the command that made it.
    return 1 if options.check and (lost or differing) else 0


if __name__ == "__main__":
    sys.exit(main())
