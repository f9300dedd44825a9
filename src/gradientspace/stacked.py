"""All experts' LoRA weights stacked, so that a batch in which every row names its own expert is one forward pass.

A LoRA layer adds `scaling * B_k A_k x` to its base layer's output. With the experts stacked, `A: (E, r, d_in)` and
`B: (E, r, d_out)`, a row's own product is picked out of the batch in one of two ways, both without a loop over experts:

- one token a row (decoding): `x` times the `A` of all experts present in the batch at once, the columns of other
  experts set to zero, times all `B`. Two small matrix products, and every weight is read once;
- many tokens a row (prompts): `A` and `B` are gathered by row and multiplied row by row, so that the work does not
  grow with the number of experts.

Rows of the base get zeros. PEFT loads the adapters and names their layers; a layer that cannot be stacked is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradientspace.errors import ModelError
from gradientspace.models import load_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BASE = -1
"""In place of an expert's number: the base model, all adapters off."""

_KEEPS_ROWS_WHEN_FLAT = ("OPTDecoderLayer",)
"""Blocks that hand their layers (b t, d), rows in order; elsewhere flat tokens mean that rows were mixed (MoE)."""


@dataclass
class Selection:
    """Which expert each row of the running batch uses: one object that all stacked layers of a model read."""

    present: tuple[int, ...] = ()
    """The experts that occur in the batch, ascending; empty where the whole batch is the base's."""
    place: torch.Tensor | None = None
    """(b,) each row's place in `present`, 0 for rows of the base."""
    own: torch.Tensor | None = None
    """(b, E') 1 where the expert is the row's own, else 0; `None` where all rows have the same expert."""
    in_use: torch.Tensor | None = None
    """(b, 1, 1) 0 for rows of the base, else 1; `None` where no row is the base's."""
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def mask(self, rank: int) -> torch.Tensor | None:
        """(b, E' rank) `own`, once for every column of an expert; `None` where there is nothing to mask."""
        if self.own is not None and rank not in self._masks:
            self._masks[rank] = self.own.repeat_interleave(rank, dim=1)
        return self._masks.get(rank)

    def set(self, rows: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        """`rows`: (b,) expert numbers, or `BASE`."""
        self.present = tuple(sorted({k for k in rows if k != BASE}))
        places = {k: i for i, k in enumerate(self.present)}
        self.place = torch.tensor([places.get(k, 0) for k in rows], device=device)
        mixed = len(set(rows)) > 1
        own = torch.tensor([[k == e for e in self.present] for k in rows], device=device)
        self.own = own.to(dtype) if mixed and self.present else None
        self._masks.clear()
        in_use = torch.tensor([k != BASE for k in rows], device=device)
        self.in_use = None if BASE not in rows else in_use.to(dtype)[:, None, None]


class StackedLayer(nn.Module):
    """A base layer plus the LoRA update of each row's expert.

    `A`: (E, r, d_in) and `B`: (E, r, d_out) with the scaling in it; zeros stand for an expert without an adapter at
    this layer and fill up lower ranks.
    """

    A: torch.Tensor
    B: torch.Tensor

    def __init__(
        self, name: str, base_layer: nn.Module, A: torch.Tensor, B: torch.Tensor, selection: Selection, flat: bool
    ) -> None:
        super().__init__()
        self.name, self.base_layer, self.selection, self.flat = name, base_layer, selection, flat
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self._present, self._A, self._B = tuple(range(len(A))), A, B

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (b, t, d_in) -> (b, t, d_out)."""
        result = self.base_layer(x, *args, **kwargs)
        selection = self.selection
        if not selection.present:
            return result
        if self._present != selection.present:
            self._cut(selection.present)
        assert selection.place is not None
        rows = x.unflatten(0, (len(selection.place), -1)) if x.dim() == 2 and self.flat else x
        if rows.dim() != 3 or rows.shape[0] != len(selection.place):
            raise ModelError(f"layer {self.name} gets tokens without their rows: a batch of experts cannot share it")
        rows = rows.to(self.A.dtype)
        if rows.shape[1] == 1:
            hidden, B = self._hidden_by_mask(rows[:, 0]), self._B.flatten(0, 1)
        else:
            hidden, B = self._hidden_by_row(rows)
        if result.dtype == B.dtype and hidden.dim() == 2:
            return torch.addmm(result.flatten(0, -2), hidden, B).view_as(result)
        return result + (hidden @ B).reshape(result.shape).to(result.dtype)

    def _cut(self, present: tuple[int, ...]) -> None:
        """Copy the weights of the experts present together, once for all steps of a batch."""
        all_present = len(present) == len(self.A)
        self._A, self._B = (self.A, self.B) if all_present else (self.A[list(present)], self.B[list(present)])
        self._present = present

    def _hidden_by_mask(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, d_in) -> (b, E' r), zero in the columns of other experts than the row's own."""
        hidden = nn.functional.linear(x, self._A.flatten(0, 1))
        mask = self.selection.mask(self.A.shape[1])
        return hidden if mask is None else hidden * mask

    def _hidden_by_row(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (b, t, d_in) -> (b, t, r) and the B to multiply it with, one for all rows or one a row."""
        if len(self._A) == 1:
            hidden, B = nn.functional.linear(x, self._A[0]), self._B[0]  # (b, t, r), (r, d_out)
        else:
            place = self.selection.place
            hidden, B = x @ self._A[place].mT, self._B[place]  # (b, t, r), (b, r, d_out)
        if self.selection.in_use is not None:
            hidden = hidden * self.selection.in_use
        return hidden, B


class StackedExperts:
    """A base model whose LoRA layers hold all experts.

    `folders`: name -> PEFT adapter folder; experts are numbered in that order. Inside `with experts.batch(rows):` the
    model runs row i with expert `rows[i]`. One batch at a time: callers on several threads must take turns. Raises
    `ModelError` naming the layer where an adapter is of a kind that cannot be stacked.
    """

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self.names = list(folders)
        self.model = base
        self._selection = Selection()
        peft_model = load_adapters(base, dict(folders))
        try:
            self._check_adapters(peft_model)
            self._layers = [
                (name, layer, _stack(name, layer, self.names, self._selection, _is_flat(base, name)))
                for name, layer in _lora_layers(peft_model).items()
            ]
        finally:
            peft_model.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config
        for name, _, stacked in self._layers:
            _replace(base, name, stacked)

    @contextlib.contextmanager
    def batch(self, rows: Sequence[int]) -> Iterator[PreTrainedModel]:
        """The model, row i of whose batch runs expert `rows[i]` (`BASE`: none)."""
        self.select(rows)
        try:
            yield self.model
        finally:
            self._selection.present = ()

    def select(self, rows: Sequence[int]) -> None:
        """Change the rows inside `batch`, for instance after some of them have finished."""
        unknown = [k for k in rows if k != BASE and not 0 <= k < len(self.names)]
        if unknown:
            raise ModelError(f"expert {unknown[0]} does not exist: there are 0 to {len(self.names) - 1}, and {BASE}")
        self._selection.set(rows, self.model.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self._layers[0][2].A.dtype

    def close(self) -> None:
        """Take the experts off the base again."""
        for name, _, stacked in self._layers:
            _replace(self.model, name, stacked.base_layer)
        self._layers = []

    def __enter__(self) -> StackedExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_adapters(self, peft_model: PeftModel) -> None:
        """What lies outside LoRA layers and would silently be lost."""
        for name in self.names:
            config: Any = peft_model.peft_config[name]
            if config.peft_type != "LORA":
                raise ModelError(f"adapter {name} is {config.peft_type}: only LoRA adapters can be stacked")
            for option in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"):
                if getattr(config, option, None):
                    raise ModelError(f"adapter {name} has {option}={getattr(config, option)}: it cannot be stacked")
            if config.bias != "none":
                raise ModelError(f"adapter {name} trains biases of the base (bias={config.bias}): it cannot be stacked")


def _lora_layers(peft_model: PeftModel) -> dict[str, Any]:
    """Name in the base model -> layer. Raises `ModelError` for one that is not plain LoRA on a linear layer."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        kind = type(module).__name__
        if type(module) is not Linear:
            raise ModelError(f"layer {name} is a {kind} of PEFT: only LoRA on linear layers can be stacked")
        if module.lora_variant:
            variant = type(next(iter(module.lora_variant.values()))).__name__
            raise ModelError(f"layer {name} is a LoRA variant ({variant}): only plain LoRA can be stacked")
        if any(B.bias is not None for B in module.lora_B.values()):
            raise ModelError(f"layer {name} has lora_bias: only LoRA without it can be stacked")
        layers[name] = module
    return layers


def _stack(name: str, layer: Any, names: Sequence[str], selection: Selection, flat: bool) -> StackedLayer:
    """`layer`, a LoRA layer of PEFT, with the adapters `names` in their order."""
    n, rank, example = len(names), max(layer.r.values()), next(iter(layer.lora_A.values())).weight
    A = torch.zeros(n, rank, layer.in_features, dtype=example.dtype, device=example.device)
    B = torch.zeros(n, rank, layer.out_features, dtype=example.dtype, device=example.device)
    for k, adapter in enumerate(names):
        if adapter in layer.lora_A:
            own_rank = layer.r[adapter]
            A[k, :own_rank] = layer.lora_A[adapter].weight.detach()
            B[k, :own_rank] = layer.lora_B[adapter].weight.detach().T * layer.scaling[adapter]
    # A masked product with another row's expert is 0 only where that expert is finite.
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ModelError(f"layer {name} has a non-finite LoRA weight: train that expert again")
    return StackedLayer(name, layer.get_base_layer(), A, B, selection, flat)


def _is_flat(base: nn.Module, name: str) -> bool:
    return type(base.get_submodule(name.rpartition(".")[0])).__name__ in _KEEPS_ROWS_WHEN_FLAT


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
