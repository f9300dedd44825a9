"""Other ways to get per-sample LoRA gradients, each at its best, behind one interface.

Each arm is a context manager over a PEFT model that yields `run(batch)`. It returns per-sample gradients as a
list of (b, ...) tensors in the engine's order, or none where there are only summed ones. What an arm needs
once (hooks, wrappers, flags) is set up outside `run`, and so is laying the tensors side by side (`matrix`),
which only the engine does as it goes. `batch` is right-padded input_ids, attention_mask and labels. No arm is
given an attention mask: rows are right-padded and the model is causal, so it changes nothing but speed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradientspace.gradients import PerSampleGradients
from gradientspace.gradients.attach import eval_mode
from gradientspace.gradients.head import Head, Supervision
from gradientspace.gradients.layers import GradientSink

Run = Callable[[dict[str, Tensor]], list[Tensor]]


def matrix(gradients: list[Tensor]) -> Tensor:
    """(b, D) float32."""
    return torch.cat([part.flatten(1).float() for part in gradients], dim=1)


def lora_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name]


@contextlib.contextmanager
def only_lora_trains(model: Any) -> Iterator[list[torch.nn.Parameter]]:
    parameters = lora_parameters(model)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with eval_mode(model):
        yield parameters


@contextlib.contextmanager
def engine(model: Any, **options: Any) -> Iterator[Run]:
    """GradientSpace."""
    with PerSampleGradients(model, self_check=False, **options) as per_sample:
        yield lambda batch: [per_sample.compute(batch)]


@contextlib.contextmanager
def floor(model: Any) -> Iterator[Run]:
    """A plain step: stock PEFT layers, our loss and head, summed gradients of the LoRA weights only."""
    head = Head(model.get_base_model(), GradientSink())

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        where = Supervision.from_labels(batch["labels"], "mean")
        losses = head.token_losses({"input_ids": batch["input_ids"]}, where)
        torch.autograd.grad((losses * where.weights).sum(), parameters)
        return []

    with only_lora_trains(model) as parameters:
        yield run


@contextlib.contextmanager
def floor_stock_loss(model: Any) -> Iterator[Run]:
    """A plain step with the model's own loss: logits at every position, mean over the batch's tokens."""

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        output = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        torch.autograd.grad(output.loss, parameters)
        return []

    with only_lora_trains(model) as parameters:
        yield run


@contextlib.contextmanager
def loop(model: Any) -> Iterator[Run]:
    """One sample at a time through stock layers, with the floor's loss and head: no padding at all."""
    head = Head(model.get_base_model(), GradientSink())

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        rows = []
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for ids, labels, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            where = Supervision.from_labels(labels[None, :n], "mean")
            losses = head.token_losses({"input_ids": ids[None, :n]}, where)
            gradients = torch.autograd.grad((losses * where.weights).sum(), parameters)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        return [torch.stack(rows)]

    with only_lora_trains(model) as parameters:
        yield run


@contextlib.contextmanager
def loop_stock_loss(model: Any) -> Iterator[Run]:
    """One sample at a time with the model's own loss, as it is usually written."""

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        rows = []
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for ids, labels, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            output = model(input_ids=ids[None, :n], labels=labels[None, :n], use_cache=False)
            gradients = torch.autograd.grad(output.loss, parameters)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        return [torch.stack(rows)]

    with only_lora_trains(model) as parameters:
        yield run


@contextlib.contextmanager
def vmap(model: Any) -> Iterator[Run]:
    """torch.func: vmap over grad of a functional call."""

    def loss(values: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(causal, (values, frozen), (), inputs).logits[0, :-1]
        tokens = F.cross_entropy(logits.float(), labels[1:].clamp(min=0), reduction="none")
        supervised = labels[1:] != -100
        return (tokens * supervised).sum() / supervised.sum()

    causal = model.get_base_model()
    named = dict(causal.named_parameters())
    values = {name: p.detach() for name, p in named.items() if ".lora_" in name}
    frozen = {name: p.detach() for name, p in named.items() if ".lora_" not in name}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        return list(per_sample(values, batch["input_ids"], batch["labels"]).values())

    with only_lora_trains(model):
        yield run


@contextlib.contextmanager
def opacus(model: Any) -> Iterator[Run]:
    """opacus' GradSampleModule on the LoRA linears, with the floor's loss and head."""
    from opacus import GradSampleModule

    head = Head(model.get_base_model(), GradientSink())
    with only_lora_trains(model) as parameters:
        wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
        wrapped.train()  # it records nothing in eval mode; there is no dropout here

        def run(batch: dict[str, Tensor]) -> list[Tensor]:
            where = Supervision.from_labels(batch["labels"], "mean")
            losses = head.token_losses({"input_ids": batch["input_ids"]}, where)
            (losses * where.weights).sum().backward()
            gradients = [p.grad_sample for p in parameters]
            for parameter in parameters:
                parameter.grad = parameter.grad_sample = None
            return gradients

        try:
            yield run
        finally:
            wrapped.remove_hooks()
            wrapped.eval()
            for parameter in parameters:
                for name in ("grad_sample", "_forward_counter"):
                    parameter.__dict__.pop(name, None)


@contextlib.contextmanager
def bergson(model: Any) -> Iterator[Run]:
    """bergson with projection off, gradients in memory per module, flags as its own set-up leaves them."""
    from bergson import GradientProcessor, IndexConfig
    from bergson.collector.collector import fwd_bwd_factory
    from bergson.collector.gradient_collectors import GradientCollector
    from datasets import Dataset

    names = {
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" in name
    }
    order = [name.removeprefix("base_model.") for name, _ in model.named_parameters() if ".lora_" in name]
    with tempfile.TemporaryDirectory() as folder, eval_mode(model):
        config = IndexConfig(run_path=folder, projection_dim=0, loss_reduction="mean")
        step = fwd_bwd_factory(config)
        collector = GradientCollector(
            model=model.base_model,
            data=Dataset.from_dict({"input_ids": [[0]]}),
            cfg=config,
            processor=GradientProcessor(projection_dim=0),
            target_modules=names,
            skip_index=True,
        )
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)

        def run(batch: dict[str, Tensor]) -> list[Tensor]:
            with collector.with_batch(batch["attention_mask"].bool()):
                step(model, batch["input_ids"], batch["labels"], {})
            gradients = [collector.mod_grads[name.removesuffix(".weight")] for name in order]
            collector.mod_grads.clear()
            return gradients

        yield run


ARMS: dict[str, Callable[[Any], contextlib.AbstractContextManager[Run]]] = {
    "engine": engine,
    "engine, padded": lambda model: engine(model, packing=False),
    "engine, general path": lambda model: engine(model, path="general"),
    "engine, packed": lambda model: engine(model, packing=True),
    "floor": floor,
    "floor, stock loss": floor_stock_loss,
    "loop of batch size one": loop,
    "loop of batch size one, stock loss": loop_stock_loss,
    "torch.func vmap": vmap,
    "opacus": opacus,
    "bergson": bergson,
}
