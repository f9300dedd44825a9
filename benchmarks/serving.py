"""What an answer costs: one routed expert a prompt, against the base, one LoRA, PEFT's ways of mixing, an ensemble.

    python benchmarks/serving.py --json benchmarks/results/serving.json

Every arm runs the same generation loop of `gradientspace.generation` (prompts of 32 tokens, greedy, a fixed number of
new tokens); only what the layers do differs. Weights are random, since speed does not depend on them: the shapes are
the demo's base, the small pretrained base of the real mix, and one like GPT-2 small. Arms are interleaved, the median
of all rounds is reported. A batch of b rows stands for b concurrent requests.

| arm | what runs |
|---|---|
| base | no adapter |
| one LoRA | PEFT, one adapter for all rows |
| one expert | the stacked layers, one expert for all rows |
| mixed | the stacked layers, 4 experts in turn over the rows |
| PEFT mixed | PEFT's `adapter_names`, the same rows |
| switching | PEFT, the rows of one adapter after those of another |
| ensemble | ELREA: all experts and the adapter they started from on every row, logits mixed; 5 passes a token |

The ensemble also needs the gradient of every prompt, whose time is reported beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from gradientspace.generation import Request, generate, left_pad
from gradientspace.gradients import PerSampleGradients
from gradientspace.models import load_adapters
from gradientspace.stacked import StackedExperts

N_EXPERTS = 4
PROMPT_TOKENS = 32
SHAPES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
             "vocab_size": 1024, "rank": 4, "new_tokens": 64},
    "tiny-base": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
                  "vocab_size": 4096, "rank": 8, "new_tokens": 64},
    "gpt2-small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "vocab_size": 32000, "rank": 16, "new_tokens": 16},
}  # fmt: skip


class Numbers:
    """No tokenizer: text is not what is measured."""

    pad_token_id = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


# ------------------------------------------------------------------------------- models


def base_model(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {key: value for key, value in shape.items() if key not in ("rank", "new_tokens")}
    config = LlamaConfig(**options, max_position_embeddings=1024, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def save_adapters(shape: dict[str, int], folder: Path) -> dict[str, Path]:
    """`N_EXPERTS` random adapters and one more, the one they "started from"."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for k in range(N_EXPERTS + 1):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=shape["rank"], lora_alpha=2 * shape["rank"], target_modules="all-linear"
        )
        model = get_peft_model(base_model(shape), config)
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        name = "shared" if k == N_EXPERTS else f"expert_{k}"
        folders[name] = folder / name
        model.save_pretrained(str(folders[name]))
    return folders


class PeftModelAsExperts:
    """PEFT in the place of `StackedExperts`: one active adapter, or `adapter_names` a row where `mixes`."""

    def __init__(self, base: Any, folders: dict[str, Path], mixes: bool) -> None:
        self.peft = load_adapters(base, folders)
        self.names, self.mixes, self.rows = list(folders), mixes, []
        base = self.peft.get_base_model()  # which holds PEFT's layers; only mixing needs PEFT's own forward
        self.model = self if mixes else base
        self.config, self.device, self.forward = base.config, base.device, base.forward

    def __call__(self, **inputs: Any) -> Any:
        return self.peft(**inputs, adapter_names=[self.names[k] for k in self.rows])

    @contextlib.contextmanager
    def batch(self, rows: Sequence[int]) -> Iterator[None]:
        self.select(rows)
        yield

    def select(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        if not self.mixes:
            self.peft.set_adapter(self.names[rows[0]], inference_mode=True)


# --------------------------------------------------------------------------------- arms


def run_requests(experts: Any, rows: Sequence[int], n_tokens: int, prompts: Sequence[list[int]]) -> None:
    requests = [Request(prompt, row, n_tokens, ignore_end=True) for prompt, row in zip(prompts, rows, strict=True)]
    for _ in generate(experts, requests, Numbers(), ()):  # type: ignore[arg-type]
        pass


@torch.inference_mode()
def run_ensemble(experts: StackedExperts, n_tokens: int, prompts: Sequence[list[int]]) -> None:
    """ELREA's inference on the stacked layers: every prompt once for each adapter, their logits mixed by weight."""
    from transformers import DynamicCache

    members = len(experts.names)
    rows = [k for _ in prompts for k in range(members)]
    ids, mask = left_pad([prompt for prompt in prompts for _ in range(members)], 0)
    weights = torch.softmax(torch.randn(len(prompts), members), 1)[..., None]
    cache = DynamicCache(config=experts.model.config)
    with experts.batch(rows) as model:
        for _ in range(n_tokens):
            logits = model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1).logits
            mixed = (logits[:, -1].unflatten(0, (len(prompts), members)) * weights).sum(1)
            ids = mixed.argmax(-1, keepdim=True).repeat_interleave(members, 0)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


def arms_of(shape: dict[str, int], folders: dict[str, Path]) -> dict[str, Callable[[int], None]]:
    """Name -> function of the batch size."""
    experts_only = {name: folder for name, folder in folders.items() if name != "shared"}
    stacked = StackedExperts(base_model(shape), experts_only)
    with_shared = StackedExperts(base_model(shape), folders)
    one, mixed = (PeftModelAsExperts(base_model(shape), experts_only, mixes) for mixes in (False, True))
    n = shape["new_tokens"]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, shape["vocab_size"], (64, PROMPT_TOKENS), generator=generator).tolist()

    def in_turn(b: int) -> list[int]:
        return [i % N_EXPERTS for i in range(b)]

    def switching(b: int) -> None:
        for k in sorted(set(in_turn(b))):
            group = [prompts[i] for i in range(b) if i % N_EXPERTS == k]
            run_requests(one, [k] * len(group), n, group)

    return {
        "base": lambda b: run_requests(stacked, [-1] * b, n, prompts[:b]),
        "one LoRA": lambda b: run_requests(one, [0] * b, n, prompts[:b]),
        "one expert": lambda b: run_requests(stacked, [0] * b, n, prompts[:b]),
        "mixed": lambda b: run_requests(stacked, in_turn(b), n, prompts[:b]),
        "PEFT mixed": lambda b: run_requests(mixed, in_turn(b), n, prompts[:b]),
        "switching": switching,
        "ensemble": lambda b: run_ensemble(with_shared, n, prompts[:b]),
    }


def measure(arms: dict[str, Callable[[int], None]], b: int, rounds: int) -> dict[str, float]:
    """Median seconds of every arm at batch size b, arms in turn."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm(b)
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm(b)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def gradient_seconds(shape: dict[str, int], folders: dict[str, Path], b: int, rounds: int) -> float:
    """Median seconds of the gradients of b prompts at the adapter that the experts started from."""
    model = load_adapters(base_model(shape), {"default": folders["shared"]})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ids = torch.randint(3, shape["vocab_size"], (b, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    times = []
    with PerSampleGradients(model) as engine:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            engine.compute(batch)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def one_shape(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        folders = save_adapters(shape, Path(folder))
        arms = arms_of(shape, folders)
        result: dict[str, Any] = {"shape": shape, "batches": {}}
        for b in (1, 8) if quick or name == "gpt2-small" else (1, 8, 32):
            seconds = measure(arms, b, rounds)
            tokens = b * shape["new_tokens"]
            gradient = gradient_seconds(shape, folders, b, rounds)
            result["batches"][b] = {
                "tokens_per_second": {arm: tokens / value for arm, value in seconds.items()},
                "milliseconds_per_answer": {arm: 1000 * value for arm, value in seconds.items()},
                "mixed_over_one_lora": seconds["one LoRA"] / seconds["mixed"],
                "mixed_over_one_expert": seconds["one expert"] / seconds["mixed"],
                "mixed_over_peft_mixed": seconds["PEFT mixed"] / seconds["mixed"],
                "ensemble_over_mixed_time": seconds["ensemble"] / seconds["mixed"],
                "ensemble_passes_per_token": N_EXPERTS + 1,
                "ensemble_gradient_milliseconds": 1000 * gradient,
            }
            print(_table(name, b, result["batches"][b]), flush=True)
    return result


def _table(name: str, b: int, result: dict[str, Any]) -> str:
    lines = [f"\n{name}, batch {b}"]
    for arm, speed in result["tokens_per_second"].items():
        lines.append(f"  {arm:12s} {speed:9.0f} tokens/s {result['milliseconds_per_answer'][arm]:9.1f} ms")
    lines.append(
        f"  mixed is {result['mixed_over_one_lora']:.2f}x one LoRA, {result['mixed_over_one_expert']:.2f}x one expert, "
        f"{result['mixed_over_peft_mixed']:.2f}x PEFT mixed; gradients of the prompts "
        f"{result['ensemble_gradient_milliseconds']:.1f} ms"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------- routing


def routing(quick: bool) -> dict[str, Any]:
    """Milliseconds of one prompt of 128 word pieces, and of a short one, through encoder and head; per type."""
    from gradientspace.calibration import Calibration
    from gradientspace.encoder import Encoder
    from gradientspace.router import LinearHead, Router

    rng = np.random.default_rng(0)
    n = 20 if quick else 200
    # "the" is one word piece, and two special ones are added; what the words are changes no time.
    texts = {"128 word pieces": ["the " * 126] * n, "16 word pieces": ["the " * 14] * n}
    results: dict[str, Any] = {}
    for dtype in ("float32", "auto"):
        router = Router(Encoder(dtype=dtype))  # type: ignore[arg-type]
        router.n_clusters, router.calibration_ = 8, Calibration.none(8)
        router.head_ = LinearHead(rng.standard_normal((8, 384)), np.zeros(8))
        name = f"{dtype} ({str(router.encoder.dtype).removeprefix('torch.')})"
        results[name] = {}
        for kind, prompts in texts.items():
            times = []
            for prompt in [*prompts[:5], *prompts]:
                start = time.perf_counter()
                router.predict_proba([prompt])
                times.append(1000 * (time.perf_counter() - start))
            times = times[5:]
            results[name][kind] = {"median": statistics.median(times), "p99": float(np.quantile(times, 0.99))}
            print(f"routing, {name}, {kind}: median {results[name][kind]['median']:.1f} ms, "
                  f"p99 {results[name][kind]['p99']:.1f} ms", flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="one round of the smallest shape: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15, help="how often every arm runs; the median counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": describe("transformers", "peft"), "experts": N_EXPERTS, "shapes": {}}
    results["routing_milliseconds"] = routing(options.quick)
    for name in ["demo"] if options.quick else options.shapes:
        results["shapes"][name] = one_shape(name, options.quick, 1 if options.quick else options.rounds)
    fastest = results["routing_milliseconds"][list(results["routing_milliseconds"])[-1]]["128 word pieces"]["median"]
    for shape in results["shapes"].values():
        if shape["shape"]["new_tokens"] == 64:
            answer = shape["batches"][1]["milliseconds_per_answer"]["one expert"]
            shape["routing_share_of_a_64_token_answer"] = fastest / (fastest + answer)
            print(f"routing is {shape['routing_share_of_a_64_token_answer']:.1%} of one 64-token answer")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
