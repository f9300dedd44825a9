"""An expert's training is what users of `Trainer` and PEFT know: the same losses and weights as a plain script's."""

from __future__ import annotations

from pathlib import Path

import torch
from micro_training import LORA, TRAINING, Micro
from safetensors.torch import load_file


def plain_script(folder: Path, rows: list[tuple[list[int], list[int]]], start: Path, scratch: Path, seed: int):
    """Nothing of ours: a base, an adapter that goes on from `start`, and transformers' Trainer on (ids, labels)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(str(folder))
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True)

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)

        def pad(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])

        ids, labels = pad("input_ids", 0), pad("labels", -100)
        lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) < lengths).long()}

    arguments = TrainingArguments(
        output_dir=str(scratch),
        seed=seed,
        use_cpu=True,
        num_train_epochs=10,
        per_device_train_batch_size=TRAINING.per_device_train_batch_size,
        learning_rate=TRAINING.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=TRAINING.warmup_ratio,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    dataset = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)  # type: ignore[arg-type]
    trainer.train()
    losses = [(h["step"], round(h["loss"], 5)) for h in trainer.state.log_history if "loss" in h]
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_the_loss_curve_equals_that_of_plain_trainer_and_peft(micro_model: Path, tmp_path: Path, capsys) -> None:
    micro = Micro(micro_model)
    micro.train(tmp_path / "start")
    ours = micro.train(tmp_path / "expert", start=tmp_path / "start", epochs=10, seed=3)
    rows = [(s.input_ids, s.labels) for s in micro.samples]
    losses, weights = plain_script(micro_model, rows, tmp_path / "start", tmp_path / "scratch", seed=3)
    assert [(entry["step"], entry["loss"]) for entry in ours.losses] == losses
    assert len(losses) == 6
    assert losses[-1][1] < losses[0][1]
    saved = load_file(tmp_path / "expert/adapter_model.safetensors")
    assert len(saved) == len(weights) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    for name, parameter in weights.items():
        assert torch.equal(saved[name.replace(".default", "")], parameter), name
    assert LORA.lora_dropout == 0.0
    capsys.readouterr()


def test_the_reference_is_not_blind(micro_model: Path, tmp_path: Path, capsys) -> None:
    """Another seed draws other batches: the curves differ."""
    micro = Micro(micro_model)
    micro.train(tmp_path / "start")
    ours = micro.train(tmp_path / "expert", start=tmp_path / "start", epochs=10, seed=4)
    rows = [(s.input_ids, s.labels) for s in micro.samples]
    losses, _ = plain_script(micro_model, rows, tmp_path / "start", tmp_path / "scratch", seed=3)
    assert [(entry["step"], entry["loss"]) for entry in ours.losses] != losses
    capsys.readouterr()
