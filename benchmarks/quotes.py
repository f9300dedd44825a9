"""What docs/negative-results.md quotes from results files that are still there, with the numbers those files hold.

The page is history: where a results file is made anew and a sentence no longer holds, the entry is looked at again and
this list with it, never rewritten by a script.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from paper_page import minus_single
from wording import interval, read

CELLS = ("real noise, K 4, cosine 0.02", "noise decay 0.4, cosine 0.05", "imbalance 20")


def sentences() -> list[str]:
    """Pieces of the page, white space aside."""
    return [*diagnosis(), *routers(), *clusterer(), *main_table(), *headline(), *ablations(), *real_mix(), *demo()]


def diagnosis() -> list[str]:
    arms = read("diagnosis")["arms"]
    real, demo = arms["real-mix-shuffled"], arms["shuffled"]
    return [
        f"as many rows as were wrong {real['as_many_by_combined']['precision']:.2f} by gradient conflict and loss "
        f"together against a chance of {real['chance']:.3f}, where the demo has "
        f"{demo['as_many_by_combined']['precision']:.2f}."
    ]


def routers() -> list[str]:
    """Losses of other routers on the demo and the real mix, and the calibration of the one in use."""
    found = read("routers-demo")
    minus = {name: router["minus_logistic"] for name, router in found["routers"].items()}
    mix = read("routers-real-mix")
    real = mix["routers"]
    own = real["logistic, own gradient"]
    neighbours = minus["k nearest neighbours, cluster"]
    return [
        f"k nearest neighbours {neighbours['mean']:+.3f} (95 % interval {neighbours['low']:+.3f} to "
        f"{neighbours['high']:+.3f})",
        f"a head trained on the best expert of each `dev_a` prompt "
        f"{interval(minus['logistic, best expert on dev_a'], '{:+.3f}')}",
        f"a soft mix {interval(minus['logistic, soft mix on dev_a'], '{:+.3f}')}",
        f"a ridge onto the experts' losses {interval(minus['ridge, losses on dev_a'], '{:+.3f}')}",
        f"{interval(own['minus_logistic'])} nats, though it names that cluster for {100 * own['accuracy']:.0f} % of "
        f"the prompts against {100 * real['logistic, cluster']['accuracy']:.0f} %",
        *_half_of_dev(),
        *_calibration(mix, "The real mix"),
        *_calibration(found, "The demo"),
    ]


def _within(row: dict[str, Any], of: dict[str, Any] | None = None) -> bool:
    """Whether the calibration error of `row` lies in a perfect router's range, or in another one."""
    low, high = (row["perfect_low"], row["perfect_high"]) if of is None else (of["low"], of["high"])
    return low <= row["calibration_error"] <= high


def _rows(found: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [row for row in found["calibration"] if row["split"] == split]


def _half_of_dev() -> list[str]:
    """The first attempt: temperatures from `dev_a` alone, the demo's dev rows in wordings of their own."""
    mix, demo = (_rows(read(f"routers-{name}-half-of-dev"), "test") for name in ("real-mix", "demo"))
    epyc = _rows(read("routers-demo-epyc-half-of-dev"), "test")[0]
    as_perfect = [100 * fmean(row["learnt"]["as_perfect"] for row in rows) for rows in (mix, demo)]
    return [
        f"{sum(map(_within, mix))} of {len(mix)} seeds of the real mix within the range",
        f"{sum(map(_within, demo))} of {len(demo)} of the demo",
        f"{epyc['calibration_error']:.3f} where {epyc['perfect_low']:.3f} to {epyc['perfect_high']:.3f} is the range; "
        f"right {100 * epyc['accuracy']:.1f} %, confidence {100 * epyc['confidence']:.1f} %",
        f"{as_perfect[0]:.0f} % of the draws on the real mix and {as_perfect[1]:.0f} % on the demo",
    ]


def _calibration(found: dict[str, Any], label: str) -> list[str]:
    """How many seeds lie within a perfect router's range, and the likelihoods, with and without noise."""
    quotes = []
    for split in ("dev_b", "test"):
        rows = _rows(found, split)
        plain = [row["temperatures"] for row in rows]
        likelihoods = [fmean(way["negative_log_likelihood"] for way in ways) for ways in (rows, plain)]
        quotes.append(
            f"{label}, `{split}`: {sum(map(_within, rows))} of {len(rows)} seeds within the range, "
            f"{sum(map(_within, plain))} without noise; -log p {likelihoods[0]:.3f} against {likelihoods[1]:.3f}"
        )
    rows = _rows(found, "test")
    learnt = [_within(row, row["learnt"]) for row in rows]
    as_perfect = 100 * fmean(row["learnt"]["as_perfect"] for row in rows)
    quotes.append(
        f"{label}, `test`, a calibration learnt from as many prompts: {sum(learnt)} of {len(learnt)} seeds within the "
        f"range; {as_perfect:.0f} % of such routers within a perfect one's"
    )
    weighed = [row for row in found["calibration"] if row["split"].startswith("test,")]
    quotes.append(
        f"{label}, `test`, sources weighed as in `dev`: {sum(map(_within, weighed))} of {len(weighed)} seeds within "
        "the range"
    )
    return quotes


def clusterer() -> list[str]:
    """Final adjusted Rand of options that did not earn their place, and preconditioning."""
    found = read("clustering")
    rows, adam = found["preconditioning"]["rows"], found["preconditioning"]["adam"]

    def final(option: str) -> str:
        return ", ".join(f"{found['options'][cell]['ari'][option]['final']:.2f}" for cell in CELLS)

    def by_k(of: dict[str, Any], name: str) -> str:
        return f"{of['K 4'][name]:.2f} and {of['K 8'][name]:.2f}"

    return [
        f"First centroids from K - 1 coordinates: {final('running, q = K - 1')} against {final('running')} from 64",
        f"Three directions a cluster in place of one: {final('rank 3 a cluster')}.",
        f"A momentum that falls: {final('svd, decaying momentum')} against the constant's "
        f"{final('svd, m 0.1 (the paper)')}.",
        f"K-means of all coordinates in the running SVD's basis: {final('the same, running SVD as basis')} against "
        f"{final('k-means of all coordinates')} in the validation basis",
        f"agree with the domains at {by_k(adam, 'ari_with_domain')} (K = 4, 8) against "
        f"{by_k(rows, 'ari_with_domain')}, their stability stays at {by_k(adam, 'stability')} "
        f"({by_k(rows, 'stability')}), and 64 directions hold {adam['energy_of_64']:.2f} of the energy against "
        f"{rows['energy_of_64']:.2f}.",
    ]


def main_table() -> list[str]:
    """The main table on the real mix."""
    found = read("real-mix")
    pairs = {name: interval(pair["loss"]) for name, pair in found["comparisons"].items()}

    def ours(other: str) -> str:
        return pairs[f"gradientspace - {other}"]

    def agreement(groups: dict[str, Any]) -> str:
        return f"{groups['agreement']['source']['ari']['mean']:.2f}"

    of = found["groupings"]
    return [
        f"routed experts against one LoRA {ours('single')} nats, against one of K times the rank "
        f"{ours('single-wide')}, projected gradients {ours('less')}, ELREA {ours('elrea')} and the paper's own recipe "
        f"{ours('gradientspace-paper')}",
        f"against embedding clusters {ours('embedding')}, against TF-IDF clusters {ours('tfidf')}, against the true "
        f"sources {ours('source')}",
        f"agree with the sources at {agreement(found['clustering'])} (adjusted Rand), embedding clusters at "
        f"{agreement(of['embedding'])}, projected gradients at {agreement(of['less'])}, ELREA's groups at "
        f"{agreement(of['elrea'])}",
        f"changes the loss by {pairs['nearest-centroid - gradientspace']} nats",
    ]


def headline() -> list[str]:
    """The headline pairs on five seeds."""
    pairs = read("real-mix-headline")["comparisons"]
    single, elrea, embedding = (
        interval(pairs[f"gradientspace - {other}"]["loss"]) for other in ("single", "elrea", "embedding")
    )
    return [f"against one LoRA {single} nats, against ELREA {elrea}, against embedding clusters {embedding}"]


def demo() -> list[str]:
    """The demo's gain over one LoRA on another kind of processor."""
    gain = read("demo-epyc")["comparisons"]["gradientspace - single"]["exact_match"]
    mean, low, high = (f"{100 * gain[name]:.1f}" for name in ("mean", "low", "high"))
    return [f"{mean} points ({low} to {high}; `benchmarks/results/demo-epyc.json`)"]


def ablations() -> list[str]:
    """What was found when one option of the main table's config was changed at a time."""
    widths, compute = read("ablations/projection"), read("ablations/compute")
    target = read("ablations/target")
    plain = target["methods"][f"{entry(target, 'target-plain')}/gradientspace"]
    methods = ("plain", "less", "projection-2048", "projection-512")
    rand = [f"{widths['groupings'][m]['agreement']['domain']['ari']['mean']:.3f}" for m in methods]
    minus = [interval(widths["comparisons"][f"{m} - single"]["loss"]) for m in methods]
    routed = interval(widths["comparisons"]["gradientspace - single"]["loss"])
    long = interval(compute["comparisons"]["single-long - single"]["loss"])
    by_k = read("ablations/k")
    variants = [entry(by_k, f"k-{k}") for k in (2, 4, 8, 16)]
    gained = [(minus_single(by_k, f"{v}/gradientspace") or {})["mean"] for v in variants]
    gains = ", ".join(f"{gain:+.4f}" for gain in gained[:-1]) + f" and {gained[-1]:+.4f}"
    behind = [by_k["comparisons"][f"{v}/gradientspace - {v}/embedding"]["loss"]["mean"] for v in variants]
    return [
        f"gain {gains} nats over one LoRA with 2, 4, 8 and 16",
        f"({max(behind):+.4f} at worst, {min(behind):+.4f} at best, every interval with zero in it)",
        f"at {rand[0]} (adjusted Rand) in full dimension, {rand[1]} projected to 8,192 numbers, {rand[2]} to 2,048 and "
        f"{rand[3]} to 512",
        f"{minus[0]}, {minus[1]}, {minus[2]} and {minus[3]} nats",
        f"which gains {routed} with the same pass",
        f"learns them by heart, {long} nats",
        f"Clusters of whole gradients in place of what the prompt predicts cost "
        f"{changed('target', 'plain', 'routable')} nats",
        f"A ridge penalty of 1 or 100 in place of the one that explains most out of fold changes "
        f"{changed('ridge', '1.0', 'auto')} and {changed('ridge', '100.0', 'auto')} nats",
        f"64 directions in place of 16 change the loss by {changed('components', '64', '16')} nats, 256 in place of 64 "
        f"by {changed('components', '256', '64')}, gradients that are not centred by "
        f"{changed('centring', 'False', 'True')}",
        f"a cache of 32 in place of 8 changes {changed('cache', 'plain-32', 'plain-8')}, of 128 in place of 32 "
        f"{changed('cache', 'plain-128', 'plain-32')}, a momentum of 0.1 in place of 0.03 "
        f"{changed('momentum', 'plain-0.1', 'plain-0.03')}, of 0.3 in place of 0.1 "
        f"{changed('momentum', 'plain-0.3', 'plain-0.1')}",
        f"a cache's mean in place of its leading direction {changed('update', 'plain-mean', 'plain-svd')}, the running "
        f"mean of a cluster {changed('update', 'plain-running', 'plain-svd')} nats",
        f"{interval(plain['difference']['loss'])} nats on one processor and {beside('update-plain-svd')} on another",
        f"with rank 4, 8 and 16 routed experts gain {beside('rank-4-8')}, {beside('rank-8-16')} and "
        f"{beside('rank-16-32')} nats over one LoRA of the same rank",
        f"A warm-up on a tenth of the rows in place of a twentieth changes the loss by "
        f"{changed('warmup', '0.1', '0.05')} nats, on a fifth in place of a tenth by {changed('warmup', '0.2', '0.1')}",
        f"512 validation gradients in place of 128 by {changed('validation', '512', '128')}, 1,024 in place of 512 by "
        f"{changed('validation', '1024', '512')}",
        f"half of the passes for the shared adapter in place of a quarter by {changed('shared_share', '0.5', '0.25')}, "
        f"three quarters in place of half by {changed('shared_share', '0.75', '0.5')}",
        f"with two and four passes routed experts gain {beside('steps-2')} and {beside('steps-4')} nats over one LoRA "
        f"with as many, and are at {beside('steps-2', 'embedding')} and {beside('steps-4', 'embedding')} against "
        f"embedding clusters",
        f"on a tenth, a fifth and two fifths of the rows {beside('data-0.1')}, {beside('data-0.2')} and "
        f"{beside('data-0.4')} over one LoRA, and {beside('data-0.1', 'embedding')}, {beside('data-0.2', 'embedding')} "
        f"and {beside('data-0.4', 'embedding')} against embedding clusters",
        f"The first seed alone had {beside_by_seed('data-0.4', 'embedding')['by_seed'][0]:+.4f} with two fifths",
    ]


def beside(variant: str, other: str = "single") -> str:
    """Routed loss of a variant of an ablation minus that of another method beside it."""
    return interval(beside_by_seed(variant, other))


def beside_by_seed(variant: str, other: str) -> dict[str, Any]:
    """The same, with the difference of each seed."""
    found = read(f"ablations/{variant.split('-', 1)[0]}")
    name = entry(found, variant)
    return found["comparisons"][f"{name}/gradientspace - {name}/{other}"]["loss"]


def entry(found: dict[str, Any], variant: str) -> str:
    """What a variant is called in its table: runs of several seeds have a name without one."""
    return f"{variant}-dev_b" + (f"-seed{found['seeds'][0]}" if len(found["seeds"]) == 1 else "")


def changed(item: str, value: str, other: str) -> str:
    """Routed loss of one value of an ablated option minus that of another, which stands before it in the table."""
    found = read(f"ablations/{item}")
    ours = [f"{entry(found, f'{item}-{v}')}/gradientspace" for v in (value, other)]
    return interval(found["comparisons"][" - ".join(ours)]["loss"])


def real_mix() -> list[str]:
    """The first table on the real mix."""
    pairs = read("real-mix-seed0")["comparisons"]
    single, embedding = pairs["gradientspace - single"], pairs["gradientspace - embedding"]
    loss = single["loss"]
    return [
        f"routed experts against one LoRA {loss['mean']:+.4f} nats (95 % interval {loss['low']:+.4f} to "
        f"{loss['high']:+.4f}), the same sign per token ({single['token_loss']:+.4f}) and per token averaged over "
        f"domains ({single['domain_mean_token_loss']:+.4f}); against random groups "
        f"{pairs['gradientspace - random']['loss']['mean']:+.4f}.",
        f"with the same K and kind of router {interval(embedding['loss'])}: embedding clusters are *ahead*.",
    ]
