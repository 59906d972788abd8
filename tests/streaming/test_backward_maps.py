"""Gradients of maps at boundaries, and of weights that a lane has of its own, against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ghoststream.recovery.modeling_ghosted import GhostOperator
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import (
    BoundaryMap,
    Lane,
    ReplacedWeights,
    Skeleton,
)
from ghoststream.testing.models import tiny_model
from tests.helpers.backward import (
    C,
    Collected,
    L,
    close,
    make_maps,
    mapped,
    resident_loss,
    streamed,
)

pytestmark = pytest.mark.integration


class Tapped(BoundaryMap):
    """``y = (x + a A) (I + N)``: the tap ``a`` is read when it is entered, ``N`` acts when it is applied."""

    taps = ("mlp_intermediate",)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.early = nn.Parameter(torch.randn((C, 2 * C), generator=generator) * 0.05)
        self.late = nn.Parameter(torch.randn((C, C), generator=generator) * 0.05)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return states + taps["mlp_intermediate"] @ self.early.T

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        return states + states @ self.late.T

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.early, self.late


def repaired_resident(plan: PruningPlan, maps: dict[Span, GhostOperator]) -> Any:
    """A resident Llama without the layers of a plan, whose operators act in front of the layers behind."""
    model = tiny_model("llama").requires_grad_(requires_grad=False)
    stages = [*model.model.layers, model.model.norm]
    for span in plan.spans:
        for layer in range(span.start, span.stop):
            stages[layer].forward = lambda states, *_a, **_k: states
        if span in maps:

            def hook(_: object, args: Any, span: Span = span) -> Any:
                return (maps[span](args[0]), *args[1:])

            stages[span.stop].register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("spans", [((1, 2), (3, 5)), ((0, 2), (4, 6)), ((2, 4),)])
def test_operator_gradients_are_those_of_the_resident_model(
    spans: tuple[tuple[int, int], ...],
    tiny_llama: Path,
) -> None:
    plan = PruningPlan(L, tuple(Span(*span) for span in spans))
    maps, same = make_maps(plan), make_maps(plan)
    loss = resident_loss(repaired_resident(plan, same))
    loss.backward()
    value = streamed(tiny_llama, lane=Lane("repaired", plan, mapped(maps)))
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for span in plan.spans:
        for found, expected in zip(maps[span].parameters(), same[span].parameters(), strict=True):
            assert found.grad is not None
            assert expected.grad is not None
            assert float(expected.grad.abs().max()) > 1e-4
            close(found.grad, expected.grad)


def test_gradients_of_maps_that_read_the_layer_before_are_those_of_the_resident_model(
    tiny_llama: Path,
) -> None:
    plan = PruningPlan(L, (Span(1, 2), Span(3, 5)))
    maps, same = ({span: Tapped(span.start) for span in plan.spans} for _ in range(2))
    model = repaired_resident(plan, {})
    for span, tapped in same.items():
        seen: list[torch.Tensor] = []
        before = model.model.layers[span.start - 1]
        before.mlp.down_proj.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))

        def repair(_: object, _args: Any, states: Any, tapped: Any = tapped, seen: Any = seen) -> Any:
            return tapped.apply(tapped.enter(states, {"mlp_intermediate": seen.pop()}))

        before.register_forward_hook(repair)
    # The weights of the layer that a map reads and of those below, and the final norm's, in one go.
    of_layer = ("input_layernorm.weight", "mlp.up_proj.weight")
    wanted = Collected(lambda layer, name: layer == L or (layer == 2 and name in of_layer))
    norms = {f"{L}.weight": model.model.norm.weight}
    norms |= {f"2.{name}": model.model.layers[2].get_parameter(name) for name in of_layer}
    for weight in norms.values():
        weight.requires_grad_()
    loss = resident_loss(model)
    loss.backward()
    value = streamed(tiny_llama, lane=Lane("repaired", plan, maps), gradients=wanted)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for span in plan.spans:
        for found, expected in zip(maps[span].parameters(), same[span].parameters(), strict=True):
            assert found.grad is not None
            assert expected.grad is not None
            assert float(expected.grad.abs().max()) > 1e-4
            close(found.grad, expected.grad)
    assert set(wanted.gradients) == set(norms)
    for name, weight in norms.items():
        assert weight.grad is not None
        close(wanted.gradients[name], weight.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_at_replaced_weights_are_those_of_a_model_that_has_them(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    model = tiny_model(family).requires_grad_(requires_grad=True)
    skeleton = Skeleton(tiny_checkpoint(family))
    layers, norm = skeleton.architecture.layers_path, skeleton.architecture.final_norm_path
    names = [name for name, _ in model.named_parameters() if name.startswith((f"{layers}.2.", f"{norm}."))]
    generator = torch.Generator().manual_seed(1)
    replaced = {}
    for name in names:
        weight = model.get_parameter(name)
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        replaced[skeleton.keys.names[name]] = weight.detach()
    loss = resident_loss(model)
    loss.backward()
    collected = Collected(lambda layer, _name: layer in (1, 2, L))
    weights = ReplacedWeights(skeleton, replaced)
    lane = Lane("replaced", PruningPlan(L), weights=weights)
    value = streamed(tiny_checkpoint(family), lane=lane, gradients=collected)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for name in names:
        owner = (
            f"{L}.{name.removeprefix(f'{norm}.')}"
            if name.startswith(norm)
            else name.removeprefix(f"{layers}.")
        )
        expected = model.get_parameter(name).grad
        assert expected is not None
        close(collected.gradients[owner], expected)


def test_a_span_without_a_map_is_cut_on_the_way_back_too(tiny_llama: Path) -> None:
    plan = PruningPlan(L, (Span(1, 2), Span(4, 5)))
    maps, same = ({span: made for span, made in make_maps(plan).items() if span.start == 1} for _ in range(2))
    resident_loss(repaired_resident(plan, same)).backward()
    streamed(tiny_llama, lane=Lane("repaired", plan, mapped(maps)))
    for found, expected in zip(maps[Span(1, 2)].parameters(), same[Span(1, 2)].parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        close(found.grad, expected.grad)
