"""The measured parts of docs/serving.md, from `load.json`, `serving.json` and `routers-*.json` of `results/`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from wording import interval, measured_on, paragraph, read, table

SHAPE = "tiny-base"
ARMS = {
    "base": "base",
    "one LoRA": "one LoRA (PEFT)",
    "one expert": "one expert (stacked)",
    "mixed": "**4 experts in one batch (stacked)**",
    "PEFT mixed": "PEFT mixed batch (`adapter_names`)",
    "switching": "PEFT, one adapter after another",
    "ensemble": "ensemble of 5 (5 passes a token)",
}


def load() -> str:
    """Clients, what became of their requests, times, memory, queue."""
    found = read("load")
    requests, answer, first = found["requests"], found["seconds_per_answer"], found["seconds_to_first_token"]
    bad = sum(n for kind, n in requests.items() if kind not in ("answer", "cancel"))
    faults = ", ".join(f"{n} x {error}" for error, n in Counter(found["errors"]).items())
    thirds = ", ".join(f"{mb:.0f}" for mb in found["memory_mb_by_third"])
    return paragraph(
        f"**Load** (`benchmarks/results/load.json`): {found['clients']} clients for {found['seconds']:.0f} s on the "
        f"demo's run, all at once: {requests['answer']:,} streams read to their end, {requests['cancel']:,} from which "
        f"the client goes away, and {bad:,} requests with bad keys, oversize or malformed bodies, or unknown models. "
        "Every answer is compared with the expert's own. A wrong expert, a lost or mixed-up answer, an unexpected "
        "status: "
        f"{found['n_errors'] or 'none'}{f' ({faults})' if faults else ''}. {queue(found)}"
        f"{found['tokens_per_second']:,.0f} tokens/s; an answer took {answer['median']:.2f} s (median), "
        f"{answer['p99']:.2f} s (p99), its first token {first['median']:.2f} s and {first['p99']:.2f} s. Memory by "
        f"thirds of the time: {thirds} MB. {measured_on(found['machine'])}"
    )


def queue(found: dict[str, Any]) -> str:
    """How the bounded queue did its work."""
    return (
        f"The server was allowed {found['max_requests']} requests at a time: at most {found['running_max']:.0f} were "
        f"accepted at once, at most {found['waiting_max']:.0f} of them waited for the engine, and "
        f"{found['refused_429']:,} refused with a 429, to be asked again (a cancelled row counts until it has "
        "stopped). "
    )


def speed() -> str:
    """Tokens a second of every arm, the ratios that matter, the ensemble's gradient, routing."""
    found = read("serving")
    shape, routing = found["shapes"][SHAPE], found["routing_milliseconds"]
    sizes = list(shape["batches"])
    rows = [
        [label, *(f"{shape['batches'][size]['tokens_per_second'][arm]:,.0f}" for size in sizes)]
        for arm, label in ARMS.items()
    ]
    eight, one = shape["batches"]["8"], shape["batches"]["1"]
    half, full = (routing[name]["128 word pieces"] for name in ("auto (bfloat16)", "float32 (float32)"))
    return "\n\n".join(
        [
            paragraph(
                "**Speed** (`benchmarks/results/serving.json`, the shape of the real mix's base, "
                f"{shape['shape']['new_tokens']} new tokens, medians of interleaved rounds). "
                f"{measured_on(found['machine'])}"
            ),
            table(["tokens/s at concurrency", *sizes], rows),
            paragraph(
                f"At 8 rows over {found['experts']} experts: {eight['mixed_over_one_lora']:.2f}x one LoRA in PEFT, "
                f"{eight['mixed_over_one_expert']:.2f}x one expert alone on the stacked layers, "
                f"{eight['mixed_over_peft_mixed']:.2f}x PEFT's mixed batch. The ensemble also needs the gradient of "
                f"each prompt, {one['ensemble_gradient_milliseconds']:.0f} ms for one and "
                f"{eight['ensemble_gradient_milliseconds']:.0f} ms for eight, before its first token. Routing a prompt "
                f"of 128 word pieces takes {half['median']:.1f} ms (median) and {half['p99']:.1f} ms (p99) in "
                f"bfloat16, {full['median']:.1f} and {full['p99']:.1f} ms in float32; it is "
                f"{100 * shape['routing_share_of_a_64_token_answer']:.0f} % of one 64-token answer."
            ),
        ]
    )


def routers() -> str:
    """Every router's agreement, loss and regret on `dev_b` of two runs, and the calibration of the one in use."""
    parts = []
    for name, label in (("routers-demo", "The demo"), ("routers-real-mix", "The real mix")):
        found = read(name)
        rows = [
            [router, f"{100 * row['accuracy']:.0f} %", f"{row['loss']:.4f}", interval(row["regret"]),
             interval(row["minus_logistic"])]
            for router, row in found["routers"].items()
        ]  # fmt: skip
        head = ["router", "right", "loss", "regret", "minus the first"]
        parts += [
            f"**{label}** (`benchmarks/results/{name}.json`; {found['n']} prompts of `dev_b` of {found['run']}; "
            "95 % intervals).",
            table(head, rows),
            paragraph(
                "Calibration of each run's router in ten bins of equal size (on `dev_b`: of one that learnt it from "
                "`dev_a` alone), beside the range of a perfectly calibrated router of as many prompts, that of one "
                "whose probabilities are true but for a calibration learnt from as many prompts, and what "
                "temperatures without noise give:"
            ),
            table(CALIBRATION, [_calibrated(row) for row in found["calibration"]]),
            paragraph(
                "Mean -log p of one half of `dev` calibrated on the other, by the spread of the temperatures' prior: "
                + _by_option(found["likelihood_by_spread"])
                + "; of the noise's: "
                + _by_option(found["likelihood_by_noise_spread"]).replace("at None", "without")
                + "."
            ),
        ]
    return "\n\n".join(parts)


CALIBRATION = [
    "run", "prompts", "right", "mean confidence", "-log p", "calibration error", "a perfect router's", "within",
    "learnt", "within", "without noise: -log p", "calibration error",
]  # fmt: skip


def _by_option(likelihoods: dict[str, float]) -> str:
    return ", ".join(f"{value:.3f} at {option}" for option, value in likelihoods.items())


def _calibrated(row: dict[str, Any]) -> list[str]:
    error, low, high = (row[name] for name in ("calibration_error", "perfect_low", "perfect_high"))
    plain, learnt = row["temperatures"], row["learnt"]
    split, _, how = row["split"].partition(", ")
    return [
        row["run"], f"{row['n']} of `{split}`{f', {how}' if how else ''}", f"{100 * row['accuracy']:.1f} %",
        f"{100 * row['confidence']:.1f} %", f"{row['negative_log_likelihood']:.3f}", f"{error:.3f}",
        f"{low:.3f} to {high:.3f}", "yes" if low <= error <= high else "no",
        f"{learnt['low']:.3f} to {learnt['high']:.3f}", "yes" if learnt["low"] <= error <= learnt["high"] else "no",
        f"{plain['negative_log_likelihood']:.3f}", f"{plain['calibration_error']:.3f}",
    ]  # fmt: skip
