"""What only a CUDA device can show: every test here needs one and is skipped, with a reason, where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from planted import planted_rows
from test_gradients import VOCAB, adapt, make_samples, tiny_llama
from test_stacked import base_of, prompts, save_experts

from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.data import pad_batch
from gradientspace.device import on_device
from gradientspace.gradients import PerSampleGradients
from gradientspace.gradients.batching import right_padded
from gradientspace.gradients.head import Supervision
from gradientspace.gradients.packing import packed_inputs, segment_attention, varlen_attn
from gradientspace.stacked import BASE, StackedExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def no_waiting():
    """Any wait of the CPU for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_batch_goes_to_the_device_without_a_wait(no_waiting):
    batch = pad_batch(make_samples(), 0)
    ids, labels, lengths = right_padded(batch)
    device = torch.device("cuda")
    where = Supervision.from_labels(labels, "mean", lengths).to(device)
    inputs = packed_inputs(ids, lengths, device)
    on_device([ids], device)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(where.rows.cpu(), Supervision.from_labels(labels, "mean", lengths).rows)
    assert inputs["segment_bounds"].tolist()[-1] == sum(lengths) == inputs["input_ids"].numel()


@pytest.mark.parametrize("packing", [False, True])
def test_gradients_are_those_of_the_cpu(packing):
    batch, model = pad_batch(make_samples(), 0), adapt(tiny_llama())
    with PerSampleGradients(copy.deepcopy(model), packing=packing) as engine:
        expected = engine.compute(batch)
    with PerSampleGradients(model.to("cuda"), packing=packing) as engine:
        found = engine.compute(batch)
        again = engine.compute({key: value.to("cuda") for key, value in batch.items()})
    assert found.is_cuda
    assert torch.allclose(found.cpu(), expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found, again, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(varlen_attn is None, reason="this torch has no variable-length attention")
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, None), (4, 2, None), (4, 2, 5)])
def test_varlen_attention_is_attention_inside_each_segment(heads, kv_heads, window):
    lengths, generator = (7, 3, 12), torch.Generator().manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(1, h, n, 32, generator=generator) for h in (heads, kv_heads, kv_heads))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        own = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
        output, _ = segment_attention(
            torch.nn.Identity(), *own, None, sliding_window=window, segment_lengths=lengths,
            segment_bounds=bounds.to(device),
        )  # fmt: skip
        output.float().square().sum().backward()
        found.append([output, *(t.grad for t in own)])
    for exact, half in zip(*found, strict=True):
        assert torch.allclose(half.float().cpu(), exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("update", ["svd", "running"])
def test_the_clusterer_agrees_with_the_cpu(update):
    rows, _ = planted_rows(600, 500, 3, 0.3)
    labels = []
    for device in ("cpu", "cuda"):
        own = rows.to(device)
        clusterer = OnlineSVDClusterer(3, 0, update=update).initialize(own[:200])
        parts = [torch.as_tensor(clusterer.partial_fit(batch).labels_).cpu() for batch in own[200:].split(50)]
        labels.append(torch.cat(parts))
    pairs = set(zip(*(part.tolist() for part in labels), strict=True))
    assert len(pairs) == 3  # the same groups; a device may number them in its own way


def test_the_memory_plan_is_what_is_allocated():
    dim, k, m, b = 1_000_000, 4, 128, 16
    clusterer = OnlineSVDClusterer(k, 0, n_components=16, n_validation=m, batch_size=b)
    plan = clusterer.plan_memory(dim, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    clusterer.initialize(torch.randn(m, dim, device="cuda"))
    initialise = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 * k * plan.cache_size // b):
        clusterer.partial_fit(torch.randn(b, dim, device="cuda"))
    stream = torch.cuda.max_memory_allocated() - before
    assert initialise == pytest.approx(sum(plan.initialise.values()), rel=0.1)
    assert stream == pytest.approx(sum(plan.stream.values()), rel=0.1)


def test_a_mixed_batch_of_experts_is_that_of_the_cpu(tmp_path):
    folders, rows = save_experts("llama", tmp_path), [2, BASE, 0, 1]
    texts = torch.tensor(prompts(12, 12, 12, 12)) % VOCAB
    logits = []
    for device in ("cpu", "cuda"):
        with StackedExperts(base_of("llama").to(device), folders) as experts, torch.inference_mode():
            with experts.batch(rows) as model:
                whole = model(input_ids=texts.to(device)).logits
            with experts.batch(rows) as model:  # one token a row runs another product
                first = model(input_ids=texts[:, :1].to(device)).logits
        logits.append([whole.cpu(), first.cpu()])
    for expected, found in zip(*logits, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
