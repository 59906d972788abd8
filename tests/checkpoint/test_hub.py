"""Hub ids against a stand-in for the hub: what is asked of it, and what is said when it cannot answer."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from ghoststream.checkpoint.hub import ResolvedModel, resolve_model
from ghoststream.errors import BudgetError, InputNotFoundError, UnsupportedModelError

pytestmark = pytest.mark.unit
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers for one model of two shards."""

    def __init__(
        self, root: Path, *, names: tuple[str, ...] = ("model.safetensors",), size: int = 10
    ) -> None:
        self.root = root
        self.files = [SimpleNamespace(rfilename=name, size=size) for name in names]
        self.asked: list[dict[str, Any]] = []

    def model_info(self, model_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        self.asked.append({"model": model_id, "revision": revision})
        return SimpleNamespace(sha=COMMIT, siblings=self.files)

    def download(self, model_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append({"model": model_id, "revision": revision, "patterns": allow_patterns})
        folder = self.root / COMMIT
        folder.mkdir()
        return str(folder)


def _connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.root))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == ResolvedModel(str(tmp_path), tmp_path.resolve(), None)


def test_the_commit_is_pinned_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    _connect(monkeypatch, hub)
    found = resolve_model("org/name", revision="main")
    assert found == ResolvedModel("org/name", tmp_path / COMMIT, COMMIT)
    asked, downloaded = hub.asked
    assert asked == {"model": "org/name", "revision": "main"}
    assert downloaded["revision"] == COMMIT
    assert "*.safetensors" in downloaded["patterns"]
    assert not {"*.bin", "*.gguf", "*"} & set(downloaded["patterns"])


def test_models_without_safetensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _connect(monkeypatch, Hub(tmp_path, names=("pytorch_model.bin",)))
    with pytest.raises(UnsupportedModelError, match="org/name has no safetensors files"):
        resolve_model("org/name")


def test_the_disk_is_checked_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, names=("a.safetensors", "b.safetensors"), size=600)
    _connect(monkeypatch, hub)
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - what shutil returns
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(2000, 1000, 1000))
    with pytest.raises(BudgetError, match="the download of org/name"):
        resolve_model("org/name")
    assert len(hub.asked) == 1, "nothing was downloaded"


class _NoConnection(Exception):
    """What an HTTP library raises: of no kind that the standard library knows."""


@pytest.mark.parametrize("kind", [OSError, _NoConnection])
def test_an_unreachable_hub_says_what_to_do(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    _connect(monkeypatch, hub)

    def fail(*_args: Any, **_kwargs: Any) -> str:
        msg = "no route to host\nand more lines"
        raise kind(msg)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        InputNotFoundError, match=r"'org/name'.*\(no route to host\); check the name"
    ) as raised:
        resolve_model("org/name")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "a/b/c", "~/models/x"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    _connect(monkeypatch, hub)
    with pytest.raises(InputNotFoundError, match="no model folder at"):
        resolve_model(name)
    assert hub.asked == []
