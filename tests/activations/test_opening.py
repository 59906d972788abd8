from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zarr.storage import MemoryStore

from ghoststream.activations import ActivationStore, StoreRequest, verify_store
from ghoststream.activations.encoding import MANIFEST
from ghoststream.activations.manifest import Manifest
from ghoststream.errors import InputNotFoundError, MismatchError, OutputExistsError, RequestError, StoreError
from ghoststream.files import json_digest
from ghoststream.files.atomic import temporary_name
from ghoststream.testing.stores import (
    small_layout,
    small_request,
    small_states,
    small_store,
    small_tokens,
    write_layer,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    small_store(tmp_path / "store")
    return tmp_path / "store"


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def sign(data: dict[str, Any]) -> None:
    data["digest"] = json_digest({key: value for key, value in data.items() if key != "digest"})


def test_an_edited_shape_is_found(root: Path) -> None:
    edit_json(root / "hidden/1/zarr.json", lambda data: data.update(shape=[20, 4, 3]))
    with pytest.raises(StoreError, match=r"is damaged: hidden/1/zarr.json was changed .* capture again"):
        ActivationStore.open(root)


def test_a_missing_metadata_file_is_found(root: Path) -> None:
    (root / "tokens/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"tokens/zarr.json is missing"):
        ActivationStore.open(root)


def test_missing_and_truncated_shards_are_found(root: Path) -> None:
    (root / "hidden/2/c.1.0.0").unlink()
    (root / "hidden/0/c.0.0.0").write_bytes(b"short")
    for layer in (1, 3):
        (root / f"hidden/{layer}/c.0.0.0").unlink()
    with pytest.raises(StoreError) as caught:
        ActivationStore.open(root)
    message = str(caught.value)
    assert "hidden/0/c.0.0.0 has 5 bytes, and 140 were committed" in message
    assert "hidden/1/c.0.0.0 is missing, though it was committed" in message
    assert "(and 1 more)" in message


def test_an_edited_manifest_is_found(root: Path) -> None:
    edit_json(root / "manifest.json", lambda data: data["recipe"].update(sequences=11))
    with pytest.raises(StoreError, match=r"manifest.json was changed after it was written"):
        ActivationStore.open(root)
    assert "manifest.json was changed" in verify_store(root)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"recipe"', "is not readable JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"{}", "is not 'ghoststream-manifest': its encoding-type is None"),
    ],
)
def test_a_broken_manifest_is_found(root: Path, content: bytes, message: str) -> None:
    (root / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        ActivationStore.open(root)


def test_a_manifest_without_a_part_is_found(root: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        del data["layout"]["hidden"]
        sign(data)

    edit_json(root / "manifest.json", change)
    with pytest.raises(
        StoreError, match=r"lacks a part or has one of the wrong kind \(KeyError\('hidden'\)\)"
    ):
        ActivationStore.open(root)


@pytest.mark.parametrize("version", ["1.2", "2.0"])
def test_a_newer_manifest_asks_for_an_update(root: Path, version: str) -> None:
    edit_json(root / "manifest.json", lambda data: data.update({"encoding-version": version}))
    with pytest.raises(StoreError, match=rf"encoding-version {version}, newer than 1.1.*update it"):
        ActivationStore.open(root)


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(StoreError, match=r"x has the encoding-version 'new'"):
        MANIFEST.require({"encoding-type": MANIFEST.type, "encoding-version": "new"}, "x")


def test_a_newer_element_asks_for_an_update(root: Path) -> None:
    key = "hidden/1/zarr.json"
    edit_json(root / key, lambda data: data["attributes"].update({"encoding-version": "1.7"}))
    content = (root / key).read_bytes()

    def change(data: dict[str, Any]) -> None:
        from ghoststream.files import bytes_digest

        data["metadata"][key] = {"digest": bytes_digest(content), "size": len(content)}
        sign(data)

    edit_json(root / "manifest.json", change)
    with pytest.raises(StoreError, match=r"hidden/1/zarr.json has encoding-version 1.7, newer than 1.1"):
        ActivationStore.open(root)


def test_the_manifest_survives_its_own_round_trip(root: Path) -> None:
    content = (root / "manifest.json").read_bytes()
    assert Manifest.from_bytes(content, "manifest").to_bytes() == content


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"no activation store at .*nowhere; check the path"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(InputNotFoundError, match="no activation store"):
        ActivationStore.open(tmp_path)
    with pytest.raises(InputNotFoundError, match="no activation store"):
        ActivationStore.open(MemoryStore(), "r+")
    assert not (tmp_path / "nowhere").exists()


def test_something_else_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is not an activation store: it has no manifest.json"):
        ActivationStore.open(tmp_path)
    with pytest.raises(OutputExistsError, match=r"holds something else already; choose another place"):
        ActivationStore.create_or_resume(tmp_path, **small_request())
    with pytest.raises(RequestError, match=r"notes.txt is a file, and an activation store is a folder"):
        ActivationStore.open(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_only_looks_like_a_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/data").write_text("mine")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(OutputExistsError, match="something else"):
        ActivationStore.create(tmp_path, **small_request())
    assert (tmp_path / "hidden/data").read_text() == "mine"


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(RequestError, match=r"cannot open nosuch://x: .*install the fsspec package"):
        ActivationStore.open("nosuch://x")


def test_an_interrupted_creation_is_named_and_then_repeated(root: Path) -> None:
    (root / "manifest.json").unlink()
    shutil.rmtree(root / "hidden/3")
    (root / "hidden/0/c.0.0.0123.partial").write_text("half")
    with pytest.raises(StoreError, match=r"its creation was interrupted; run the same capture again"):
        ActivationStore.open(root)
    with ActivationStore.create(root, **small_request()) as store:
        assert store.completed_layers() == ()
    assert list(root.rglob("*.partial")) == list(root.rglob("hidden/*/c.*")) == []


@pytest.mark.parametrize("names", [["zarr.0123.partial"], [".lock"], ["run.json"], []])
def test_a_creation_killed_at_its_first_file_is_repeated(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("" if name == ".lock" else "{}")
    with ActivationStore.create_or_resume(tmp_path, **small_request()) as store:
        assert store.completed_layers() == ()


def test_create_never_overwrites_a_store(root: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"holds an activation store already"):
        ActivationStore.create(root, **small_request())
    assert verify_store(root) == []


def _other_recipe(request: StoreRequest) -> None:
    request["recipe"] = {**request["recipe"], "text": {"spec": "wikitext2", "seed": 0}}


def _other_model(request: StoreRequest) -> None:
    request["fingerprint"] = {"checkpoint": {"digest": "sha256:other"}}


def _other_layers(request: StoreRequest) -> None:
    request["layers"] = (0, 1)


def _other_tokens(request: StoreRequest) -> None:
    request["tokens"] = small_tokens(small_layout(), seed=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_recipe, r'recipe.text.spec is "python-docs", asked for "wikitext2"'),
        (_other_model, r'fingerprint.checkpoint.digest is .*, asked for "sha256:other"'),
        (_other_layers, r"layout.layers is \[0, 1, 2, 3\], asked for \[0, 1\]"),
        (_other_tokens, r"tokens_digest is"),
    ],
)
def test_resuming_for_another_request_says_what_differs(
    root: Path, change: Callable[[StoreRequest], None], message: str
) -> None:
    request = small_request()
    change(request)
    with pytest.raises(MismatchError, match=message):
        ActivationStore.create_or_resume(root, **request)


def test_resuming_clears_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    layout = small_layout()
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        write_layer(store, 0, small_states(layout, 0))
    strays = ["hidden/1/c.0.0.0", "hidden/1/c.1.abc.partial", "scratch-2/zarr.json"]
    strays += ["hidden/1/zarr.0123.partial", temporary_name(Path("manifest.json")).name]
    kept = ["run.json", "notes/mine.txt", "hidden/1/thesis.txt", "hidden/notes.partial", ".mine.json.partial"]
    for name in strays + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert verify_store(tmp_path) == []
    with ActivationStore.create_or_resume(tmp_path, **small_request(layout)) as store:
        assert torch.equal(store.read(0, 0, 10), small_states(layout, 0))
        assert not any((tmp_path / name).exists() for name in [*strays, "scratch-2"])
        assert all((tmp_path / name).exists() for name in kept)
        write_layer(store, 1, small_states(layout, 1))
        assert torch.equal(store.read(1, 0, 10), small_states(layout, 1))


def test_a_failed_open_gives_the_lock_back(root: Path) -> None:
    manifest = (root / "manifest.json").read_bytes()
    (root / "manifest.json").write_bytes(b"")
    with pytest.raises(StoreError):
        ActivationStore.open(root, "r+")
    (root / "manifest.json").write_bytes(manifest)
    ActivationStore.open(root, "r+").close()


def test_a_pipe_in_the_place_of_metadata_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    small_store(tmp_path / "store")
    metadata = tmp_path / "store" / "hidden" / "zarr.json"
    metadata.unlink()
    os.mkfifo(metadata)
    with pytest.raises(RequestError, match=r"zarr\.json is a pipe; give a regular file"):
        ActivationStore.open(tmp_path / "store")
