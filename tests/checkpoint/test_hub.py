"""Hub ids against a stand-in for the hub on loopback: what is asked of it, and what is said of answers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

from ghoststream.checkpoint import CheckpointIndex
from ghoststream.checkpoint.hub import ResolvedModel, resolve_checkpoint, resolve_headers, resolve_model
from ghoststream.errors import (
    BudgetError,
    CheckpointError,
    GhoststreamError,
    InputNotFoundError,
    UnsupportedModelError,
)
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import run

pytestmark = pytest.mark.unit
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Hub:
    """Answers for one model, ``org/name``, from a folder, and notes which files were sent, and how much."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent: list[tuple[str, int]] = []
        self.is_gone, self.fails = False, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def names(self) -> list[str]:
        """The files that were sent, each once."""
        return sorted({name for name, _ in self.sent})

    @property
    def weights(self) -> list[str]:
        return [name for name in self.names if name.endswith(".safetensors")]

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        files = {one.relative_to(self.root).as_posix(): one for one in self.root.rglob("*") if one.is_file()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        code, body, headers, name = 404, b"{}", {"X-Error-Code": "EntryNotFound"}, None
        if self.is_gone:
            request.close_connection = True
            return
        if self.fails:
            code = 503
        elif "/tree/" in path:
            code, body = 200, json.dumps([_listed(name, file) for name, file in files.items()]).encode()
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            code, body = 200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif (found := re.match(r"/org/name/resolve/[^/]+/(.*)", path)) and found[1] in files:
            name, code, body = found[1], 200, files[found[1]].read_bytes()
            headers = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": COMMIT}
            wanted = re.match(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
            if wanted:
                code, body = 206, body[int(wanted[1]) : int(wanted[2]) + 1]
        request.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)
            self.sent += [] if name is None else [(name, len(body))]


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _listed(name: str, file: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    root = Path(shutil.copytree(tiny_llama, tmp_path / "repo"))
    for name in (
        "consolidated.safetensors",
        "original/consolidated.00.safetensors",
        "other/model.safetensors",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(tiny_llama.glob("*.safetensors")), root / name)
    for name in (
        "original/params.json",
        "consolidated.safetensors.index.json",
        "pytorch_model.bin",
        "run.sh",
    ):
        (root / name).write_text("{}")
    for name in (
        "tokenizer.json",
        "LICENSE",
        "chat_templates/tool.jinja",
        "README.md",
        "tokenization_own.py",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps({"name": name}))  # the cache keeps equal files once
    made = Hub(root)
    address = f"http://127.0.0.1:{made.server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.server.shutdown()
    made.server.server_close()


def _edit_config(hub: Hub, **changed: Any) -> None:
    path = hub.root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def _shards(root: Path) -> list[str]:
    return sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values()))


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == ResolvedModel(str(tmp_path), tmp_path.resolve(), None)


def test_only_the_shards_of_the_index_are_downloaded(hub: Hub) -> None:
    found = resolve_checkpoint("org/name")
    assert (found.name, found.commit, found.root.name) == ("org/name", COMMIT, COMMIT)
    assert hub.weights == _shards(hub.root)
    beside = {"tokenizer.json", "LICENSE", "chat_templates/tool.jinja", "README.md", "tokenization_own.py"}
    beside |= {"config.json", "generation_config.json", INDEX}
    assert set(hub.names) == {*hub.weights, *beside}
    assert [name for name, _ in hub.sent][:2] == ["config.json", INDEX]
    here, there = (CheckpointIndex.open(root) for root in (found.root, hub.root))
    assert here.tensors == there.tensors
    hub.sent.clear()
    assert resolve_checkpoint("org/name") == found
    assert hub.sent == [], "nothing is downloaded twice"


def test_a_single_file_comes_before_an_index_that_was_left_over(hub: Hub, tmp_path: Path) -> None:
    single = save_tiny("llama", tmp_path / "single", max_shard_size="5MB")
    shutil.copy(single / SINGLE, hub.root / SINGLE)
    resolve_checkpoint("org/name")
    assert hub.weights == [SINGLE]


def test_an_architecture_that_is_refused_costs_its_configuration(hub: Hub) -> None:
    _edit_config(hub, model_type="mamba")
    for work in (resolve_checkpoint, resolve_headers):
        with pytest.raises(UnsupportedModelError, match="recurrent layers"):
            work("org/name")
    assert hub.names == ["config.json"]


def test_an_estimate_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    found = resolve_headers("org/name")
    whole = CheckpointIndex.open(hub.root)
    assert found.root is None
    assert found.config == json.loads((hub.root / "config.json").read_text())
    kept = {name: (entry.shard, entry.dtype_name, entry.shape) for name, entry in whole.tensors.items()}
    assert {
        name: (entry.shard, entry.dtype_name, entry.shape) for name, entry in found.index.tensors.items()
    } == kept
    assert found.index.n_bytes == whole.n_bytes
    assert hub.names == sorted({"config.json", INDEX, *_shards(hub.root)})
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for arguments in (("--no-measure",), ()):
        there, here = (
            run("estimate", name, "--remove", "2", "--json", *arguments) for name in ("org/name", hub.root)
        )
        assert there.exit_code == here.exit_code == 0, there.output
        sizes = [json.loads(result.stdout)["model"] for result in (there, here)]
        for size in sizes:
            size.pop("root")
        assert sizes[0] == sizes[1]


def test_headers_longer_than_the_first_request_are_read_whole(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(hub.root)
    save_tiny(
        "llama", hub.root, num_hidden_layers=200, hidden_size=4, intermediate_size=4, max_shard_size="5MB"
    )
    found = resolve_headers("org/name")
    assert found.index.tensors.keys() == CheckpointIndex.open(hub.root).tensors.keys()
    header = int.from_bytes((hub.root / SINGLE).read_bytes()[:8], "little")
    assert [size for name, size in hub.sent if name == SINGLE] == [100_001, header]


def test_headers_of_a_model_that_is_here_are_not_fetched(hub: Hub) -> None:
    root = resolve_checkpoint("org/name").root
    hub.sent.clear()
    assert resolve_headers("org/name").root == root
    assert hub.sent == []


def test_an_index_that_names_a_missing_shard_is_refused_before_weights(hub: Hub) -> None:
    (hub.root / _shards(hub.root)[1]).unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002"):
        resolve_checkpoint("org/name")
    assert hub.weights == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": None, "pytorch_model.bin": "x"}, "holds pytorch_model.bin"),
        ({"config.json": None, "model.fp16.safetensors": "x"}, "as the variant 'fp16' only"),
        ({"config.json": None, "consolidated.safetensors": "x"}, "holds consolidated.safetensors"),
        ({"config.json": None}, "has no safetensors files"),
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "merge it first: load org/base"),
        ({"readme.txt": "x"}, "has no config.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_without_safetensors_are_refused(files: dict[str, str | None], said: str, hub: Hub) -> None:
    config = (hub.root / "config.json").read_text()
    shutil.rmtree(hub.root)
    hub.root.mkdir()
    for name, text in files.items():
        (hub.root / name).write_text(config if text is None else text)
    with pytest.raises(GhoststreamError, match=said):
        resolve_checkpoint("org/name")
    assert set(hub.names) <= {"config.json", "adapter_config.json"}


def test_the_disk_is_checked_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - what shutil returns
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(20_000, 10_000, 10_000))
    with pytest.raises(BudgetError, match="the download of org/name"):
        resolve_model("org/name")
    assert hub.weights == []


def _as_from_pretrained_leaves_it(hub: Hub) -> Path:
    """Fill the cache by transformers itself."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("org/name", cache_dir=constants.HF_HUB_CACHE)
    hub.sent.clear()
    return Path(constants.HF_HUB_CACHE) / "models--org--name" / "snapshots" / COMMIT


Stop = Callable[[Hub, pytest.MonkeyPatch], None]


def _offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch
    hub.is_gone = True


def _failing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch
    hub.fails = True


@pytest.mark.parametrize("stop", [_offline, _stopped, _failing])
def test_the_cache_of_from_pretrained_is_enough_without_the_hub(
    stop: Stop, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _as_from_pretrained_leaves_it(hub)
    assert not (snapshot / "README.md").exists()
    stop(hub, monkeypatch)
    assert resolve_checkpoint("org/name").root == snapshot
    assert resolve_checkpoint("org/name", revision=COMMIT).root == snapshot
    assert resolve_headers("org/name").index.tensors == CheckpointIndex.open(hub.root).tensors
    (snapshot / _shards(hub.root)[1]).unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002.* is missing"):
        resolve_headers("org/name")


@pytest.mark.parametrize("stop", [_offline, _stopped])
def test_an_unreachable_hub_says_what_to_do(stop: Stop, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(hub, monkeypatch)
    for work in (resolve_model, resolve_headers):
        with pytest.raises(InputNotFoundError, match=r"'org/name'.*; check the name") as raised:
            work("org/name")
        assert "\n" not in str(raised.value)


def test_a_name_that_the_hub_does_not_have_is_not_looked_for_in_the_cache(hub: Hub) -> None:
    with pytest.raises(InputNotFoundError, match=r"'org/another'.*cannot be had"):
        resolve_model("org/another")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "a/b/c", "~/models/x"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str, hub: Hub) -> None:
    with pytest.raises(InputNotFoundError, match="no model folder at"):
        resolve_model(name)
    assert hub.sent == []
