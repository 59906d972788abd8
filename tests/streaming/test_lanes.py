"""Lanes that end early, and lanes whose operators are fitted while the pass runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import RequestError
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import (
    Batch,
    BoundaryMap,
    Lane,
    ModuleMap,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.testing.models import save_tiny, tiny_model

pytestmark = pytest.mark.integration
N_LAYERS = 6
FIRST, SECOND = Span(1, 2), Span(3, 5)


class LeastSquares(BoundaryMap):
    """Fits ``x + x A`` to another lane when the pass reaches the boundary."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.matrix = torch.zeros(0)
        self.released = False

    def fit(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> None:
        seen = list(pairs)
        inputs = torch.cat([x.flatten(0, 1) for _, x, _ in seen]).double()
        targets = torch.cat([y.flatten(0, 1) for _, _, y in seen]).double()
        self.matrix = torch.linalg.lstsq(inputs, targets - inputs).solution.float()

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        return states + states @ self.matrix

    def release(self) -> None:
        self.released = True


class Counted(LeastSquares):
    """Knows how often it was fitted and applied."""

    fits = calls = 0

    def fit(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> None:
        self.fits += 1
        super().fit(pairs)

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().apply(states)


class Watcher:
    """Keeps the states of one position."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.seen: list[torch.Tensor] = []
        self.done: list[int] = []

    def wants(self, position: int) -> bool:
        self.done.append(position)
        return position == self.position

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        self.seen.append(states.clone())

    def finished(self, position: int) -> None:
        pass

    def failed(self) -> None:
        pass


def _batches() -> tuple[Batch, ...]:
    return make_batches(np.random.default_rng(0).integers(3, 128, size=(6, 20)), None, 4)


def _run(folder: Path, lanes: list[Lane], options: PassOptions | None = None) -> Skeleton:
    skeleton, batches = Skeleton(folder), _batches()
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, lanes, factory, options).run()
    assert not factory.live_bytes, "every place for states was given back"
    return skeleton


def _resident_inputs(edit: dict[int, LeastSquares], removed: tuple[int, ...]) -> list[torch.Tensor]:
    """What enters layers 0..L-1 and the norm of a resident model with removed layers and operators hooked
    in."""
    model = tiny_model("llama")
    seen: list[list[torch.Tensor]] = [[] for _ in range(N_LAYERS + 1)]
    for position, module in enumerate([*model.model.layers, model.model.norm]):
        if position in removed:
            module.forward = lambda states, *_a, **_k: states

        def hook(_module: object, args: tuple[torch.Tensor, ...], position: int = position) -> object:
            states = edit[position].apply(args[0]) if position in edit else args[0]
            seen[position].append(states.clone())
            return (states, *args[1:])

        module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        for batch in _batches():
            model(input_ids=batch.ids, use_cache=False)
    return [torch.cat(parts) for parts in seen]


def test_operators_are_fitted_on_the_stream_repaired_so_far(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    plan = PruningPlan(N_LAYERS, (FIRST, SECOND))
    maps = {FIRST: LeastSquares("dense"), SECOND: LeastSquares("dense")}
    watcher = Watcher(N_LAYERS)
    _run(folder, [Lane("dense", PruningPlan(N_LAYERS)), Lane("repaired", plan, maps, observers=(watcher,))])

    assert all(fitted.released for fitted in maps.values())
    dense = _resident_inputs({}, ())
    first, second = LeastSquares(""), LeastSquares("")
    batch = _batches()[0]
    first.fit([(batch, dense[1], dense[2])])
    half = _resident_inputs({2: first}, (1,))
    second.fit([(batch, half[3], dense[5])])
    repaired = _resident_inputs({2: first, 5: second}, (1, 3, 4))
    torch.testing.assert_close(torch.cat(watcher.seen), repaired[N_LAYERS], rtol=1e-4, atol=1e-4)


def test_a_lane_ends_where_it_is_told(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    short, long = Watcher(3), Watcher(6)
    dense = PruningPlan(N_LAYERS)
    skeleton = _run(
        folder, [Lane("short", dense, observers=(short,), until=3), Lane("x", dense, observers=(long,))]
    )
    assert max(short.done) == 3
    assert torch.equal(torch.cat(short.seen), _resident_inputs({}, ())[3])
    assert len(long.seen) == len(_batches())
    whole = skeleton.reader.bytes_read
    skeleton = _run(folder, [Lane("short", dense, observers=(Watcher(3),), until=3)])
    assert whole - skeleton.reader.bytes_read == sum(skeleton.layer_bytes(layer) for layer in (3, 4, 5))


@pytest.mark.parametrize("target", ["nobody", "cut"])
def test_a_map_fitted_to_a_lane_without_states_there_is_refused(target: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    lanes = [
        Lane("cut", PruningPlan(N_LAYERS, (Span(4, 6),))),
        Lane("repaired", PruningPlan(N_LAYERS, (SECOND,)), {SECOND: LeastSquares(target)}),
    ]
    with pytest.raises(RequestError, match=f"to lane '{target}'"):
        _run(folder, lanes)


def test_a_lane_carries_a_part_of_the_sequences_on(tmp_path: Path) -> None:
    """Fitted on all sequences, carried on with the last two: their states are those of a lane that carries
    all."""
    folder = save_tiny("llama", tmp_path / "model")
    plan = PruningPlan(N_LAYERS, (SECOND,))
    whole, part = Watcher(N_LAYERS), Watcher(N_LAYERS)
    fits = {"whole": LeastSquares("dense"), "part": LeastSquares("dense")}
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS)),
        Lane("whole", plan, {SECOND: fits["whole"]}, observers=(whole,)),
        Lane("part", plan, {SECOND: fits["part"]}, observers=(part,), carried=(4, 6)),
    ]
    _run(folder, lanes)
    assert torch.equal(fits["part"].matrix, fits["whole"].matrix)
    assert [tuple(states.shape) for states in part.seen] == [(2, 20, 32)]
    assert torch.equal(part.seen[0], whole.seen[1])


def test_lanes_that_share_a_map_go_together_until_they_part(tmp_path: Path) -> None:
    """The map is fitted and applied once, and each lane ends with the states that it has alone."""
    folder = save_tiny("llama", tmp_path / "model")
    one, two = PruningPlan(N_LAYERS, (FIRST,)), PruningPlan(N_LAYERS, (FIRST, SECOND))
    alone = [Watcher(N_LAYERS), Watcher(N_LAYERS)]
    for plan, watcher in zip((one, two), alone, strict=True):
        maps = {span: LeastSquares("dense") for span in plan.spans}
        _run(folder, [Lane("dense", PruningPlan(N_LAYERS)), Lane("alone", plan, maps, observers=(watcher,))])
    shared, together = Counted("dense"), [Watcher(N_LAYERS), Watcher(N_LAYERS)]
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS)),
        Lane("one", one, {FIRST: shared}, observers=(together[0],), carried=(4, 6)),
        Lane("two", two, {FIRST: shared, SECOND: LeastSquares("dense")}, observers=(together[1],)),
    ]
    _run(folder, lanes)
    assert (shared.fits, shared.calls) == (1, len(_batches()))
    assert [tuple(states.shape) for states in together[0].seen] == [(2, 20, 32)]
    assert torch.equal(together[0].seen[0], alone[0].seen[1])
    assert torch.equal(torch.cat(together[1].seen), torch.cat(alone[1].seen))


class Logits:
    """Counts the tokens whose logits it sees."""

    def __init__(self) -> None:
        self.tokens = 0

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        self.tokens += logits.shape[0]


class Told(SilentProgress):
    """Counts what each task said to be its whole, and what it told of."""

    def __init__(self) -> None:
        self.wholes: list[tuple[str, int]] = []
        self.done: list[int] = []

    def start(self, task: str, total: int, unit: str) -> None:
        self.wholes.append((task, total))
        self.done.append(0)

    def advance(self, amount: int) -> None:
        self.done[-1] += amount


def test_the_head_tells_of_every_sequence_of_every_lane_that_asks_for_logits(tmp_path: Path) -> None:
    """Over many lanes it is the longest part of a pass over a small model: as one more layer it would seem to
    hang."""
    folder, told = save_tiny("llama", tmp_path / "model"), Told()
    whole, part, plan = Logits(), Logits(), PruningPlan(N_LAYERS, (SECOND,))
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS), logits=whole),
        Lane("part", plan, {SECOND: LeastSquares("dense")}, logits=part, carried=(4, 6)),
        Lane("silent", plan, {SECOND: LeastSquares("dense")}),
    ]
    _run(folder, lanes, PassOptions(progress=told))
    assert told.wholes == [("streaming layers", N_LAYERS), ("output head of 2 lanes", 6 + 2)]
    assert told.done == [N_LAYERS, 6 + 2]
    assert (whole.tokens, part.tokens) == (6 * 20, 2 * 20)


@pytest.mark.parametrize("carried", [(3, 6), (4, 4), (4, 7)])
def test_a_part_that_is_not_whole_batches_is_refused(carried: tuple[int, int], tmp_path: Path) -> None:
    lane = Lane("part", PruningPlan(N_LAYERS, (SECOND,)), carried=carried)
    with pytest.raises(RequestError, match="not whole micro-batches"):
        _run(save_tiny("llama", tmp_path / "model"), [lane])


def test_a_target_that_carries_other_sequences_on_is_refused(tmp_path: Path) -> None:
    plan = PruningPlan(N_LAYERS, (SECOND,))
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS), carried=(0, 4)),
        Lane("part", plan, {SECOND: LeastSquares("dense")}, carried=(4, 6)),
    ]
    with pytest.raises(RequestError, match="carries other sequences on"):
        _run(save_tiny("llama", tmp_path / "model"), lanes)


class FromMlp(BoundaryMap):
    """Adds a linear map of the activations that enter ``down_proj`` of the layer before the boundary."""

    taps = ("mlp_intermediate",)

    def __init__(self) -> None:
        self.matrix = torch.from_numpy(np.random.default_rng(3).normal(size=(64, 32), scale=0.1)).float()

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return states + taps["mlp_intermediate"] @ self.matrix


def test_a_map_of_the_mlp_before_the_boundary_is_a_change_of_its_down_proj(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tapped, at_start, at_end = FromMlp(), Watcher(SECOND.start), Watcher(N_LAYERS)
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS), observers=(plain := Watcher(N_LAYERS),)),
        Lane("absorbed", PruningPlan(N_LAYERS, (SECOND,)), {SECOND: tapped}, observers=(at_start, at_end)),
    ]
    _run(folder, lanes)
    # Before the span the lane is the dense model.
    assert torch.equal(torch.cat(at_start.seen), _resident_inputs({}, ())[SECOND.start])
    assert torch.equal(torch.cat(plain.seen), _resident_inputs({}, ())[N_LAYERS])
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[SECOND.start - 1].mlp.down_proj.weight += tapped.matrix.T
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if index not in SECOND
    )
    expected: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: expected.append(args[0].clone()))
    with torch.inference_mode():
        for batch in _batches():
            model(input_ids=batch.ids, use_cache=False)
    torch.testing.assert_close(torch.cat(at_end.seen), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_map_of_a_layer_that_the_pass_does_not_run_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    lane = Lane("absorbed", PruningPlan(N_LAYERS, (Span(0, 1),)), {Span(0, 1): FromMlp()})
    with pytest.raises(RequestError, match="which this pass does not run"):
        _run(folder, [lane])


class FittedFromMlp(LeastSquares):
    """Fits what is kept of states and taps to another lane; knows what it was given."""

    taps = ("mlp_intermediate", "mlp_output")
    width = 32 + 64

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert set(taps) == set(self.taps)
        return torch.cat([states, taps["mlp_intermediate"]], dim=-1)

    def fit(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> None:
        self.shapes = [(tuple(x.shape), tuple(y.shape)) for _, x, y in pairs]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        return states[..., :32] + 0.5 * states[..., 32:64]


def test_what_a_map_keeps_of_its_taps_is_what_it_is_fitted_on_and_applied_to(tmp_path: Path) -> None:
    """At the stop of the span the kept inputs are there, wider than a state; behind it the lane carries
    states again."""
    fitted, kept, at_stop = FittedFromMlp("dense"), FromMlp(), Watcher(SECOND.stop)
    kept.matrix = torch.zeros(64, 32)
    kept.matrix[range(32), range(32)] = 0.5
    reference = Watcher(SECOND.stop)
    plan = PruningPlan(N_LAYERS, (SECOND,))
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS)),
        Lane("fitted", plan, {SECOND: fitted}, observers=(at_stop,), carried=(4, 6)),
        Lane("kept", plan, {SECOND: kept}, observers=(reference,)),
    ]
    _run(save_tiny("llama", tmp_path / "model"), lanes)
    assert fitted.shapes == [((4, 20, 96), (4, 20, 32)), ((2, 20, 96), (2, 20, 32))]
    assert fitted.released
    torch.testing.assert_close(at_stop.seen[0], reference.seen[1])


def test_a_map_of_the_base_class_cuts_and_modules_and_functions_can_be_maps(tmp_path: Path) -> None:
    plan = PruningPlan(N_LAYERS, (FIRST, SECOND))
    linear = torch.nn.Linear(32, 32).requires_grad_(requires_grad=False)
    variants: dict[str, dict[Span, BoundaryMap]] = {
        "cut": {},
        "base": {span: BoundaryMap() for span in plan.spans},
        "module": {span: ModuleMap(linear) for span in plan.spans},
        "function": {span: ModuleMap(lambda states: linear(states)) for span in plan.spans},
    }
    seen = {name: Watcher(N_LAYERS) for name in variants}
    lanes = [Lane(name, plan, maps, observers=(seen[name],)) for name, maps in variants.items()]
    _run(save_tiny("llama", tmp_path / "model"), lanes)
    states = {name: torch.cat(watcher.seen) for name, watcher in seen.items()}
    assert torch.equal(states["base"], states["cut"])
    assert torch.equal(states["cut"], _resident_inputs({}, (1, 3, 4))[N_LAYERS])
    assert torch.equal(states["function"], states["module"])
    assert not torch.equal(states["module"], states["cut"])


def test_a_map_of_another_kind_is_refused(tmp_path: Path) -> None:
    maps: dict[Span, Any] = {SECOND: torch.nn.Identity()}
    lane = Lane("own", PruningPlan(N_LAYERS, (SECOND,)), maps)
    with pytest.raises(
        RequestError, match=r"map at \[3,5\) of lane own is a Identity and no BoundaryMap; wrap"
    ):
        _run(save_tiny("llama", tmp_path / "model"), [lane])


def test_the_map_of_the_guide_corrects_the_mean_of_every_channel(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "class Shift" in block
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    at_stop, dense = Watcher(SECOND.stop), Watcher(SECOND.stop)
    lanes = [
        Lane("dense", PruningPlan(N_LAYERS), observers=(dense,)),
        Lane("own", PruningPlan(N_LAYERS, (SECOND,)), {SECOND: names["Shift"]()}, observers=(at_stop,)),
    ]
    _run(save_tiny("llama", tmp_path / "model"), lanes)
    means = [torch.cat(watcher.seen).double().mean((0, 1)) for watcher in (at_stop, dense)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-6)
