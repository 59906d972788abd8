"""A complete store on read-only media is read by every command that reads one."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command_bench import LENGTH, digests, run, succeed

pytestmark = pytest.mark.integration

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@pytest.fixture
def media(tiny_llama: Path, tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """A complete store, and the text that it was captured on."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(8, LENGTH), dtype=np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 8, "--length", LENGTH)
    (tmp_path / "media").mkdir()
    succeed("capture", tiny_llama, *text, "--store", tmp_path / "media" / "store")
    (tmp_path / "media" / "store" / ".lock").unlink(missing_ok=True)
    return tmp_path / "media", text


@pytest.fixture
def mounted(media: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every system call that would change something on the media fail as it does on read-only media."""
    root = str(media[0])

    def refuse(function: Any, writes: Any) -> Any:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            places = [str(one) for one in (path, *rest) if isinstance(one, str | os.PathLike)]
            if any(place.startswith(root) for place in places) and writes(*rest, **named):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *rest, **named)

        return call

    def always(*_: Any, **__: Any) -> bool:
        return True

    monkeypatch.setattr(os, "open", refuse(os.open, lambda flags, *_, **__: bool(flags & _WRITING)))
    monkeypatch.setattr(
        builtins, "open", refuse(builtins.open, lambda mode="r", *_, **__: bool(set(mode) & set("wax+")))
    )
    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "utime", "link"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name), always))
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not (str(path).startswith(root) and mode & os.W_OK) and access(path, mode),
    )
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("mounted")
def test_a_complete_store_on_read_only_media_is_accepted(
    media: tuple[Path, tuple[object, ...]], tiny_llama: Path, tmp_path: Path
) -> None:
    (root, text), out = media, tmp_path / "out"
    store, before = root / "store", digests(root)
    succeed("inspect", store)
    succeed("verify", store)
    succeed("select", "--store", store, "--remove", 2, "--out", out / "plan.json")
    plan = ("--plan", out / "plan.json")
    succeed("fit", "--store", store, *plan, "--out", out / "operators.safetensors")
    features = ("--model", tiny_llama, "--operator", "least-squares", "--features", "mlp")
    succeed("fit", "--store", store, *plan, *features, "--out", out / "mlp.safetensors")
    succeed("evaluate", tiny_llama, "--store", store)
    succeed("capture", tiny_llama, *text, "--store", store)
    named = ("--remove", out / "plan.json", "--operator", "ghost")
    whole = ("--layers", "0:7")
    succeed("recover", tiny_llama, *named, *text, "--store", store, *whole, "--out", out / "recovered")
    assert digests(root) == before
    other = run("capture", tiny_llama, *text, "--store", root / "other")
    assert other.exit_code == 2
    assert "other" in other.stderr
