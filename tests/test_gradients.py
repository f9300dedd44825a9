"""The gradient engine against plain autograd, one sample at a time."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace

import pytest
import safetensors
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gradientspace.errors import DataError, GradientSpaceError, ModelError, RunFolderError
from gradientspace.gradients import PerSampleGradients, head, layers
from gradientspace.gradients.batching import plan_batches

VOCAB = 97
torch.set_num_threads(1)  # tiny matrices: threads only wait for each other

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


def randomise(model, adapter="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
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
    with PerSampleGradients(model, path=path, packing=False) as engine:
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


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    max_tokens=st.integers(1, 200),
    max_samples=st.integers(1, 9),
    seed=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_any_plan_covers_every_sample_once_within_its_limits(lengths, max_tokens, max_samples, seed):
    plan = plan_batches(lengths, max_tokens=max_tokens, max_samples=max_samples, seed=seed)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= max_samples for batch in plan)
    longest = [max(lengths[i] for i in batch) for batch in plan]
    assert all(len(batch) == 1 or len(batch) * n <= max_tokens for batch, n in zip(plan, longest, strict=True))


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


def test_a_batch_of_few_tokens_and_one_of_many_take_two_forms_of_the_same_product(monkeypatch):
    model, samples = adapt(tiny_llama()), make_samples(4)
    references = [reference(model, s)[1] for s in samples]
    for merging in (True, False):
        monkeypatch.setattr(layers, "_merging_pays", lambda *_, merging=merging: merging)
        with PerSampleGradients(model) as engine:
            assert relative_error(engine.compute(padded(samples)), references) <= 1e-5


def test_logits_in_chunks_are_the_same(monkeypatch):
    model, samples = adapt(tiny_llama()), make_samples(8)
    with PerSampleGradients(model) as engine:
        whole = engine.compute(padded(samples))
        monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCAB * 3)
        assert relative_error(engine.compute(padded(samples)), whole) <= 1e-5


def test_sum_loss_and_unit_norm():
    model, samples = adapt(tiny_llama()), make_samples(6)
    counts = torch.tensor([sum(label != -100 for label in s.labels[1:]) for s in samples])
    with PerSampleGradients(model) as engine:
        mean, mean_losses = engine.compute(padded(samples)), engine.losses
    with PerSampleGradients(model, loss="sum") as engine:
        assert relative_error(engine.compute(padded(samples)), mean * counts[:, None]) <= 1e-5
        assert torch.allclose(engine.losses, mean_losses * counts, rtol=1e-5)
    with PerSampleGradients(model, unit_norm=True) as engine:
        assert relative_error(engine.compute(padded(samples)), F.normalize(mean)) <= 1e-5
        assert torch.allclose(engine.norms, mean.norm(dim=1), rtol=1e-5)
        assert engine.settings["unit_norm"] is True


def by_index(batches):
    return {int(i): row for b in batches for i, row in zip(b.indices, b.gradients, strict=True)}


def poison(model, token):
    """Make every sample with this token have a NaN loss."""
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[token] = float("nan")


@pytest.mark.parametrize("packing", [False, True])
def test_a_sample_with_a_nan_loss_is_named_excluded_and_counted(packing, caplog):
    model, samples = adapt(tiny_llama()), make_samples(12)
    for sample in samples:
        sample.input_ids = [t % 90 for t in sample.input_ids]
    samples[4].input_ids[1], samples[4].row = 95, 77
    with PerSampleGradients(model, packing=packing) as engine:
        before = by_index(engine.stream(samples))
        poison(model, 95)
        after = by_index(engine.stream(samples))
    assert set(after) == set(range(12)) - {4}
    assert all(torch.equal(after[i], before[i]) for i in after)
    assert [(e.index, e.row) for e in engine.excluded] == [(4, 77)]
    assert "row 77" in caplog.text


def test_dropout_is_announced(caplog):
    with caplog.at_level(logging.WARNING):
        engine = PerSampleGradients(adapt(tiny_llama(), lora_dropout=0.1))
    assert "lora_dropout [0.1] is off" in caplog.text
    assert "[0.1]" in engine.explain()


def test_bf16_model_stays_close_to_fp32():
    samples = make_samples(16)
    exact = adapt(tiny_llama())
    references = [reference(exact, s)[1] for s in samples]
    for autocast_adapter_dtype in (True, False):  # adapter in fp32 or bf16
        model = get_peft_model(
            tiny_llama().bfloat16(),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        model.load_state_dict({k: v for k, v in exact.state_dict().items() if "lora" in k}, strict=False)
        for path in ("fast", "general"):
            with PerSampleGradients(model, path=path) as engine:
                gradients = engine.compute(padded(samples))
            assert gradients.dtype == torch.float32
            assert relative_error(gradients, references) <= 0.1


def test_the_self_check_catches_a_wrong_formula(monkeypatch):
    model = adapt(tiny_llama())
    right = layers.GradientSink.add_outer
    monkeypatch.setattr(layers.GradientSink, "add_outer", lambda self, b, rows, x, y: right(self, b, rows, x, 1.01 * y))
    with pytest.raises(GradientSpaceError, match="self-check"):
        PerSampleGradients(model)


class TestStore:
    def stream(self, model, samples, path, stop=None):
        batches = []
        with PerSampleGradients(model) as engine:
            for batch in engine.stream(samples, max_tokens=128, store=path):
                batches.append(batch)
                if len(batches) == stop:
                    break
        return batches

    def test_a_broken_pass_resumes_and_computes_only_what_is_missing(self, tmp_path, monkeypatch):
        model, samples, path = adapt(tiny_llama()), make_samples(20), tmp_path / "gradients.safetensors"
        whole = self.stream(model, samples, tmp_path / "other")
        self.stream(model, samples, path, stop=2)
        computed = []
        compute = PerSampleGradients.compute

        def counting(self, batch):
            computed.append(len(batch["labels"]))
            return compute(self, batch)

        monkeypatch.setattr(PerSampleGradients, "compute", counting)
        resumed = self.stream(model, samples, path)
        assert [b.indices.tolist() for b in resumed] == [b.indices.tolist() for b in whole]
        for a, b in zip(resumed, whole, strict=True):
            assert torch.equal(a.gradients, b.gradients)
            assert torch.equal(a.losses, b.losses)
        assert sum(computed) == 20 - sum(len(b.indices) for b in whole[:2])

    def test_the_file_is_ordinary_safetensors(self, tmp_path):
        model, samples, path = adapt(tiny_llama()), make_samples(5), tmp_path / "gradients.safetensors"
        batches = self.stream(model, samples, path)
        with safetensors.safe_open(path, "pt") as file:
            gradients = file.get_tensor("gradients")
            assert file.get_tensor("done").tolist() == [1] * 5
        for batch in batches:
            assert torch.equal(gradients[batch.indices], batch.gradients)

    def test_a_store_of_other_weights_is_refused(self, tmp_path):
        model, samples, path = adapt(tiny_llama()), make_samples(5), tmp_path / "gradients.safetensors"
        self.stream(model, samples, path)
        randomise(model, seed=2)
        with pytest.raises(RunFolderError, match="other weights"):
            self.stream(model, samples, path)

    def test_a_full_disk_is_one_clear_line_and_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(RunFolderError, match=r"GiB.*No space left"):
            self.stream(adapt(tiny_llama()), make_samples(2), tmp_path / "gradients.safetensors")
        assert list(tmp_path.iterdir()) == []


def test_the_self_check_says_so_when_it_cannot_tell():
    model = adapt(tiny_llama())
    assert "largest relative error" in PerSampleGradients(model).explain()
    poison(model, slice(None))
    assert "no finite gradient" in PerSampleGradients(model).explain()
