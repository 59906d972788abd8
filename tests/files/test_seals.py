"""Seals: whatever was written and has changed since is found, in JSON and in tensor files."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from ghoststream.errors import ArtifactError, InputNotFoundError
from ghoststream.files import is_sealed, read_kept, read_sealed_json, sealed, unseal, write_sealed_json
from ghoststream.files.seals import read_tensor_header
from ghoststream.files.tensor_files import TensorFile, array_digest, require_whole, write_tensors

pytestmark = pytest.mark.unit
DATA = {"b": [1, 2.5, None, True], "a": {"text": "naïve", "n": 10**30}}
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "z": np.arange(6.0).reshape(2, 3),
    "a": np.full((1, 1), 1.5, np.float32),
    "none": np.zeros((0, 4)),
}


def test_the_digest_is_that_of_the_other_entries_as_canonical_json(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", DATA)
    found = json.loads((tmp_path / "a.json").read_text())
    digest = found.pop("digest")
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert read_sealed_json(tmp_path / "a.json") == DATA
    assert sealed(sealed(DATA)) == sealed(DATA)


def test_every_changed_bit_of_sealed_json_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, DATA)
    content = path.read_bytes()
    found = []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(changed)
        try:
            assert read_sealed_json(path) == DATA
        except ArtifactError as error:
            found.append(str(error.args[0]))
    # The others turn blanks between tokens into others.
    assert len(found) > 0.9 * len(content)
    assert all(str(path) in message for message in found)


def test_the_documentation_says_how_to_check_a_file_without_ghoststream(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/format.md").read_text()
    (code, *_) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    plan, operators = tmp_path / "plan.json", tmp_path / "operators.safetensors"
    write_sealed_json(plan, DATA)
    write_tensors(operators, ARRAYS, {"norm_epsilon": 1e-5})
    assert names["is_sound"](plan)
    assert names["has_sound_header"](operators)
    plan.write_text(plan.read_text().replace("2.5", "2.6"))
    operators.write_bytes(operators.read_bytes().replace(b"1e-05", b"1e-02"))
    assert not names["is_sound"](plan)
    assert not names["has_sound_header"](operators)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "does not hold a JSON object"),
        ({"a": 1}, "carries no digest"),
        ({"a": 1, "digest": None}, "fails its digest"),
        ({"a": float("nan"), "digest": "sha256:0"}, "fails its digest"),
        ({"digest": [1]}, "fails its digest"),
    ],
)
def test_what_is_not_sealed_is_refused_with_what_to_do(data: Any, says: str) -> None:
    with pytest.raises(ArtifactError, match=rf"x\.json {says}.*; select again"):
        unseal(data, "x.json", advice="select again")
    assert not (isinstance(data, dict) and is_sealed(data))


def test_a_tensor_file_is_one_of_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS, {"step": 3})
    loaded = load_file(path)
    assert sorted(loaded) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_tensor_file_says_the_digests_of_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS, {"step": 3})
    with TensorFile(path) as file:
        assert file.metadata == {"step": 3}
        assert file.shapes() == {"a": (1, 1), "none": (0, 4), "z": (2, 3)}
        for name, array in ARRAYS.items():
            expected = "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()
            assert file.digests[name] == array_digest(array) == expected
            np.testing.assert_array_equal(file.read(name), array)
    assert require_whole(path) == path


def test_every_changed_bit_of_a_tensor_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS, {"step": 3, "norm_epsilon": 1e-5})
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            require_whole(path)
    for end in range(0, len(content), 31):
        path.write_bytes(content[:end])
        with pytest.raises(ArtifactError):
            require_whole(path)


def test_of_a_damaged_tensor_file_the_other_tensors_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, ARRAYS, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last tensor in the order of names
    path.write_bytes(content)
    with TensorFile(path, advice="fit again") as file:
        np.testing.assert_array_equal(file.read("a"), ARRAYS["a"])
        with pytest.raises(ArtifactError, match=r"tensor z fails its digest, the file is damaged; fit again"):
            file.read("z")


@pytest.mark.parametrize("text", ["{", "[]", "", '{"tensors": []}', '{"tensors": {}}'])
def test_a_file_of_another_writer_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(1)}, path, {"ghoststream": text} if text else None)
    with pytest.raises(ArtifactError, match=r"a\.safetensors .*give another"):
        read_tensor_header(path, advice="give another")
    with pytest.raises(InputNotFoundError, match="there is no file"):
        TensorFile(tmp_path / "none")


def test_kept_work_that_is_damaged_is_told_and_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.json"
    with caplog.at_level(logging.WARNING):
        assert read_kept(read_sealed_json, path) is None
        assert caplog.text == ""
        write_sealed_json(path, {"a": 1})
        assert read_kept(read_sealed_json, path) == {"a": 1}
        assert read_kept(lambda place: read_sealed_json(place)["b"], path) is None
        path.write_text(path.read_text().replace("1", "2", 1))
        assert read_kept(read_sealed_json, path) is None
    assert "made again" in caplog.records[0].getMessage()
    assert f"{path} fails its digest" in caplog.records[1].getMessage()
