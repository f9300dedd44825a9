"""The gradient engine against plain autograd, one sample at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gradientspace.errors import DataError, ModelError
from gradientspace.gradients import PerSampleGradients
from gradientspace.gradients.batching import plan_batches

VOCAB = 97

# PEFT reads an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def adapt(model, **overrides):
    """A LoRA adapter whose B is not zero, as after a warm-up."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | overrides
    model = get_peft_model(model, LoraConfig(**options))
    randomise(model)
    return model


def randomise(model, adapter="default"):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_samples(n=8, low=4, high=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        length = int(torch.randint(low, high, (), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length - 1, (), generator=generator))
        samples.append(SimpleNamespace(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return samples


def reference(model, sample, adapter="default"):
    """(loss, gradient) of one sample alone by plain autograd through the stock forward."""
    model.eval()
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    loss = F.cross_entropy(logits, labels[0, 1:], ignore_index=-100)
    parameters = [p for name, p in model.named_parameters() if f".{adapter}." in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in flat]).float()


def padded(samples, side="right", pad=0):
    length = max(len(s.input_ids) for s in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for s in samples:
        gap = length - len(s.input_ids)
        for key, values, fill in (
            ("input_ids", s.input_ids, pad),
            ("attention_mask", [1] * len(s.input_ids), 0),
            ("labels", s.labels, -100),
        ):
            rows[key].append([fill] * gap + values if side == "left" else values + [fill] * gap)
    return {key: torch.tensor(value) for key, value in rows.items()}


def relative_error(gradients, references):
    return max(((g - r).norm() / r.norm()).item() for g, r in zip(gradients, references, strict=True))


@pytest.mark.parametrize("path", ["fast", "general"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_llama_matches_batch_size_one(path, side):
    model, samples = adapt(tiny_llama()), make_samples(32)
    losses, references = zip(*(reference(model, s) for s in samples), strict=True)
    with PerSampleGradients(model, path=path) as engine:
        gradients = engine.compute(padded(samples, side))
        assert gradients.shape == (32, engine.dim)
        assert gradients.dtype == torch.float32
        assert engine.path == path
        assert relative_error(gradients, references) <= 1e-5
        assert torch.allclose(engine.losses, torch.stack(losses), rtol=1e-5)


def test_layout_names_are_the_parameters_in_order():
    model = adapt(tiny_llama())
    engine = PerSampleGradients(model)
    expected = [(n, tuple(p.shape)) for n, p in model.named_parameters() if ".default." in n]
    assert [(block.name, block.shape) for block in engine.layout] == expected
    ends = [block.offset + block.size for block in engine.layout]
    assert [block.offset for block in engine.layout] == [0, *ends[:-1]]
    assert engine.dim == ends[-1]


def test_stream_covers_every_sample_once_in_shuffled_batches_and_repeats():
    model, samples = adapt(tiny_llama()), make_samples(40)
    _, references = zip(*(reference(model, s) for s in samples), strict=True)
    with PerSampleGradients(model) as engine:
        batches = list(engine.stream(samples, max_tokens=128, seed=3))
        again = list(engine.stream(samples, max_tokens=128, seed=3))
        other = list(engine.stream(samples, max_tokens=128, seed=4))
    order = torch.cat([b.indices for b in batches])
    assert sorted(order.tolist()) == list(range(40))
    gradients = torch.cat([b.gradients for b in batches])
    assert relative_error(gradients, [references[i] for i in order]) <= 1e-5
    assert torch.allclose(torch.cat([b.norms for b in batches]), gradients.norm(dim=1))
    assert all(torch.equal(a.gradients, b.gradients) for a, b in zip(batches, again, strict=True))
    assert [b.indices.tolist() for b in batches] != [b.indices.tolist() for b in other]
    longest = [max(len(samples[i].input_ids) for i in b.indices) for b in batches]
    assert longest != sorted(longest)
    assert all(len(b.indices) * n <= 128 for b, n in zip(batches, longest, strict=True))


def test_plan_gives_long_samples_a_batch_of_their_own():
    plan = plan_batches([5, 300, 6, 7], max_tokens=20, max_samples=2, seed=0)
    assert sorted(map(sorted, plan)) == [[0, 2], [1], [3]]


def test_model_is_left_as_it_was():
    model = adapt(tiny_llama(), lora_dropout=0.5)
    model.train()
    model.get_base_model().model.norm.eval()
    parameters = dict(model.named_parameters())
    parameters["base_model.model.lm_head.weight"].requires_grad_(True)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    modes = {name: m.training for name, m in model.named_modules()}
    forwards = {name for name, m in model.named_modules() if "forward" in m.__dict__}
    with PerSampleGradients(model) as engine:
        first = engine.compute(padded(make_samples(3)))
        assert torch.equal(first, engine.compute(padded(make_samples(3))))  # dropout is off
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name for name, m in model.named_modules() if "forward" in m.__dict__} == forwards
    assert all(p.grad is None for p in model.parameters())


def test_rows_without_a_loss_are_refused_by_number():
    engine = PerSampleGradients(adapt(tiny_llama()))
    samples = make_samples(3)
    samples[1].labels = [samples[1].input_ids[0]] + [-100] * (len(samples[1].input_ids) - 1)
    with pytest.raises(DataError, match="row 2"):
        engine.compute(padded(samples))
    samples[1].row = 17
    with pytest.raises(DataError, match="row 17"):
        next(engine.stream(samples))


def test_a_missing_adapter_is_refused_with_the_names_there_are():
    with pytest.raises(ModelError, match=r"'other'.*\['default'\]"):
        PerSampleGradients(adapt(tiny_llama()), "other")
