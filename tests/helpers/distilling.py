"""A small distillation, and the whole of it with a resident model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import build_ghost
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import tiny_model

S, T, C, WIDE, L, HELD, TOP, RATE, SIZE = 8, 12, 32, 64, 6, 2, 10, 0.03, 0.03
SPANS = (Span(1, 2), Span(3, 5))
Array = npt.NDArray[np.float64]
Forms = tuple[tuple[str, str, bool], ...]
FORMS: Forms = (("linear", "hidden", False), ("linear", "hidden+normed", True))


def repeated_ids() -> npt.NDArray[np.int64]:
    """Random ids; of these nothing is learned for others: the held-out windows are two of the rest."""
    found = np.random.default_rng(3).integers(3, 128, size=(S, T))
    found[-HELD:] = found[:HELD]
    return found


def saved_ids(ids: npt.NDArray[np.int64], folder: Path) -> str:
    """Save ids; return the specification of that text."""
    np.save(folder / "ids.npy", ids)
    return f"ids:{folder / 'ids.npy'}"


def make_operators(folder: Path, forms: Forms = FORMS) -> OperatorSet:
    random = np.random.default_rng(5)
    boundaries = []
    for span, (form, features, bias) in zip(SPANS, forms, strict=True):
        width = {"hidden+normed": 2 * C, "mlp": WIDE, "hidden+mlp": C + WIDE}.get(features, C)
        shape = {"linear": (C, width), "diagonal": (C,)}.get(form)
        boundaries.append(
            BoundaryOperator(
                span,
                form,  # type: ignore[arg-type]  # one of the forms
                features,
                None if shape is None else (SIZE * random.standard_normal(shape)).astype(np.float32),
                (SIZE * random.standard_normal(C)).astype(np.float32) if bias else None,
                {"relative_residual": 0.5, "warnings": ["of the fit"]},
                norm_epsilon=1e-6 if "normed" in features else None,
            )
        )
    base = ModelSession(folder).fingerprint
    return OperatorSet(
        PruningPlan(L, SPANS), "random", tuple(boundaries), C, {"base": base, "recipe": {"by": "hand"}}
    )


class Resident:
    """The whole of it with a resident model, one forward for all sequences, and torch's own divergence."""

    def __init__(self, ids: npt.NDArray[np.int64], operators: OperatorSet) -> None:
        self._ids = torch.from_numpy(ids)
        with torch.no_grad():
            logits = tiny_model("llama")(input_ids=self._ids, use_cache=False).logits
        self._values, self._entries = logits.topk(TOP, dim=-1)
        self._model = tiny_model("llama").requires_grad_(requires_grad=False)
        self.parameters: dict[str, nn.Parameter] = {}
        self._seen: dict[Span, tuple[torch.Tensor, torch.Tensor | None]] = {}
        stages = [*self._model.model.layers, self._model.model.norm]
        for span in operators.plan.spans:
            for layer in range(span.start, span.stop):
                stages[layer].forward = lambda states, *_a, **_k: states

        for one in operators.operators:
            if one.features in ("mlp", "hidden+mlp"):
                self._read_layer_before(one, stages)
            else:
                self._insert_module(one, stages)

    def _insert_module(self, one: BoundaryOperator, stages: Any) -> None:
        module = _with_memory_of_its_own(build_ghost(one, dtype=torch.float32))
        self.parameters |= {f"{one.span}.{name}": value for name, value in module.named_parameters()}

        def insert(_: object, args: Any) -> Any:
            self._seen[one.span] = (args[0].detach(), None)
            return (module(args[0]), *args[1:])

        stages[one.span.stop].register_forward_pre_hook(insert)

    def _read_layer_before(self, one: BoundaryOperator, stages: Any) -> None:
        """``y = x + x A + a B + c`` as two matrices, at what the layer before the span returns."""
        before, seen = stages[one.span.start - 1], []
        own, wide = np.split(np.array(one.weight), [np.array(one.weight).shape[1] - WIDE], axis=1)
        values = {"own": own, "wide": wide, **({} if one.bias is None else {"bias": one.bias})}
        parts = {name: nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()}
        self.parameters |= {f"{one.span}.{name}": value for name, value in parts.items() if value.numel()}
        before.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def repair(_: object, _args: Any, x: torch.Tensor) -> torch.Tensor:
            entered = seen.pop()
            self._seen[one.span] = (x.detach(), entered.detach())
            change = entered @ parts["wide"].T + parts.get("bias", torch.zeros(C))
            repaired: torch.Tensor = x + change
            return repaired + x @ parts["own"].T if parts["own"].numel() else repaired

        before.register_forward_hook(repair)

    def train_norms(self) -> None:
        layers = [(number, self._model.model.layers[number]) for number in (2, 5)]
        norms = {
            f"model.layers.{number}.{name}": value
            for number, layer in layers
            for name, value in layer.named_parameters()
            if "norm" in name
        }
        self.parameters |= {"model.norm.weight": self._model.model.norm.weight, **norms}
        for value in self.parameters.values():
            value.requires_grad_()

    def read(self, one: BoundaryOperator, rows: slice) -> tuple[Array, Array | None]:
        """The state before a span, and what enters ``down_proj`` there, a token a row."""
        with torch.no_grad():
            self._model(input_ids=self._ids[rows], use_cache=False)
        found = [
            None if value is None else value.flatten(0, 1).double().numpy() for value in self._seen[one.span]
        ]
        assert found[0] is not None
        return found[0], found[1]

    def gradients(self, one: BoundaryOperator) -> dict[str, Array]:
        """The gradients of an operator's weight and bias."""
        own = {name: value.grad for name, value in self.parameters.items() if str(one.span) in name}
        return as_operator({name: value.double() for name, value in own.items() if value is not None}, one)

    def move(
        self,
        start: OperatorSet,
        lengths: Mapping[Span, float],
        directions: Mapping[Span, Mapping[str, Array]],
    ) -> None:
        """Put operators in place that have gone so far along their directions."""
        for one in start.operators:
            own = {name: value for name, value in self.parameters.items() if str(one.span) in name}
            for array, direction in directions[one.span].items():
                whole = torch.from_numpy(getattr(one, array) + lengths[one.span] * direction)
                parts = [
                    value
                    for name, value in own.items()
                    if (name.rpartition(".")[2] == "bias") == (array == "bias")
                ]
                widths = [value.shape[-1] for value in parts]
                for value, piece in zip(parts, whole.split(widths, dim=-1), strict=True):
                    value.data.copy_(piece)

    def figures(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and next-token loss."""
        result = self._model(input_ids=self._ids[rows], labels=self._ids[rows], use_cache=False)
        ours = result.logits.gather(-1, self._entries[rows]).log_softmax(-1).flatten(0, 1)
        theirs = self._values[rows].softmax(-1).flatten(0, 1)
        return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean"), result.loss

    def train(self, rows: slice, steps: int) -> list[float]:
        groups = [
            {"params": [one], "lr": RATE * float(one.detach().square().mean().sqrt())}
            for one in self.parameters.values()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss, _ = self.figures(rows)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses


def _with_memory_of_its_own(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_()
    return module


def as_operator(parameters: Any, one: BoundaryOperator) -> dict[str, Any]:
    """The weight and the bias of an operator, whose weight may be trained in two parts."""
    own = {name.rpartition(".")[2]: value for name, value in parameters.items() if str(one.span) in name}
    found = {name: value.detach().numpy() for name, value in own.items()}
    weights = [found[name] for name in ("own", "wide", "weight") if name in found]
    bias = {"bias": found["bias"]} if "bias" in found else {}
    return {"weight": np.concatenate(weights, axis=-1), **bias}
