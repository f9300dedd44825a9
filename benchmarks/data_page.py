"""The measured part of docs/data.md, from `results/streaming.json`."""

from __future__ import annotations

from wording import paragraph, read


def streaming() -> str:
    """What stays in memory with and without streaming, and the time of both."""
    found = read("streaming")
    whole, streamed = found["arms"]["memory"], found["arms"]["streaming"]
    return paragraph(
        f"Measured by `benchmarks/streaming.py` on {found['rows']:,} rows ({found['file_bytes'] / 2**20:.0f} MiB of "
        f"jsonl): {streamed['anonymous_bytes'] / 2**20:.0f} MiB stay in memory against "
        f"{whole['anonymous_bytes'] / 2**20:.0f} MiB without streaming, in {streamed['seconds']:.1f} s against "
        f"{whole['seconds']:.1f} s."
    )
