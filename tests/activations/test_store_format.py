from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr

from ghoststream.activations import ActivationStore, manifest, verify_store
from ghoststream.files import canonical_json
from ghoststream.testing.stores import small_layout, small_states, small_store, small_tokens

pytestmark = pytest.mark.unit
REPOSITORY = Path(__file__).parents[2]
ARCHIVES = REPOSITORY / "tests/data/archives"
ARCHIVED = {0: "fcdeb1ee2864f114", 1: "62da477f5d186470", 3: "85aa6590de83cf4e"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_the_code_in_the_format_document_reads_a_store(tmp_path: Path, dtype: str) -> None:
    layout = small_layout(store_dtype=dtype)
    small_store(tmp_path, layout)
    text = (REPOSITORY / "docs/format.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"STORE": str(tmp_path)}
    if dtype == "int8":
        exec(compile(blocks[1].replace("/13", "/3"), "docs/format.md", "exec"), names)
        in_short = names.pop("states")
    exec(compile(blocks[-1], "docs/format.md", "exec"), names)
    expected = small_states(layout, 3)[:2].float().numpy()
    if dtype == "int8":  # by test_scaled as near as they are to be
        np.testing.assert_allclose(names["states"], expected, atol=0.02)
        expected = ActivationStore.open(tmp_path).read_numpy(3, 0, 2)
        np.testing.assert_array_equal(in_short, expected)
    np.testing.assert_array_equal(names["states"], expected)
    np.testing.assert_array_equal(names["tokens"], expected[small_tokens(layout).mask[:2]])


def test_plain_zarr_sees_the_documented_layout(tmp_path: Path) -> None:
    small_store(tmp_path)
    group = zarr.open_group(tmp_path, mode="r")
    assert group.attrs.asdict() == {"encoding-type": "ghoststream-activations", "encoding-version": "1.0"}
    assert sorted(group["hidden"].keys()) == ["0", "1", "2", "3"]  # type: ignore[union-attr]
    array = group["hidden/1"]
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.shards, array.chunks) == ((10, 4, 3), (4, 4, 3), (2, 4, 3))
    assert array.dtype == np.uint16
    assert array.metadata.dimension_names == ("sequence", "position", "channel")  # type: ignore[union-attr]
    assert array.attrs.asdict() == {
        "encoding-type": "ghoststream-hidden-states",
        "encoding-version": "1.0",
        "ghoststream:dtype": "bfloat16",
        "ghoststream:layer": 1,
    }
    inner = json.loads((tmp_path / "hidden/1/zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "crc32c"]
    tokens = {
        name: zarr.open_array(tmp_path / "tokens" / name, mode="r") for name in ("ids", "lengths", "mask")
    }
    found = {name: (token.shape, token.dtype.name) for name, token in tokens.items()}
    assert found == {"ids": ((10, 4), "int32"), "lengths": ((10,), "int32"), "mask": ((10, 4), "bool")}


def test_nothing_in_a_store_tells_when_or_where_it_was_made(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small_store(tmp_path / name)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert content == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
            assert str(tmp_path).encode() not in content


def test_the_manifest_holds_the_checksums_of_every_chunk(tmp_path: Path) -> None:
    layout = small_layout()
    small_store(tmp_path, layout)
    arrays = json.loads((tmp_path / "manifest.json").read_text())["arrays"]
    for layer in layout.layers:
        for key, record in arrays[f"hidden/{layer}"]["shards"].items():
            content = (tmp_path / key).read_bytes()
            index = len(content) - 2 * 16 - 4
            n_chunks = 1 if "/c.2." in key else 2
            size = index // n_chunks
            parts = [content[start : start + size] for start in range(0, index, size)] + [content[index:]]
            assert len(parts) == n_chunks + 1
            expected = [google_crc32c.value(part[:-4]).to_bytes(4, "little").hex() for part in parts]
            assert record["checksums"] == "".join(expected)
    assert all("checksums" not in record for record in arrays["tokens/ids"]["shards"].values())


@pytest.mark.parametrize(("version", "name"), [("1.0", "store-1.zip"), ("1.1", "store-1.1.zip")])
def test_a_store_written_by_version_1_opens(tmp_path: Path, version: str, name: str) -> None:
    with zipfile.ZipFile(ARCHIVES / name) as archive:
        archive.extractall(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["encoding-version"] == version
    assert verify_store(tmp_path) == []
    store = ActivationStore.open(tmp_path)
    assert store.complete
    assert store.layers == (0, 1, 3)
    assert (store.n_layers, store.n_sequences, store.length, store.hidden) == (3, 10, 4, 3)
    assert store.dtype == torch.bfloat16
    assert store.recipe == {"sequences": 10, "text": {"seed": 1, "spec": "python-docs"}}
    assert store.tokens().digest() == store.tokens_digest
    found = {
        layer: hashlib.sha256(store.read(layer, 0, 10).view(torch.uint16).numpy().tobytes()).hexdigest()[:16]
        for layer in store.layers
    }
    assert found == ARCHIVED
    assert torch.equal(store.read(1, 5, 7), store.read(1, 0, 10)[5:7])


def test_a_manifest_spells_each_record_once_however_often_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spelled: list[object] = []

    def spell(data: object) -> str:
        spelled.append(data)
        return canonical_json(data)

    monkeypatch.setattr(manifest, "canonical_json", spell)
    counts = []
    for n_layers in (20, 80):
        store = manifest.Manifest(small_layout(), {}, {}, "sha256:0", {})
        spelled.clear()
        for layer in range(n_layers):
            record = manifest.ObjectRecord(f"sha256:{layer}", layer)
            store.metadata[f"{layer}/zarr.json"] = record
            store.arrays[f"{layer}"] = {f"{layer}/c/0": record}
            content = store.to_bytes()
        counts.append(len(spelled))
        assert manifest.Manifest.from_bytes(content, "here").arrays == store.arrays
    assert counts[1] <= 4.1 * counts[0]
