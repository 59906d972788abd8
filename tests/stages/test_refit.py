"""Layers behind gaps that are fitted anew, against a resident model and normal equations in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Method, Recovery, Text
from ghoststream.progress import SilentProgress
from ghoststream.recovery import build_ghost
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.refitting import refitted_layers
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.statistics import Ranges
from ghoststream.testing.models import save_tiny, tiny_model
from tests.helpers.requests import fit
from tests.helpers.searching import HELD, MICRO_BATCH, L, S, T, open_model, save_windows

pytestmark = pytest.mark.integration
Rows = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("refit") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ids:{save_windows(tmp_path_factory.mktemp('ids')) / 'all.npy'}"


def fitted(model: Path, text: str, plan: str, out: Path, **options: Any) -> OperatorSet:
    asked = {"sequences": S, "length": T, "micro_batch": 2, "operator": "ghost", **options}
    return fit(plan, model=model, calibration=text, out=out, **asked)


def weight_of(operators: OperatorSet) -> npt.NDArray[np.float32]:
    weight = operators.boundaries[0].weight
    assert weight is not None
    return weight


class Resident:
    """A tiny model whose inner activations are kept while it runs over the whole text."""

    def __init__(self, model_type: str, text: str) -> None:
        self.model = tiny_model(model_type)
        self._ids = torch.from_numpy(np.load(text.removeprefix("ids:")))
        self.seen: dict[str, Rows] = {}

    def watch(self, name: str, module: torch.nn.Module) -> None:
        def keep(_: object, args: tuple[torch.Tensor, ...], result: Any) -> None:
            out = result[0] if isinstance(result, tuple) else result
            self.seen[f"{name} in"] = args[0].double().reshape(-1, args[0].shape[-1]).numpy()
            self.seen[f"{name} out"] = out.double().reshape(-1, out.shape[-1]).numpy()

        module.register_forward_hook(keep)

    def run(self) -> dict[str, Rows]:
        with torch.inference_mode():
            self.model(input_ids=self._ids, use_cache=False)
        return dict(self.seen)


def ridge_change(features: Rows, missing: Rows, ratio: float) -> Rows:
    gram = features.T @ features
    gram[np.diag_indices(len(gram))] += ratio * np.trace(gram) / len(gram)
    change: Rows = np.linalg.solve(gram, features.T @ missing).astype(np.float64)
    return change


def test_both_projections_are_ridge_fits_towards_the_dense_stream(
    model: Path, text: str, tmp_path: Path
) -> None:
    operators = fitted(model, text, "2:4", tmp_path / "operators.safetensors", refit=1)
    dense = Resident("llama", text)
    dense.watch("layer", dense.model.model.layers[4])
    target = dense.run()["layer out"]

    repaired = Resident("llama", text)
    layers = repaired.model.model.layers
    ghost = build_ghost(operators.boundaries[0], dtype=torch.float32, device=torch.device("cpu"))
    layers[2].forward = lambda states, *_a, **_k: states
    layers[3].forward = lambda states, *_a, **_k: ghost(states)
    layer = layers[4]
    repaired.watch("layer", layer)
    figures = operators.boundaries[0].diagnostics["refitted"]
    assert len(figures) == 2
    for module, path in (
        (layer.self_attn.o_proj, "self_attn.o_proj"),
        (layer.mlp.down_proj, "mlp.down_proj"),
    ):
        name = f"model.layers.4.{path}.weight"
        repaired.watch("projection", module)
        seen = repaired.run()
        missing = target - seen["layer out"]
        change = ridge_change(seen["projection in"], missing, figures[name]["ridge_relative"])
        wanted = module.weight.detach().double().numpy() + change.T
        assert np.allclose(operators.replaced[name], wanted, rtol=1e-3, atol=2e-5)
        left = missing - seen["projection in"] @ change
        share = np.linalg.norm(left) / np.linalg.norm(missing)
        assert figures[name]["relative_residual"] == pytest.approx(share, rel=1e-3)
        module.weight = torch.nn.Parameter(torch.from_numpy(operators.replaced[name]), requires_grad=False)
    assert set(operators.replaced) == set(figures)


def test_the_operators_are_those_of_a_fit_without(model: Path, text: str, tmp_path: Path) -> None:
    plain = fitted(model, text, "2:4", tmp_path / "plain.safetensors", features="hidden")
    refitted = fitted(model, text, "2:4", tmp_path / "refitted.safetensors", refit=1)
    assert not plain.replaced
    assert np.array_equal(weight_of(plain), weight_of(refitted))


def test_the_exported_model_is_the_lane_of_the_operators(model: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.safetensors"
    operators = fitted(model, text, "1:2 4:5", file, operator="least-squares", features="hidden+mlp", refit=1)
    # Layer 2 is behind the first gap, layer 5 behind the second; layer 3 would absorb.
    assert sorted({name.split(".")[2] for name in operators.replaced}) == ["2", "5"]
    export(model, operators=file, out=tmp_path / "out")
    windows = Text(spec=text, length=T, sequences=S, part="all")
    lane, whole = (
        evaluate(groups, text=windows).rows[1] for groups in ([model, file], [model, tmp_path / "out"])
    )
    alone = evaluate([tmp_path / "out"], text=windows).rows[0]
    assert lane.loss == pytest.approx(alone.loss, abs=1e-4)
    assert whole.loss == pytest.approx(alone.loss, abs=1e-4)


def test_a_layer_before_another_gap_is_left_alone() -> None:
    plan = PruningPlan(10, (Span(2, 4), Span(6, 7)))
    assert refitted_layers(plan, Span(2, 4), 5) == (4,)
    assert refitted_layers(plan, Span(6, 7), 2) == (7, 8)
    assert refitted_layers(plan, Span(6, 7), 9) == (7, 8, 9)
    assert refitted_layers(PruningPlan(4, (Span(2, 4),)), Span(2, 4), 1) == ()


def test_the_first_refit_is_the_same_whatever_follows(model: Path, text: str, tmp_path: Path) -> None:
    """A second layer is fitted behind the first as that is in the end, and leaves it alone."""
    one = fitted(model, text, "1:2", tmp_path / "one.safetensors", refit=1).replaced
    two = fitted(model, text, "1:2", tmp_path / "two.safetensors", refit=2).replaced
    assert sorted({name.split(".")[2] for name in two}) == ["2", "3"]
    assert all(np.array_equal(array, two[name]) for name, array in one.items())


def test_a_layer_that_cannot_take_up_a_map_is_refused(text: str, tmp_path: Path) -> None:
    gemma = save_tiny("gemma2", tmp_path / "gemma")
    with pytest.raises(UnsupportedModelError, match="layer 4 cannot be refitted: the norm"):
        fitted(gemma, text, "2:4", tmp_path / "operators.safetensors", refit=1)


def test_a_store_holds_no_repaired_stream(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--refit would not be used"):
        fit("2:4", store=tmp_path / "store", refit=1, out=tmp_path / "operators.safetensors")


def test_repairs_with_and_without_a_refit_are_measured_together_as_alone(model: Path, tmp_path: Path) -> None:
    session, tokens = open_model(model, save_windows(tmp_path))
    ghost = passing_method(Method(operator="ghost"))
    plain = Repair.alike(PruningPlan.parse(L, "1:2"), ghost)
    two = Repair.alike(PruningPlan.parse(L, "1:2 4:5"), ghost)
    repairs = [plain, plain.refitted(1), plain.refitted(2), two, two.refitted(1)]
    wanted: dict[str, Any] = {
        "ranges": Ranges.make(S - HELD, folds=5),
        "micro_batch": MICRO_BATCH,
        "progress": SilentProgress(),
    }
    _, together = measure_repairs(session, tokens, repairs, **wanted)
    alone = [measure_repairs(session, tokens, [repair], **wanted)[1][0] for repair in repairs]
    assert [one.losses for one in together] == [one.losses for one in alone]
    assert len({one.losses.loss for one in together}) == len(repairs)


def test_auto_fits_the_layers_behind_what_it_chose_anew(model: Path, text: str, tmp_path: Path) -> None:
    asked = {"operator": "auto", "held_out": 4}
    plain = fitted(model, text, "2:4", tmp_path / "plain.safetensors", **asked)
    refitted = fitted(model, text, "2:4", tmp_path / "refitted.safetensors", **asked, refit=1)
    assert sorted({name.split(".")[2] for name in refitted.replaced}) == ["4"]
    assert np.array_equal(weight_of(plain), weight_of(refitted))


def test_the_estimate_counts_the_widest_gram_and_the_runs_of_the_layer(model: Path) -> None:
    plain, refitted = (
        estimate(
            Recovery(
                model=str(model),
                remove="2:4",
                calibration=Text(spec="ids:none.npy", sequences=S, length=T),
                method=Method(operator="ghost", inputs="repaired", refit=count),
                compute=Compute(device="cpu"),
            ),
            measure=False,
        )
        for count in (0, 1)
    )
    assert plain.needs["memory, fit"].n_bytes < refitted.needs["memory, fit"].n_bytes
    flops = [{stage.name: stage.flops for stage in one.stages}["fit"] for one in (plain, refitted)]
    assert flops[0] < flops[1]
