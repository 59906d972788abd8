"""On CUDA every stage gives what it gives on the CPU, which is compared with resident models elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import ghoststream
from ghoststream.activations import ActivationStore
from ghoststream.errors import NumericsError
from ghoststream.machine import free_device_memory
from ghoststream.options import Compute, Text, Training
from ghoststream.progress import SilentProgress
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.stages.workers import Shared
from ghoststream.streaming import StatesFactory
from ghoststream.streaming.shapes import StatesShape
from ghoststream.testing.models import save_tiny
from tests.helpers.crews import cluster_of
from tests.helpers.groups import capture_arguments, evaluate_arguments
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import fit, select
from tests.helpers.watching import PLACES, Watched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

S, T = 6, 16
# Every form of an operator, and every kind of feature that one is fitted on.
FORMS: dict[str, dict[str, Any]] = {
    "ghost": {},
    "diagonal": {"operator": "diagonal"},
    "rotated": {"operator": "linear-patch-rotated"},
    "prune-and-comp": {"operator": "prune-and-comp"},
    "hidden+mlp": {"operator": "least-squares", "features": "hidden+mlp", "ridge": 1e-2},
    "normed": {"operator": "least-squares", "features": "normed", "ridge": 1e-2, "intercept": True},
}
Stage = Callable[[str, Path, str, Path], list[npt.ArrayLike]]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return random_ids(tmp_path, S, T)


def _options(device: str) -> dict[str, Any]:
    return {"length": T, "micro_batch": 2, "device": device}


def _losses(models: list[Path], text: str, device: str) -> list[npt.ArrayLike]:
    report = evaluate(models, **evaluate_arguments(text, _options(device)))
    return [row.losses.loss for row in report.rows]


def operators(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """The losses behind every kind of operator."""
    files = [model]
    for name, options in FORMS.items():
        file = out.parent / f"{name}.safetensors"
        if not file.exists():
            fit("2:4", model=model, calibration=text, sequences=S, out=file, **_options("cpu"), **options)
        files.append(file)
    return _losses(files, text, device)


def fitted(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """Two boundaries, fitted one behind the other in a pass."""
    found = fit(
        "1:2;3:5",
        model=model,
        calibration=text,
        sequences=S,
        out=out / "fitted.safetensors",
        precision="float64",
        **_options(device),
        **FORMS["hidden+mlp"],
    )
    return [one.weight for one in found.boundaries if one.weight is not None]


def gradients(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """Taylor scores: a pass there and back."""
    del out
    found = select(2, model=model, calibration=text, sequences=S, criterion="taylor", **_options(device))
    return [float(row["score"]) for row in found.candidates]


def searched(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """The default search, which fits and measures candidates in passes."""
    del out
    found = select(2, model=model, calibration=text, sequences=S, **_options(device))
    return [float(edge) for span in found.plan.spans for edge in (span.start, span.stop)]


def replayed(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """A layer that is run again on stored states."""
    arguments = capture_arguments(text, {**_options(device), "sequences": S})
    capture(model, store=out / "store", **arguments)
    names = ["mlp_intermediate", "attention_heads", "output"]
    parts = ghoststream.replay(model, out / "store", 2, names, compute=Compute(device=device))
    return [tap.cpu().numpy() for _, taps in parts for tap in taps.values()]


def boosted(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """A round of boosting."""
    return _trained(Training(boost=1, steps=0, held_out=2), device, model, text, out)


def distilled(device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    """Two steps of training."""
    return _trained(Training(steps=2, batch=4, held_out=2), device, model, text, out)


def _trained(training: Training, device: str, model: Path, text: str, out: Path) -> list[npt.ArrayLike]:
    file = out.parent / "start.safetensors"
    if not file.exists():
        fit("2:4", model=model, calibration=text, sequences=S, out=file, **_options("cpu"), **FORMS["ghost"])
    found = ghoststream.distill(
        model,
        file,
        calibration=Text(spec=text, sequences=S, length=T),
        training=training,
        compute=Compute(device=device, micro_batch=2),
        out=out / "trained.safetensors",
    )
    return [one.weight for one in found.boundaries if one.weight is not None]


@pytest.mark.parametrize(
    "stage",
    [
        operators,
        fitted,
        gradients,
        replayed,
        boosted,
        *(pytest.param(one, marks=pytest.mark.soak) for one in (searched, distilled)),
    ],
)
def test_a_stage_gives_what_it_gives_on_the_cpu(
    stage: Stage, text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    results = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        results.append(stage(device, tiny_llama, text, tmp_path / device))
    expected, found = results
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, dtype=float), np.asarray(other, dtype=float), rtol=2e-4, atol=2e-5
        )


def test_a_round_of_boosting_whose_places_lie_apart(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"operator": "least-squares", "features": "hidden+mlp"}
    options = {**_options("cpu"), **method, "sequences": S}
    fit("2:4", model=tiny_llama, calibration=text, out=tmp_path / "start.safetensors", **options)
    (tmp_path / "cpu").mkdir()
    expected = boosted("cpu", tiny_llama, text, tmp_path / "cpu")
    has_room = StatesFactory._has_room

    def inputs_only(self: StatesFactory, place: torch.device, limit: int | None, shape: StatesShape) -> bool:
        return has_room(self, place, limit, shape) and (place.type == "cpu" or shape.hidden > 32)

    monkeypatch.setattr(StatesFactory, "_has_room", inputs_only)
    (tmp_path / "cuda").mkdir()
    for one, other in zip(boosted("cuda", tiny_llama, text, tmp_path / "cuda"), expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "scratch"])
@pytest.mark.parametrize("watched", PLACES)
def test_what_observers_keep_goes_where_the_card_has_no_room(
    watched: Watched, on_host: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    n_windows, micro_batch = 256, 4
    text = Text(spec=random_ids(tmp_path, n_windows, T), sequences=n_windows, length=T)
    cpu, whole = (ModelSession(tiny_llama, Compute(device=device)) for device in ("cpu", "cuda"))
    tokens = cpu.tokens(text, SilentProgress())
    host, device = whole.memory(T, micro_batch=micro_batch).taken()
    place = n_windows * T * 32 * 4
    # Room for the states of the lane, beside layers and work.
    given = Compute(device="cuda", device_memory=device + place, host_memory=None if on_host else host)
    watched(whole, tokens.take(range(micro_batch)), micro_batch)  # what libraries take once and keep
    torch.cuda.reset_peak_memory_stats()
    before, found, peaks = torch.cuda.memory_allocated(), [], []
    for session in (ModelSession(tiny_llama, given), whole):
        found.append(watched(session, tokens, micro_batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert found[0] == found[1]
    assert peaks[0] < 2 * place
    assert peaks[1] >= PLACES[watched] * place
    for key, expected in watched(cpu, tokens, micro_batch).items():
        for name, value in vars(expected).items():
            assert getattr(found[0][key], name) == pytest.approx(value, rel=2e-4, abs=2e-5), (key, name)


def _idle(compute: Compute, number: int) -> int:
    """What torch keeps of the card and does not use, as a worker finds it."""
    del compute, number
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def test_workers_find_the_memory_that_this_process_has_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghoststream.stages.workers._processes", cluster_of)
    compute = Compute(device="cuda:0,cuda:0")
    with Shared(compute, None).workers(SilentProgress()) as crew:
        used = torch.empty(2**26, dtype=torch.uint8, device="cuda")
        del used
        idle = _idle(compute, 0)
        assert idle >= 2**26
        assert max(crew.run(_idle, compute, [(0,), (1,)], [1, 1], SilentProgress())) <= idle - 2**26


def test_the_second_pass_of_a_process_has_the_memory_of_the_first(text: str, tiny_llama: Path) -> None:
    before = free_device_memory(torch.device("cuda", 0))
    first = _losses([tiny_llama], text, "cuda")
    assert _losses([tiny_llama], text, "cuda:0") == first
    after = free_device_memory(torch.device("cuda", 0))
    assert before is not None
    assert after is not None
    assert after >= before - 64 * 2**20


def test_states_that_overflow_are_named_and_nothing_of_them_is_kept(text: str, tmp_path: Path) -> None:
    model = overflowing(tmp_path / "model")
    arguments = capture_arguments(text, {**_options("cuda"), "sequences": S})
    with pytest.raises(
        NumericsError, match=r"hidden states at position 4 of sequences \[0,2\) are not finite"
    ):
        capture(model, store=tmp_path / "store", **arguments)
    assert ActivationStore.open(str(tmp_path / "store")).completed_layers() == (0, 1, 2, 3)


def overflowing(folder: Path) -> Path:
    """Return a model whose layer 3 gives what float32 has no number for."""
    from safetensors.torch import load_file, save_file

    save_tiny("llama", folder, max_shard_size="10GB")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
