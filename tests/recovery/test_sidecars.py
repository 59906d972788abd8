"""What lies beside the weights: no link leads out of the folder, and no code is named that is not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import RequestError
from ghoststream.files import read_json
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery.sidecars import copy_sidecars, find_sidecars, sidecars_digest
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators
from tests.helpers.command_bench import run

pytestmark = pytest.mark.unit
PLAN = PruningPlan.parse(6, "2:4")
LINKED = (
    "merges.txt",
    "README.md",
    "LICENSE",
    "chat_template.jinja",
    "chat_templates/tool.jinja",
    "own.json",
)


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "folder"])
def test_links_out_of_the_folder_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    root, secret = tmp_path / "model", tmp_path / "elsewhere" / Path(name).name
    link = root / name
    secret.parent.mkdir()
    secret.write_text("TOPSECRET")
    root.mkdir()
    if kind == "folder":
        if "/" not in name:
            pytest.skip("only templates lie in folders")
        link.parent.symlink_to(secret.parent)
    else:
        link.parent.mkdir(exist_ok=True)
        target = {
            "absolute": secret,
            "relative": Path(os.path.relpath(secret, link.parent)),
            "chain": Path("inner"),
        }[kind]
        link.symlink_to(target)
        (link.parent / "inner").symlink_to(secret)
    for work in (find_sidecars, sidecars_digest, lambda root: copy_sidecars(root, tmp_path / "out")):
        with pytest.raises(
            RequestError, match=r"is a link out of the model's folder, to .*elsewhere"
        ) as raised:
            work(root)
        assert "TOPSECRET" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def _cache(tmp_path: Path, files: dict[str, str]) -> Path:
    """Lay files out as the hub's cache does."""
    repo = tmp_path / "models--org--name"
    root = repo / "snapshots" / "0123"
    (repo / "blobs").mkdir(parents=True)
    for number, (name, text) in enumerate(files.items()):
        (repo / "blobs" / str(number)).write_text(text)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(os.path.relpath(repo / "blobs" / str(number), (root / name).parent))
    return root


def test_a_hub_cache_and_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    texts = {"merges.txt": "a b", "README.md": "card", "chat_templates/tool.jinja": "{{ x }}"}
    root = _cache(tmp_path, texts)
    (root / "vocab.txt").symlink_to("merges.txt")
    (tmp_path / "out").mkdir()
    copy_sidecars(root, tmp_path / "out")
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")
    }
    assert {name: path.read_text() for name, path in written.items()} == {
        "merges.txt": "a b",
        "vocab.txt": "a b",
        "README.base.md": "card",
        "chat_templates/tool.jinja": "{{ x }}",
    }
    assert not any(path.is_symlink() for path in written.values())


@pytest.mark.parametrize("where", ["blobs", "a blob", "beside"])
def test_a_folder_that_looks_like_a_hub_cache_opens_no_way_out(where: str, tmp_path: Path) -> None:
    secret = tmp_path / "etc" / "0"
    secret.parent.mkdir()
    secret.write_text("TOPSECRET")
    root = _cache(tmp_path, {"merges.txt": "a b"})
    blobs = root.parent.parent / "blobs"
    if where == "beside":
        (blobs.parent / "refs").write_text("TOPSECRET")
        (root / "LICENSE").symlink_to("../../refs")
    else:
        (blobs / "0").unlink()
        if where == "blobs":
            blobs.rmdir()
            blobs.symlink_to(secret.parent)
        else:
            (blobs / "0").symlink_to(secret)
    with pytest.raises(RequestError, match="is a link out of the model's folder"):
        find_sidecars(root)


def test_commands_refuse_a_link_before_any_work(tmp_path: Path) -> None:
    base, out = save_tiny("llama", tmp_path / "base"), tmp_path / "out"
    (tmp_path / "secret").write_text("TOPSECRET")
    (base / "merges.txt").symlink_to(tmp_path / "secret")
    random_operators(PLAN, 32).save(tmp_path / "o.safetensors")
    result = run("export", base, "--operators", tmp_path / "o.safetensors", "--out", out)
    assert result.exit_code == 2
    assert "merges.txt is a link out of the model's folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))] == []


@pytest.mark.parametrize("command", ["recover", "export"])
def test_commands_refuse_a_file_that_may_not_be_read_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = save_tiny("llama", tmp_path / "base"), tmp_path / "out"
    (base / "LICENSE").write_text("mine")
    np.save(tmp_path / "ids.npy", np.arange(64).reshape(4, 16))
    random_operators(PLAN, 32).save(tmp_path / "o.safetensors")
    really_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        # By name, as the permissions of a file do not hold for root.
        if str(path).endswith("LICENSE"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    arguments = {
        "export": ("--operators", tmp_path / "o.safetensors"),
        "recover": ("--remove", 2, "--calibration", f"ids:{tmp_path / 'ids.npy'}", "--length", 16),
    }
    result = run(command, base, *arguments[command], "--out", out)
    assert result.exit_code == 2
    assert str(base / "LICENSE") in result.stderr
    assert "Permission denied" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))] == []


TOKENIZER = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


@pytest.mark.parametrize("stands", [False, True])
def test_every_auto_map_names_code_that_is_there(stands: bool, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    maps: dict[str, dict[str, Any]] = {
        "config.json": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "gone.Model"},
        "tokenizer_config.json": {**TOKENIZER, "AutoProcessor": "gone.Processor"},
        "processor_config.json": {"AutoProcessor": "gone.Processor"},
        "generation_config.json": {"AutoX": "org/name--remote.X"},
    }
    for name, auto_map in maps.items():
        data = read_json(base / name) if (base / name).exists() else {"own": "kept ü"}
        (base / name).write_text(json.dumps({**data, "auto_map": auto_map}))
    (base / "configuration_own.py").write_text("class OwnConfig: ...\n")
    (base / "tokenization_own.py").write_text("from .vocabulary_own import words\nclass OwnTokenizer: ...\n")
    (base / "vocabulary_own.py").write_text("words = ()\n")
    (base / "unrelated.py").write_text("raise SystemExit\n")
    identity = OperatorSet(PLAN, "none", (BoundaryOperator(Span(2, 4), "identity"),), 32, {})
    out = tmp_path / "out"
    export(base, random_operators(PLAN, 32) if stands else identity, out)
    for path in out.glob("*.json"):
        data = read_json(path)
        for value in data.get("auto_map", {}).values() if isinstance(data, dict) else ():
            for name in value if isinstance(value, list) else [value]:
                if name is not None and "--" not in name:
                    assert (out / f"{name.split('.')[0]}.py").is_file(), (path.name, name)
    assert ("auto_map" in read_json(out / "config.json")) == stands
    assert read_json(out / "tokenizer_config.json") == {"own": "kept ü", "auto_map": TOKENIZER}
    assert read_json(out / "processor_config.json") == {"own": "kept ü"}
    assert read_json(out / "generation_config.json")["auto_map"] == maps["generation_config.json"]
    code = {path.name for path in out.glob("*.py")} - {"modeling_ghosted.py"}
    assert code == {"tokenization_own.py", "vocabulary_own.py"}
    assert run("verify", out).exit_code == 0
