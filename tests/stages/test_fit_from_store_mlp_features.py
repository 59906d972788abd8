"""Features of the layer before a boundary: operators on replayed taps, against hooks on the model and
numpy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ghoststream
from ghoststream.activations import ActivationStore
from ghoststream.errors import BudgetError, MismatchError, RequestError, StoreError, UnsupportedModelError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Storage, Text
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing import tap_store
from ghoststream.stages.capturing.replay import replay_layer
from ghoststream.stages.lanes import operator_lane
from ghoststream.statistics import Feature, ModelFacts, register_feature, taps_of
from ghoststream.streaming import Skeleton
from ghoststream.testing.conformance import load_resident
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers import requests
from tests.helpers.command_bench import run
from tests.helpers.random_ids import random_ids
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.integration
L, C, INTERMEDIATE, S, T = 6, 32, 64, 12, 20
PLAN = PruningPlan.parse(L, "2:4 5:6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("mlp") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_ids(tmp_path_factory.mktemp("ids"), S, T)


@pytest.fixture(scope="module")
def store(folder: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mlp-store") / "store"
    capture(folder, text, place, micro_batch=5)
    return place


def capture(folder: Path, text: str, store: Path, *, micro_batch: int | None = None, **storage: Any) -> None:
    ghoststream.capture(
        folder,
        calibration=Text(spec=text, sequences=S, length=T),
        store=store,
        storage=Storage(**storage),
        compute=Compute(micro_batch=micro_batch),
    )


class Seen:
    """What hooks on the resident model see: hidden states by number, what enters the last map of each MLP,
    what it gives."""

    def __init__(self, folder: Path, store: Path) -> None:
        model = load_resident(folder)
        self.last: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, args: self.last.append(args[0].clone()))
        self.entering: list[list[torch.Tensor]] = [[] for _ in range(L)]
        self.added: list[list[torch.Tensor]] = [[] for _ in range(L)]
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.register_forward_hook(self._keep(number))
        ids = torch.from_numpy(ActivationStore.open(str(store)).tokens().ids).long()
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        # The last entry is normed; what enters the norm was kept.
        entering = [*states[:-1], *self.last]
        self.states = [state.double().numpy().reshape(-1, C) for state in entering]

    def _keep(self, number: int) -> Any:
        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            self.entering[number].append(args[0].clone())
            self.added[number].append(result.clone())

        return keep

    def mlp(self, layer: int) -> np.ndarray:
        return torch.cat(self.entering[layer]).double().numpy().reshape(-1, INTERMEDIATE)

    def mlp_output(self, layer: int) -> np.ndarray:
        return torch.cat(self.added[layer]).double().numpy().reshape(-1, C)

    def of(self, features: str, layer: int) -> np.ndarray:
        """What operators on these features read of a layer."""
        if features == "hidden+mlp":
            return np.concatenate([self.states[layer + 1], self.mlp(layer)], axis=1)
        read: np.ndarray = getattr(self, features)(layer)
        return read


@pytest.fixture(scope="module")
def seen(folder: Path, store: Path) -> Seen:
    return Seen(folder, store)


def fit(store: Path, folder: Path, out: Path, features: str, plan: Any = PLAN, **options: Any) -> OperatorSet:
    options = {"operator": "least-squares", "features": features, "ridge": 1e-3, "folds": 3, **options}
    model = folder if taps_of(features) else None
    return requests.fit(plan, store=store, model=model, out=out, **options)


@pytest.mark.parametrize("features", ["mlp", "mlp_output", "hidden+mlp"])
def test_operators_are_those_of_numpy_on_what_hooks_see(
    features: str, store: Path, folder: Path, seen: Seen, tmp_path: Path
) -> None:
    found = fit(store, folder, tmp_path / "operators", features)
    for operator in found.boundaries:
        start, stop = operator.span.start, operator.span.stop
        a, x = seen.of(features, start - 1), seen.states[start]
        gap = seen.states[stop] - x
        gram = a.T @ a
        ridge = 1e-3 * np.trace(gram) / len(gram)
        expected = np.linalg.solve(gram + ridge * np.eye(len(gram)), a.T @ gap)
        assert operator.weight is not None
        np.testing.assert_allclose(operator.weight.T, expected, rtol=2e-3, atol=2e-4)
        missed = np.linalg.norm(a @ expected - gap) / np.linalg.norm(gap)
        assert operator.diagnostics["relative_residual"] == pytest.approx(missed, rel=1e-4)
        np.testing.assert_allclose(operator.apply(x, a), x + a @ operator.weight.T, rtol=1e-9)
        with pytest.raises(RequestError, match="give its"):
            operator.apply(x)
    assert [path.name for path in tmp_path.iterdir()] == ["operators"]


def test_state_and_mlp_take_every_option_of_least_squares(
    store: Path, folder: Path, seen: Seen, tmp_path: Path
) -> None:
    both, x, y = seen.of("hidden+mlp", 1), seen.states[2], seen.states[4]
    joined = fit(store, folder, tmp_path / "one", "hidden+mlp", "2:4", intercept=True).boundaries[0]
    centred = both - both.mean(0)
    ridge = 1e-3 * np.square(centred).sum() / both.shape[1]
    rows = np.vstack([centred, np.sqrt(ridge) * np.eye(both.shape[1])])
    gap = y - x
    expected = np.linalg.lstsq(rows, np.vstack([gap - gap.mean(0), np.zeros((both.shape[1], C))]))[0]
    np.testing.assert_allclose(np.asarray(joined.weight).T, expected, atol=2e-4)
    np.testing.assert_allclose(np.asarray(joined.bias), gap.mean(0) - both.mean(0) @ expected, atol=2e-4)

    # Towards zero: the ridge is on the map of the state itself, W = I + A.
    drawn = fit(store, folder, tmp_path / "two", "hidden+mlp", "2:4", shrink="zero", ridge=0.1).boundaries[0]
    ridge = 0.1 * np.square(both).sum() / both.shape[1]
    rows = np.vstack([both, np.sqrt(ridge) * np.eye(both.shape[1])])
    expected = np.linalg.lstsq(rows, np.vstack([y, np.zeros((both.shape[1], C))]))[0]
    expected[:C] -= np.eye(C)
    np.testing.assert_allclose(np.asarray(drawn.weight).T, expected, atol=2e-4)

    plain = fit(store, folder, tmp_path / "gram", "hidden+mlp", "2:4", rank=8).boundaries[0]
    factored = fit(store, folder, tmp_path / "tsqr", "hidden+mlp", "2:4", rank=8, solver="tsqr").boundaries[0]
    np.testing.assert_allclose(np.asarray(factored.weight), np.asarray(plain.weight), atol=2e-4)
    assert np.linalg.matrix_rank(np.asarray(plain.weight), tol=1e-3) == 8
    sketched = fit(
        store, folder, tmp_path / "sketch", "hidden+mlp", "2:4", solver="sketch-range", rank=8, sketch_size=32
    ).boundaries[0]
    missed = [np.linalg.norm(both @ np.asarray(one.weight).T - gap) for one in (plain, sketched)]
    assert missed[1] == pytest.approx(missed[0], rel=1e-3)
    assert all(one.diagnostics["absorption_growth"] > 0 for one in (joined, factored, sketched))

    chosen = fit(
        store, folder, tmp_path / "auto", "hidden+mlp", "2:4", ridge="auto", token_weights="drop_sinks"
    ).boundaries[0]
    single = [
        fit(store, folder, tmp_path / name, name, "2:4", ridge="auto").boundaries[0]
        for name in ("hidden", "mlp")
    ]
    for one in single:
        assert chosen.diagnostics["relative_residual"] < one.diagnostics["relative_residual"]


def test_the_taps_that_are_kept_are_state_and_intermediate(
    store: Path, folder: Path, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghoststream.operators.kind.reduce", _stop)
    with pytest.raises(KeyboardInterrupt):
        fit(store, folder, tmp_path / "out", "hidden+mlp", "2:4")
    (place,) = (tmp_path / "out.partial" / "fit").glob("taps-*")
    kept = ActivationStore.open(str(place)).read_numpy(1, 0, S)
    # fp32: the layer that is run again gives the very states of the pass.
    np.testing.assert_array_equal(kept[..., :C], ActivationStore.open(str(store)).read_numpy(2, 0, S))
    np.testing.assert_allclose(kept[..., C:].reshape(-1, INTERMEDIATE), seen.mlp(1), rtol=1e-5, atol=1e-7)


def test_weights_and_masks_hold_for_taps_too(folder: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "The quick brown fox jumps over the lazy dog."[-5 * n :]}) for n in range(1, 8)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tiny_tokenizer().save_pretrained(folder)
    place = tmp_path / "store"
    text = Text(spec=f"file:{tmp_path / 'text.jsonl'}", sequences=7, length=T, pack=False)
    ghoststream.capture(folder, calibration=text, store=place)
    operator = fit(place, folder, tmp_path / "o", "mlp", "2:4", token_weights="relative", folds=0).boundaries[
        0
    ]
    mask = ActivationStore.open(str(place)).mask().reshape(-1)
    assert not mask.all()
    seen = Seen(folder, place)
    a, y = seen.mlp(1)[mask], seen.states[4][mask]
    gap, w = y - seen.states[2][mask], 1.0 / np.square(y).sum(1)
    gram = (a.T * w) @ a
    ridge = 1e-3 * np.trace(gram) / len(gram)
    expected = np.linalg.solve(gram + ridge * np.eye(len(gram)), (a.T * w) @ gap)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight.T, expected, rtol=5e-3, atol=5e-4)


class HeadMagnitudes(Feature):
    """A user's feature of a tap."""

    name = "head-magnitudes-for-a-test"
    taps = ("attention_heads",)

    def width(self, hidden: int) -> int:
        return 2 * hidden

    def rows(self, states: np.ndarray, facts: ModelFacts) -> np.ndarray:
        del facts
        return np.concatenate([states, np.abs(states)], axis=1)


def test_a_feature_of_the_users_own_reads_any_tap(
    store: Path, folder: Path, seen: Seen, tmp_path: Path
) -> None:
    register_feature(HeadMagnitudes())
    operator = fit(store, folder, tmp_path / "o", HeadMagnitudes.name, "2:4", ridge=1e-2).boundaries[0]
    heads = [
        taken["attention_heads"] for _, taken in ghoststream.replay(folder, store, 1, ["attention_heads"])
    ]
    a = torch.cat(heads).double().numpy().reshape(-1, C)
    phi, gap = np.concatenate([a, np.abs(a)], axis=1), seen.states[4] - seen.states[2]
    gram = phi.T @ phi
    ridge = 1e-2 * np.trace(gram) / len(gram)
    expected = np.linalg.solve(gram + ridge * np.eye(len(gram)), phi.T @ gap)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight.T, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(operator.apply(seen.states[2], a), seen.states[2] + phi @ operator.weight.T)
    lane = OperatorSet(PruningPlan.parse(L, "2:4"), "own", (operator,), C)
    with pytest.raises(RequestError, match="a lane can run operators on"):
        operator_lane("own", lane, Skeleton(folder), None)


def test_a_kill_costs_the_taps_of_one_layer_and_no_bit(
    store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    fit(store, folder, whole, "mlp")
    asked: list[int] = []

    def interrupted(session: Any, source: Any, layer: int, *rest: Any) -> Any:
        asked.append(layer)
        for number, part in enumerate(replay_layer(session, source, layer, *rest)):
            if layer == 4 and number == 1 and asked.count(4) == 1:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(tap_store, "replay_layer", interrupted)
    out = tmp_path / "new" / "killed"
    with pytest.raises(KeyboardInterrupt):
        fit(store, folder, out, "mlp")
    assert not out.exists()
    fit(store, folder, out, "mlp")
    assert asked == [1, 4, 4]
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["killed"]


def test_damaged_taps_are_made_again(
    store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    fit(store, folder, other, "mlp")
    with monkeypatch.context() as patched:
        patched.setattr("ghoststream.operators.kind.reduce", _stop)
        with pytest.raises(KeyboardInterrupt):
            fit(store, folder, out, "mlp")
    (taps,) = out.with_name("out.partial").glob("fit/taps-*")
    next(path for path in taps.rglob("c.*") if path.stat().st_size > 5000).unlink()
    fit(store, folder, out, "mlp")
    assert out.read_bytes() == other.read_bytes()


def _stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_moments_over_workers_are_the_same_bits_and_sketches_read_taps(
    store: Path, folder: Path, tmp_path: Path, seen: Seen
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fit(store, folder, one, "mlp", workers=1)
    fit(store, folder, two, "mlp", workers=3)
    assert one.read_bytes() == two.read_bytes()
    exact = fit(store, folder, tmp_path / "exact", "mlp", "2:4", rank=8, ridge=1e-4).boundaries[0]
    sketched = fit(
        store,
        folder,
        tmp_path / "sketched",
        "mlp",
        "2:4",
        rank=8,
        ridge=1e-4,
        solver="sketch-range",
        sketch_size=32,
    ).boundaries[0]
    # A sketch as wide as the gap loses nothing.
    assert sketched.diagnostics["relative_residual"] == pytest.approx(
        exact.diagnostics["relative_residual"], rel=1e-3
    )
    a, gap = seen.mlp(1), seen.states[4] - seen.states[2]
    assert sketched.weight is not None
    missed = np.linalg.norm(a @ sketched.weight.T - gap) / np.linalg.norm(gap)
    assert sketched.diagnostics["relative_residual"] == pytest.approx(missed, rel=1e-4)


def test_workers_of_a_cluster_open_the_taps_themselves(store: Path, folder: Path, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    here, there = tmp_path / "here", tmp_path / "there"
    fit(store, folder, here, "mlp", "2:4")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        fit(store, folder, there, "mlp", "2:4", scheduler=client)
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.0, 4.0, 5.0, 7.0])
def test_sigkill_at_any_time_costs_no_bit(store: Path, folder: Path, tmp_path: Path, seconds: float) -> None:
    expected, out = tmp_path / "expected", tmp_path / "out"
    fit(store, folder, expected, "mlp")
    script = (
        "import sys; from ghoststream import Method, Search, Source, fit\nfit('2:4 5:6', "
        "Source(store=sys.argv[1], model=sys.argv[2]), search=Search(folds=3), out=sys.argv[3], "
        "method=Method(operator='least-squares', features='mlp', ridge=1e-3))"
    )
    command = [sys.executable, "-c", script, str(store), str(folder), str(out)]
    with subprocess.Popen(command) as process:
        time.sleep(seconds)
        process.kill()
    fit(store, folder, out, "mlp")
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_what_cannot_be_is_refused_before_anything_is_made(
    store: Path, folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(RequestError, match="give the model"):
        requests.fit(PLAN, store=store, features="mlp", operator="least-squares", out=out)
    with pytest.raises(RequestError, match=r"\[0,2\) begins with the first layer"):
        fit(store, folder, out, "mlp", "0:2")
    with pytest.raises(RequestError, match=r"\[0,2\) begins with the first layer"):
        requests.recover(folder, remove="0:2", calibration=text, out=out, operator="replace-me-ls")
    with pytest.raises(UnsupportedModelError, match="has no bias"):
        fit(store, folder, out, "mlp", intercept=True)
    with pytest.raises(RequestError, match="ghost is defined without features mlp"):
        fit(store, folder, out, "mlp", operator="ghost")
    with pytest.raises(RequestError, match="layer before the boundary, which is run again"):
        moments_of(str(store), PLAN.spans, feature="mlp")
    with monkeypatch.context() as patched:
        patched.setattr(tap_store, "free_host_memory", lambda: 150_000)
        with pytest.raises(BudgetError, match=r"fitting 64 features \(mlp\) takes 192\.0 KiB"):
            fit(store, folder, out, "mlp")
        with pytest.raises(BudgetError, match=r"fitting 96 features \(hidden\+mlp\) takes 384\.0 KiB"):
            fit(store, folder, out, "hidden+mlp")
        with pytest.raises(BudgetError, match="or give --memory where the machine has more"):
            fit(store, folder, out, "mlp", memory=160_000)
        fit(store, folder, tmp_path / "believed", "mlp", memory=10**9)
    with pytest.raises(RequestError, match="do not hold"):
        fit(store, folder, out, "mlp", shrink="zero")
    assert not out.parent.exists()
    other = save_tiny("llama", tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match="was not captured from"):
        fit(store, other, out, "mlp")
    capture(folder, text, tmp_path / "few", layers=(2, 4))
    with pytest.raises((StoreError, RequestError), match=r"h\[1\]"):
        fit(tmp_path / "few", folder, out, "mlp", "2:4")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma2", "the norm post_feedforward_layernorm"), ("olmo2", "the norm"), ("mixtral", "with experts")],
)
def test_architectures_that_cannot_absorb_are_refused_by_name(
    model_type: str, reason: str, text: str, tmp_path: Path
) -> None:
    model, store = save_tiny(model_type, tmp_path / "model"), tmp_path / "store"
    capture(model, text, store, layers=(1, 2, 4, 5, 6))
    for features in ("mlp", "mlp_output", "hidden+mlp"):
        with pytest.raises(UnsupportedModelError, match=reason):
            fit(store, model, tmp_path / "out", features)
    with pytest.raises(UnsupportedModelError, match=reason):
        requests.recover(
            model, remove="2:4", calibration=text, out=tmp_path / "out", operator="replace-me-ls"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]


def test_rounded_states_are_taken_with_a_warning(folder: Path, text: str, tmp_path: Path) -> None:
    place = tmp_path / "store"
    capture(folder, text, place, store_dtype="bfloat16")
    found = run(
        *("fit", "--store", place, "--plan", "2:4", "--operator", "replace-me-ls", "--model", folder),
        *("--out", tmp_path / "operators", "--json"),
    )
    assert found.exit_code == 0, found.stderr
    assert "rounded to bfloat16" in found.stderr
    assert OperatorSet.load(tmp_path / "operators").boundaries[0].features == "mlp_output"
