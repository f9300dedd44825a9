"""The measured part of docs/distributed.md, from `results/distributed.json`."""

from __future__ import annotations

from wording import measured_on, paragraph, read, table


def processes() -> str:
    """Agreement of every number of processes with one, gradients and clusters, and of two seeds beside it."""
    found = read("distributed")
    rows = [
        [
            "every batch" if arm["sync_every"] == 0 else f"{arm['sync_every']} samples",
            str(arm["processes"]),
            f"{arm['ari_to_first']:.3f}",
            "yes" if arm["equal_bytes_to_first"] else "no",
            f"{arm['largest_relative_gradient_error']:.1g}",
            f"{arm['seconds']:.0f}",
        ]
        for arm in found["arms"]
    ]
    head = [
        "centroids move after",
        "processes",
        "adjusted Rand to one process",
        "same bytes",
        "gradient error",
        "seconds",
    ]
    said = (
        f"{found['clustered_rows']:,} rows of the real mix, D = {found['dimension']:,}, K = {found['n_clusters']}, "
        "plain clusters (`benchmarks/results/distributed.json`). The error is the largest of |g - g'| / |g'| between "
        "what rank 0 is sent and what it computes itself. Two seeds agree with an adjusted Rand index of "
        f"{found['seed_to_seed_ari']:.3f}. One thread a process, with other work on the machine: seconds only say what "
        f"exchange costs. {measured_on(found['machine'])}"
    )
    return f"{table(head, rows)}\n\n{paragraph(said)}"
