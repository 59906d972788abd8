"""Maps behind layers that a lane runs: they correct what the layer gave, and are fitted where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghoststream.errors import RequestError
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import BoundaryMap, Lane, ReplacedWeights, Skeleton
from ghoststream.testing.models import save_tiny
from tests.streaming.test_lanes import (
    FIRST,
    N_LAYERS,
    SECOND,
    Counted,
    LeastSquares,
    Watcher,
    _batches,
    _resident_inputs,
    _run,
)

pytestmark = pytest.mark.integration
DENSE = PruningPlan(N_LAYERS)


def test_a_map_behind_a_layer_is_fitted_on_what_the_layer_gives_in_the_repaired_stream(
    tmp_path: Path,
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    at_once, at_end = Watcher(4), Watcher(N_LAYERS)
    lane = Lane(
        "repaired",
        PruningPlan(N_LAYERS, (FIRST,)),
        {FIRST: LeastSquares("dense")},
        observers=(at_once, at_end),
        behind={3: LeastSquares("dense")},
    )
    _run(folder, [Lane("dense", DENSE), lane])

    dense, batch = _resident_inputs({}, ()), _batches()[0]
    first, second = LeastSquares(""), LeastSquares("")
    first.fit([(batch, dense[1], dense[2])])
    second.fit([(batch, _resident_inputs({2: first}, (1,))[4], dense[4])])
    wanted = _resident_inputs({2: first, 4: second}, (1,))
    # Shown once, behind the map.
    torch.testing.assert_close(torch.cat(at_once.seen), wanted[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(at_end.seen), wanted[N_LAYERS], rtol=1e-4, atol=1e-4)


def test_a_lane_carries_its_part_on_behind_its_last_map(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    plan, map_ = PruningPlan(N_LAYERS, (FIRST,)), Counted("dense")
    watcher = Watcher(N_LAYERS)
    lane = Lane("part", plan, observers=(watcher,), carried=(4, 6), behind={2: map_})
    _run(folder, [Lane("dense", DENSE), lane])
    assert (map_.fits, map_.calls) == (1, 1)
    assert [tuple(states.shape) for states in watcher.seen] == [(2, 20, 32)]


class ChangesWeight(BoundaryMap):
    """Changes a weight in place when it is fitted, as a refit of the layer's own does."""

    target = "dense"

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def fit(self, pairs: object) -> None:
        self.weight.mul_(0.5)


def test_a_lane_runs_a_layer_with_weights_that_another_lane_has_just_fitted_there(tmp_path: Path) -> None:
    """The lane before it stands behind the layer with the old weights; both have one way up to there."""
    folder = save_tiny("llama", tmp_path / "model")
    skeleton = Skeleton(folder)
    name = "model.layers.3.self_attn.o_proj.weight"
    weight = skeleton.reader.read(name, torch.float32)
    fixed = {name: 0.5 * weight}
    plan, shared = PruningPlan(N_LAYERS, (FIRST,)), Counted("dense")
    changed, given, other = Watcher(N_LAYERS), Watcher(N_LAYERS), Watcher(N_LAYERS)
    lanes = [
        Lane("dense", DENSE),
        Lane("before", plan, {FIRST: shared}, until=4, behind={3: ChangesWeight(weight)}),
        Lane(
            "changed",
            plan,
            {FIRST: shared},
            observers=(changed,),
            weights=ReplacedWeights(skeleton, {name: weight}),
        ),
        Lane("given", plan, {FIRST: shared}, observers=(given,), weights=ReplacedWeights(skeleton, fixed)),
        Lane("other", plan, {FIRST: shared}, observers=(other,)),
    ]
    _run(folder, lanes)
    assert shared.fits == 1
    assert torch.equal(torch.cat(changed.seen), torch.cat(given.seen))
    assert not torch.equal(torch.cat(changed.seen), torch.cat(other.seen))


@pytest.mark.parametrize("layer", [FIRST.start, SECOND.start - 1, N_LAYERS])
def test_a_map_behind_a_layer_that_is_removed_or_before_a_gap_is_refused(layer: int, tmp_path: Path) -> None:
    plan = PruningPlan(N_LAYERS, (FIRST, SECOND))
    lane = Lane("repaired", plan, behind={layer: LeastSquares("dense")})
    with pytest.raises(RequestError, match="that it runs and no gap follows"):
        _run(save_tiny("llama", tmp_path / "model"), [Lane("dense", DENSE), lane])


def test_a_map_behind_a_layer_is_fitted_to_a_lane_that_goes_before(tmp_path: Path) -> None:
    lane = Lane("repaired", PruningPlan(N_LAYERS, (Span(1, 2),)), behind={3: LeastSquares("dense")})
    with pytest.raises(RequestError, match="has to go before it"):
        _run(save_tiny("llama", tmp_path / "model"), [lane, Lane("dense", DENSE)])
