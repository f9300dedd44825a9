"""Every row of every file: kept, or lost for one named reason.

`Dataset.accounting` and `data/accounting.json` hold

    {"schema": 1, "template": {...}, "files": [FILE, ...], "totals": {"train": COUNTS, ...},
     "splits": {"fit": n, ...}, "tokens": {SPLIT: {...}}, "near_duplicates": {...}, "leaks": {...},
     "dev_leaks": {...}, "renamed_ids": n, "skipped_files": [...], "warnings": [...]}

with FILE = {"split", "source", "file", "mapping", "rows", "kept", "lost", "truncated"}, where `lost` maps a
reason to {"count", "rows"} whose `rows` are ranges [first, last] of row numbers. In every file and in the
totals rows = kept + the sum of the losses; truncated rows are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradientspace.data.sample import IGNORE_INDEX, Sample
from gradientspace.data.shapes import Mapping
from gradientspace.errors import DataError
from gradientspace.plain_text import visible

LIMIT = "limit"
WEIGHT = "weight"
EMPTY = "empty"
DUPLICATE = "duplicate"
TOO_LONG = "too_long"
NO_SUPERVISED_TOKENS = "no_supervised_tokens"

REASONS = {
    LIMIT: "beyond the source's limit",
    WEIGHT: "left out by the source's weight",
    EMPTY: "blank prompt or blank completion",
    DUPLICATE: "exact copy of a kept row",
    TOO_LONG: "more tokens than data.max_length",
    NO_SUPERVISED_TOKENS: "no completion token within data.max_length",
}
_ASKED_FOR = (LIMIT, WEIGHT)
_SHOWN_RANGES = 4
OPEN, CLOSE = "⟦", "⟧"


@dataclass
class FileAccount:
    """The account of one file while it is read."""

    split: str
    source: str
    file: str
    mapping: Mapping | None = None
    rows: int = 0
    lost: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)

    def lose(self, reason: str, row: int) -> None:
        self.lost.setdefault(reason, []).append(row)

    def to_dict(self) -> dict[str, Any]:
        lost = {reason: _counted(self.lost[reason]) for reason in REASONS if reason in self.lost}
        mapping = self.mapping and {"shape": self.mapping.shape, "columns": dict(self.mapping.columns)}
        return {
            "split": self.split,
            "source": self.source,
            "file": self.file,
            "mapping": mapping,
            "rows": self.rows,
            "kept": self.rows - sum(entry["count"] for entry in lost.values()),
            "lost": lost,
            "truncated": _counted(self.truncated),
        }


def totals(files: list[FileAccount]) -> dict[str, Any]:
    """Counts over files: rows, kept, lost by reason, truncated."""
    lost = Counter(dict.fromkeys(REASONS, 0))
    for file in files:
        lost.update({reason: len(rows) for reason, rows in file.lost.items()})
    rows = sum(file.rows for file in files)
    return {
        "rows": rows,
        "kept": rows - lost.total(),
        "lost": {reason: count for reason, count in lost.items() if count},
        "truncated": sum(len(file.truncated) for file in files),
    }


def check_losses(split: str, counts: dict[str, Any], max_loss_fraction: float, max_length: int) -> None:
    """Raise `DataError` where too much is lost. Rows left out by limit or weight count as not offered."""
    wanted = counts["rows"] - sum(counts["lost"].get(reason, 0) for reason in _ASKED_FOR)
    lost = wanted - counts["kept"]
    if counts["kept"] and lost <= max_loss_fraction * wanted:
        return
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["lost"].items() if reason not in _ASKED_FOR)
    too_long = counts["lost"].keys() & {TOO_LONG, NO_SUPERVISED_TOKENS}
    fix = f"raise data.max_length ({max_length})" if too_long else "mend the files"
    if not counts["kept"]:
        raise DataError(f"no usable {split} row is left of {counts['rows']} ({reasons or 'all left out'}): {fix}")
    raise DataError(
        f"{lost} of {wanted} {split} rows are lost ({reasons}), more than "
        f"data.max_loss_fraction ({max_loss_fraction:g}): {fix}, or allow more to be lost"
    )


def token_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many tokens a split holds, how many carry loss, and the longest sample."""
    tokens = supervised = longest = 0
    for sample in samples:
        tokens += len(sample.input_ids)
        supervised += len(sample.labels) - sample.labels.count(IGNORE_INDEX)
        longest = max(longest, len(sample.input_ids))
    return {"tokens": tokens, "supervised": supervised, "longest": longest}


def accounting_table(accounting: dict[str, Any]) -> str:
    """The accounting as text: one line a file, then losses with their rows, splits and warnings.

    File and column names are data, and may hold what a terminal would obey: such characters are spelt out.
    """
    lines = [f"{'file':<40} {'split':<6} {'rows':>8} {'kept':>8} {'lost':>8} {'truncated':>9}"]
    for file in accounting["files"]:
        lines.append(_count_line(_end(file["file"], 40), file["split"], file))
    for split, counts in accounting["totals"].items():
        lines.append(_count_line("total", split, counts))
    for file in accounting["files"]:
        if file["mapping"]:
            columns = ", ".join(f"{ours} <- {column}" for ours, column in file["mapping"]["columns"].items())
            lines.append(f"{file['file']}: read as {file['mapping']['shape']} ({columns})")
        for reason, entry in file["lost"].items():
            lines.append(f"  {entry['count']} {reason} ({REASONS[reason]}): rows {_ranges_text(entry['rows'])}")
        if file["truncated"]["count"]:
            entry = file["truncated"]
            lines.append(f"  {entry['count']} truncated (kept): rows {_ranges_text(entry['rows'])}")
    lines.append("splits: " + ", ".join(f"{name} {n}" for name, n in accounting["splits"].items()))
    lines += [f"warning: {warning}" for warning in accounting["warnings"]]
    return "\n".join(visible(line.replace("\n", " ")) for line in lines)


def render_sample(sample: Sample, tokenizer: Any) -> str:
    """The sample as its tokens decode, special tokens included, with every supervised span in ⟦ ⟧."""
    spans: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        supervised = label != IGNORE_INDEX
        if not spans or spans[-1][0] != supervised:
            spans.append((supervised, []))
        spans[-1][1].append(token)
    texts = ((s, tokenizer.decode(ids, skip_special_tokens=False)) for s, ids in spans)
    return visible("".join(f"{OPEN}{text}{CLOSE}" if supervised else text for supervised, text in texts))


def _count_line(name: str, split: str, counts: dict[str, Any]) -> str:
    lost = counts["rows"] - counts["kept"]
    truncated = counts["truncated"]["count"] if isinstance(counts["truncated"], dict) else counts["truncated"]
    return f"{name:<40} {split:<6} {counts['rows']:>8} {counts['kept']:>8} {lost:>8} {truncated:>9}"


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[-(width - 3) :]


def _counted(rows: list[int]) -> dict[str, Any]:
    ranges: list[list[int]] = []
    for row in sorted(rows):
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    return {"count": len(rows), "rows": ranges}


def _ranges_text(ranges: list[list[int]]) -> str:
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:_SHOWN_RANGES]]
    more = len(ranges) - _SHOWN_RANGES
    return ", ".join(texts) + (f" and {more} more ranges" if more > 0 else "")
