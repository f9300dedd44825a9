"""Leaving out the prompt's logits changes neither the training loss nor its gradient, whatever the architecture."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from test_gradients import make_samples, padded
from test_gradients_models import MODELS, tiny
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from gradientspace import completion_loss
from gradientspace.completion_loss import CompletionTrainer, parts
from gradientspace.memory import repeated_size

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def trainers(model: Any, folder) -> tuple[CompletionTrainer, Trainer]:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    ours = CompletionTrainer(model=model, args=arguments, checkpoint_seconds=math.inf, made_from="")
    return ours, Trainer(model=model, args=arguments)


def loss_and_gradient(
    trainer: Trainer, batch: dict[str, torch.Tensor], n: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    trainer.model.zero_grad()
    loss: Any = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=n)
    loss.backward()
    parts = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(parts)


@pytest.mark.parametrize("n", [None, 50], ids=["batch mean", "share of a step"])
@pytest.mark.parametrize("name", [*MODELS, "adapted lm_head"])
def test_loss_and_gradient_are_those_of_all_logits(name: str, n: int | None, tmp_path) -> None:
    model = tiny("llama", target_modules=["q_proj", "lm_head"]) if name == "adapted lm_head" else tiny(name)
    batch = padded(make_samples(8))
    model.eval()  # GPT-2 has dropout of its own
    ours, plain = trainers(model, tmp_path)
    expected = loss_and_gradient(plain, batch, n)
    found = loss_and_gradient(ours, batch, n)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


@pytest.mark.parametrize("max_tokens", [1, 24, 40, 10**6])
def test_parts_of_a_batch_hold_its_rows_once_with_less_padding(max_tokens: int) -> None:
    batch = padded(make_samples(8))
    found = parts(batch, max_tokens)
    assert (len(found) == 1) == (max_tokens >= batch["input_ids"].numel())
    rows = [
        (tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist()))
        for part in [batch, *found]
        for ids, mask, labels in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True)
    ]
    assert sorted(rows[:8]) == sorted(rows[8:])
    for part in found:
        assert len(part["input_ids"]) == 1 or part["input_ids"].numel() <= max(max_tokens, 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_parts_is_a_step_of_the_whole_batch(name: str, tmp_path) -> None:
    model = tiny(name)
    batch = padded(make_samples(8))
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    ours, _ = trainers(model, tmp_path)
    ours.create_optimizer()
    switch_off_dropout(model)
    found = []
    for max_tokens in (10**6, 30):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(completion_loss, "parts", partial(parts, max_tokens=max_tokens))
            loss = ours.training_step(model, dict(batch), supervised)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (whole, expected), (in_parts, gradient) = found
    torch.testing.assert_close(in_parts, whole, rtol=1e-5, atol=1e-6)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def switch_off_dropout(model: torch.nn.Module) -> None:
    """`training_step` puts the model into training mode, where GPT-2 and OPT have dropout of their own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def test_only_supervised_positions_pass_lm_head(tmp_path) -> None:
    model = tiny("llama")
    batch = padded(make_samples(8))
    ours, plain = trainers(model, tmp_path)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    head = model.get_base_model().lm_head
    seen: list[int] = []
    original = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        if weight is head.weight:
            seen.append(x.shape[:-1].numel())
        return original(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        loss_and_gradient(ours, batch, None)
        loss_and_gradient(plain, batch, None)
    assert seen == [repeated_size(supervised), batch["labels"].numel()]
    assert "forward" not in vars(head)


def test_dropout_is_drawn_as_ever(tmp_path) -> None:
    """Looking at the head at the start must not use up random numbers: a seed's adapter would be another."""
    model = tiny("llama", lora_dropout=0.5).train()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", seed=3)
    batch = padded(make_samples(8))
    plain = Trainer(model=model, args=arguments)  # the Trainer sets the seed
    expected = loss_and_gradient(plain, batch, None)
    ours = CompletionTrainer(model=model, args=arguments, checkpoint_seconds=math.inf, made_from="")
    found = loss_and_gradient(ours, batch, None)
    assert model.training
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


class Turned(LlamaForCausalLM):
    """Its logits are not those of lm_head, position by position."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        kwargs.pop("num_items_in_batch", None)
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(1)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def test_a_model_that_turns_its_logits_round_gets_all_of_them(tmp_path) -> None:
    model = tiny("llama")
    model.get_base_model().__class__ = Turned
    ours, plain = trainers(model, tmp_path)
    assert ours.lm_head is None
    batch = padded(make_samples(8))
    expected, found = (loss_and_gradient(trainer, batch, None) for trainer in (plain, ours))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
