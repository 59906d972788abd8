"""The replay stage: taps of a captured store are those of the resident model; what does not fit is
refused."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import ghoststream
from ghoststream.errors import MismatchError, RequestError, StoreError, UnsupportedModelError
from ghoststream.stages.capturing import replay as replay_stage
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import make_batches
from ghoststream.testing.conformance import load_resident
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers.groups import capture_arguments
from tests.helpers.random_ids import random_ids
from tests.helpers.resident_taps import see

pytestmark = pytest.mark.integration
T = 20


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3-MoE and a store of it: 7 documents of 5 to 35 characters, padded on the right."""
    root = tmp_path_factory.mktemp("captured")
    folder = save_tiny("qwen3_moe", root / "model")
    tiny_tokenizer().save_pretrained(folder)
    lines = [
        json.dumps({"text": "The quick brown fox jumps over the lazy dog."[-5 * n :]}) for n in range(1, 8)
    ]
    (root / "text.jsonl").write_text("\n".join(lines))
    _capture(folder, root / "store", f"file:{root / 'text.jsonl'}", pack=False)
    mask = ghoststream.ActivationStore.open(str(root / "store")).mask()
    assert mask.sum(axis=1).tolist() == [5, 10, 15, 20, 20, 20, 20]
    return folder, root / "store"


@pytest.fixture
def ids(tmp_path: Path) -> str:
    """Specification of 7 sequences of random ids, for models without a tokenizer."""
    return random_ids(tmp_path, 7, T)


def _capture(folder: Path, store: Path, text: str, **options: Any) -> None:
    settings = {"sequences": 7, "length": T, "micro_batch": 3, **options}
    ghoststream.capture(folder, store=store, **capture_arguments(text, settings))


def _resident_taps(folder: Path, store: Path, layer: int, name: str) -> torch.Tensor:
    tokens = ghoststream.ActivationStore.open(str(store)).tokens()
    model = load_resident(folder)
    batches = make_batches(tokens.ids, tokens.mask, 3)
    return torch.cat([see(model, "qwen3_moe", batch)[layer][name] for batch in batches])


def test_a_store_is_replayed_in_the_captures_micro_batches(captured: tuple[Path, Path]) -> None:
    folder, store = captured
    names = ["mlp_intermediate", "mlp_contribution", "output"]
    parts = list(ghoststream.replay(folder, store, 3, names))
    assert [first for first, _ in parts] == [0, 3, 6]
    for name in names:
        found = torch.cat([taken[name] for _, taken in parts])
        assert torch.equal(found, _resident_taps(folder, store, 3, name)), name
    assert torch.equal(
        torch.cat([taken["output"] for _, taken in parts]),
        ghoststream.ActivationStore.open(str(store)).read(4, 0, 7),
    )


@pytest.mark.parametrize("wanted", [(0, 7), (1, 2), (2, 4), (3, 6), (5, 7)])
def test_parts_of_the_sequences_have_the_same_bits(
    wanted: tuple[int, int], captured: tuple[Path, Path]
) -> None:
    folder, store = captured
    parts = list(ghoststream.replay(folder, store, 1, ["attention_heads"], sequences=wanted))
    found = torch.cat([taken["attention_heads"] for _, taken in parts])
    assert torch.equal(found, _resident_taps(folder, store, 1, "attention_heads")[slice(*wanted)])
    firsts = [first for first, _ in parts]
    lengths = [len(taken["attention_heads"]) for _, taken in parts]
    assert firsts[0] == wanted[0]
    assert [*firsts[1:], wanted[1]] == [first + n for first, n in zip(firsts, lengths, strict=True)]


def test_taps_are_not_held_when_the_caller_lets_go_of_them(captured: tuple[Path, Path]) -> None:
    folder, store = captured
    work = ghoststream.replay(folder, store, 0, ["mlp_intermediate", "output"])
    references = []
    for _, taken in work:
        references += [weakref.ref(tap.untyped_storage()) for tap in taken.values()]
        del taken
        assert [reference() for reference in references] == [None] * len(references)
    assert len(references) == 6


def test_weights_are_freed_when_the_iterator_is_closed(
    captured: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ModelSession] = []

    class Recorded(ModelSession):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr(replay_stage, "ModelSession", Recorded)
    work = ghoststream.replay(*captured, 0, ["output"])
    next(work)
    model = opened[0].skeleton.model
    assert not model.model.layers[0].mlp.down_proj.weight.is_meta
    work.close()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_mixture_refuses_its_intermediate_before_anything_is_read(captured: tuple[Path, Path]) -> None:
    folder, store = captured
    with pytest.raises(
        UnsupportedModelError, match="Qwen3MoeDecoderLayer with experts has no tap 'mlp_intermediate'"
    ):
        ghoststream.replay(folder, store, 2, ["mlp_intermediate"])


def test_another_model_is_refused(captured: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_tiny("qwen3_moe", tmp_path / "other", intermediate_size=48)
    with pytest.raises(MismatchError, match=r"was not captured from .*other \(.*; use the model that it was"):
        ghoststream.replay(other, captured[1], 0, ["output"])


def test_what_is_not_there_is_refused(
    captured: tuple[Path, Path], tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    folder, store = captured
    with pytest.raises(RequestError, match="layer 6 cannot be run again"):
        ghoststream.replay(folder, store, 6, ["output"])
    with pytest.raises(RequestError, match="no tap 'mlp'"):
        ghoststream.replay(folder, store, 0, ["mlp"])
    with pytest.raises(RequestError, match=r"sequences \[5,9\) are empty or outside of \[0,7\)"):
        ghoststream.replay(folder, store, 0, ["output"], sequences=(5, 9))
    _capture(tiny_llama, tmp_path / "store", ids, layers=(2, 4))
    with pytest.raises(RequestError, match=r"is not for h\[3\].* layers \[2, 4\]"):
        ghoststream.replay(tiny_llama, tmp_path / "store", 3, ["output"])
    with pytest.raises(StoreError):
        ghoststream.replay(tiny_llama, tiny_llama, 3, ["output"])


class Log:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0

    def start(self, task: str, total: int, unit: str) -> None:
        self.lines.append(f"{task}: {total} {unit}")

    def advance(self, amount: int) -> None:
        self.done += amount

    def finish(self) -> None:
        self.lines.append("finished")

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounded_states_are_refused_or_spoken_of(
    dtype: str, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    _capture(tiny_llama, tmp_path / "store", ids, store_dtype=dtype)
    with pytest.raises(
        MismatchError, match=rf"computed in float32 and rounded to {dtype}.* set allow_rounded"
    ):
        ghoststream.replay(tiny_llama, tmp_path / "store", 3, ["output"])
    log = Log()
    work = ghoststream.replay(tiny_llama, tmp_path / "store", 3, ["output"], allow_rounded=True, progress=log)
    found = torch.cat([taken["output"] for _, taken in work])
    assert found.dtype == torch.float32
    assert log.lines[0].startswith("warning: the states in ")
    assert log.lines[1:] == ["replaying layer 3: 7 sequences", "finished"]
    assert log.done == 7
    rounded = ghoststream.ActivationStore.open(str(tmp_path / "store")).read(4, 0, 7).float()
    assert not torch.equal(found, rounded)
    assert float((found - rounded).norm() / rounded.norm()) < 0.02
