"""The criteria of authors' repositories, against their loops over what transformers returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.errors import RequestError
from ghoststream.options import Compute, Search, Source, Text
from ghoststream.spans import Span
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.select import select
from ghoststream.statistics import CosineReducer
from ghoststream.statistics.final_norm import FinalNorm
from ghoststream.testing.models import tiny_model

pytestmark = pytest.mark.integration

L, S, T = 6, 5, 12


@dataclass(frozen=True)
class Captured:
    """A model, its store, and the ``hidden_states`` of transformers: ``(S, L + 1, T, C)`` float64."""

    model: Path
    store: str
    states: torch.Tensor


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """The final norm of the model favours a few channels, so that it turns the last state."""
    folder = tmp_path_factory.mktemp(f"authors-{request.param}")
    overrides: dict[str, Any] = {"n_layer" if request.param == "gpt2" else "num_hidden_layers": L}
    model = tiny_model(request.param, **overrides)
    norm = model.transformer.ln_f if request.param == "gpt2" else model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 5.0, norm.weight.numel()) ** 2)
    model.save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(3, 120, size=(S, T))
    np.save(folder / "ids.npy", ids)
    text = Text(spec=f"ids:{folder / 'ids.npy'}", sequences=S, length=T)
    capture(
        folder / "model",
        calibration=text,
        store=folder / "store",
        compute=Compute(dtype="float32", device="cpu"),
    )
    resident = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        states = resident(torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states
    return Captured(folder / "model", str(folder / "store"), torch.stack(states, dim=1).double())


def cosines(captured: Captured, a: int, b: int) -> torch.Tensor:
    """Token by token, ``(S, T)``."""
    return torch.nn.functional.cosine_similarity(captured.states[:, a], captured.states[:, b], dim=-1)


def chosen_by(captured: Captured, criterion: str, remove: int) -> tuple[dict[Span, float], tuple[int, ...]]:
    source = Source(store=captured.store, model=captured.model)
    found = select(remove, source, search=Search(criterion=criterion))
    return dict(found.scores), found.plan.removed


@pytest.mark.parametrize("remove", [1, 4])
def test_shortgpt_of_its_repository(captured: Captured, remove: int) -> None:
    sums = np.zeros(L)
    for window in range(S):
        for layer in range(L):
            sums[layer] += float((1.0 - cosines(captured, layer, layer + 1)[window]).sum())
    scores, removed = chosen_by(captured, "shortgpt-authors", remove)
    assert list(scores.values()) == pytest.approx(sums / (S * T), rel=1e-4)
    assert removed == tuple(sorted(np.argsort(sums)[:remove].tolist()))


@pytest.mark.parametrize("remove", [1, 3, L - 1])
def test_streamline_of_its_repository(captured: Captured, remove: int) -> None:
    starts = range(L - remove + 1)
    expected = [
        float(
            np.mean(
                [float((0.5 + 0.5 * cosines(captured, start, start + remove)[w]).mean()) for w in range(S)]
            )
        )
        for start in starts
    ]
    scores, removed = chosen_by(captured, "streamline-authors", remove)
    assert list(scores) == [Span(start, start + remove) for start in starts]
    assert list(scores.values()) == pytest.approx(expected, rel=1e-5)
    best = int(np.argmax(expected))
    assert removed == tuple(range(best, best + remove))


@pytest.mark.parametrize("remove", [1, 3, L - 1])
def test_pruneme_of_its_repository(captured: Captured, remove: int) -> None:
    behind_first = captured.states[:, 1:, -1]
    expected = []
    for start in range(L - remove):
        one, other = behind_first[:, start], behind_first[:, start + remove]
        one, other = one / one.norm(dim=-1, keepdim=True), other / other.norm(dim=-1, keepdim=True)
        expected.append(float((torch.acos((one * other).sum(-1).clamp(-1, 1)) / torch.pi).mean()))
    scores, removed = chosen_by(captured, "uidl-pruneme", remove)
    assert list(scores) == [Span(start, start + remove) for start in range(1, L - remove + 1)]
    assert list(scores.values()) == pytest.approx(expected, rel=1e-4)
    best = int(np.argmin(expected)) + 1
    assert removed == tuple(range(best, best + remove))


@pytest.mark.parametrize(
    ("criterion", "formula"), [("shortgpt-authors", "shortgpt"), ("streamline-authors", "streamline")]
)
def test_only_the_last_state_is_normed(captured: Captured, criterion: str, formula: str) -> None:
    scores, _ = chosen_by(captured, criterion, 2)
    plain = select(2, Source(store=captured.store), search=Search(criterion=formula)).scores
    turned = {span for span, _ in plain if span.stop == L}
    shared = {span: value for span, value in plain if span not in turned}
    rescaled = {
        span: 0.5 + 0.5 * value if formula == "streamline" else value for span, value in shared.items()
    }
    assert {span: scores[span] for span in shared} == pytest.approx(rescaled, rel=1e-12)
    assert all(scores[span] != pytest.approx(value, rel=1e-3) for span, value in plain if span in turned)


@pytest.mark.parametrize("criterion", ["shortgpt-authors", "streamline-authors", "uidl-pruneme"])
def test_they_need_the_model(captured: Captured, criterion: str) -> None:
    with pytest.raises(RequestError, match=r"reads the weights of the model; .*--model"):
        select(2, Source(store=captured.store), search=Search(criterion=criterion))


@pytest.mark.parametrize(
    ("criterion", "most"),
    [("shortgpt-authors", L - 1), ("streamline-authors", L - 1), ("uidl-pruneme", L - 1)],
)
def test_too_many_or_no_layers_are_refused(captured: Captured, criterion: str, most: int) -> None:
    source = Source(store=captured.store, model=captured.model)
    for remove in (0, most + 1):
        with pytest.raises(RequestError, match=f"cannot remove {remove} of {L} layers.*from 1 to {most}"):
            select(remove, source, search=Search(criterion=criterion))


def test_what_is_kept_of_a_reduction_names_the_norm() -> None:
    norms = []
    for scale in (1.0, 2.0):
        module = torch.nn.LayerNorm(4)
        torch.nn.init.constant_(module.weight, scale)
        norms.append(FinalNorm.of(module, 3))
    described = [CosineReducer(((0, 3),), final_norm=norm).describe() for norm in (None, *norms)]
    assert described[0] != described[1] != described[2]
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    centred = rows - rows.mean(axis=1, keepdims=True)
    expected = 2.0 * centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norms[1].apply(rows), expected, rtol=1e-5)
