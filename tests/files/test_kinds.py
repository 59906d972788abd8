"""What is given in the place of something else is named for what it is; what is damaged is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import ghoststream as gs
from ghoststream.errors import ArtifactError, PlanError, RequestError
from ghoststream.files.kinds import JSON, TENSORS, kind_of, require_kind
from ghoststream.operators import OperatorSet
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from tests.helpers.recovered_models import make_operators

pytestmark = pytest.mark.unit
_OF_TENSORS = "and an operators file of `ghoststream fit` is wanted"
_OF_A_PLAN = "and a plan file of `ghoststream select` is wanted"


@given(names=st.lists(st.from_regex(r"[a-z]{1,40}", fullmatch=True), min_size=1, max_size=8, unique=True))
def test_tensors_are_known_whatever_the_length_of_their_header(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("kinds") / "any.bin"
    path.write_bytes(save({name: np.zeros(1, np.float32) for name in names}))
    assert kind_of(path) == TENSORS


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", b' {"spans": []}', JSON),
        ("a.txt", "Once upon a time, \u201csaid\u201d he, ".encode() * 40, "a text file"),
        ("m.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("m.pt", b"PK\3\4\0\0\0\0", None),
        ("cut.json", b"spans: []", None),
        ("empty", b"", None),
    ],
)
def test_a_file_is_known_by_its_first_bytes(
    name: str, content: bytes, kind: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert kind_of(path) == kind


def test_what_is_wanted_is_said(tmp_path: Path) -> None:
    plan, operators, text = tmp_path / "plan.json", tmp_path / "o.safetensors", tmp_path / "calibration.txt"
    Selection(PruningPlan.parse(6, "2:4")).save(plan)
    make_operators().save(operators)
    text.write_text("Once upon a time", encoding="utf-8")
    for path, kind in ((plan, "JSON"), (text, "a text file"), (tmp_path, "a folder")):
        with pytest.raises(RequestError, match=f"{path.name} is {kind}, {_OF_TENSORS}"):
            OperatorSet.load(path)
    for path, kind in ((operators, "a safetensors file"), (text, "a text file")):
        with pytest.raises(RequestError, match=f"{path.name} is {kind}, {_OF_A_PLAN}"):
            Selection.load(path)


def test_json_of_another_kind_is_no_plan_of_another_version(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, (2, 8)))
    figures = tmp_path / "figures.json"
    gs.evaluate([tiny_llama], text=gs.Text(spec=f"ids:{tmp_path / 'ids.npy'}", length=8), out=figures)
    assert json.loads(figures.read_text())["encoding-type"] == "ghoststream-evaluation"
    with pytest.raises(PlanError, match="is not a pruning plan"):
        Selection.load(figures)


def test_a_damaged_file_is_damaged(tmp_path: Path) -> None:
    plan, operators = tmp_path / "plan.json", tmp_path / "o.safetensors"
    Selection(PruningPlan.parse(6, "2:4")).save(plan)
    make_operators().save(operators)
    for path, load in ((plan, Selection.load), (operators, OperatorSet.load)):
        content = path.read_bytes()
        for length in (0, 1, 4, 9, len(content) // 2):
            path.write_bytes(content[:length])
            with pytest.raises(ArtifactError):
                load(path)


def test_a_store_in_the_place_of_a_model_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, (2, 8)))
    text = gs.Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=2, length=8)
    gs.capture(tiny_llama, calibration=text, store=tmp_path / "m.store")
    with pytest.raises(RequestError, match=r"m\.store is an activation store, and a model folder is wanted"):
        gs.evaluate([tiny_llama, tmp_path / "m.store"], text=text)


def test_nothing_there_is_not_a_kind(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file"):
        require_kind(tmp_path / "absent", JSON, "a plan")
