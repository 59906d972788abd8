"""Loading a checkpoint's tokenizer, and what is said where that is not possible."""

from __future__ import annotations

import importlib.util
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from ghoststream.text import load_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def _raise(error: Exception) -> Any:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_the_tokenizer_of_a_folder(folder: Path) -> None:
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    assert load_tokenizer(folder)("ab")["input_ids"] == tiny_tokenizer(adds_bos=True)("ab")["input_ids"]


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "LlamaTokenizer"}])
def test_a_folder_without_one(folder: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputNotFoundError, match="has no tokenizer; copy its tokenizer files there, or"):
        load_tokenizer(folder)


def test_a_vocabulary_that_needs_a_package_names_those_that_are_missing(folder: Path) -> None:
    """As transformers itself finds it: Llama's ``tokenizer.model`` without its ``tokenizer.json``."""
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"}
    missing = [package for module, package in packages.items() if not _is_installed(module)]
    if {"sentencepiece", "tiktoken"} & set(missing) != {"sentencepiece", "tiktoken"}:
        pytest.skip("sentencepiece or tiktoken is installed")
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0ea vocabulary")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(RequestError, match=f"is not .* pip install {' '.join(missing)}, or use ids"):
        load_tokenizer(folder)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError("You need to install fugashi to use MecabTokenizer. See ..."), "fugashi"),
        (ImportError("run `pip install mistral-common`"), "mistral-common"),
        (ModuleNotFoundError("No module named 'jieba'", name="jieba"), "jieba"),
    ],
)
def test_other_packages_are_named_as_they_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: ImportError, package: str
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", _raise(error))
    with pytest.raises(RequestError, match=f"needs a package .*; pip install {package}, or use ids"):
        load_tokenizer(folder)


def test_code_of_the_folder_needs_leave(folder: Path) -> None:
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputNotFoundError, match=r"trust_remote_code|custom code"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_damaged_files_are_refused_with_what_to_do(folder: Path, name: str, content: str) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (folder / name).write_text(content)
    with pytest.raises(InputNotFoundError, match=r"no tokenizer that can be loaded .* copy its"):
        load_tokenizer(folder)


def test_an_id_that_no_vocabulary_reaches_is_refused(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(data))
    with pytest.raises(RequestError, match=r"tokenizer\.json gives the token 'a' the id 2147483648"):
        load_tokenizer(folder)


def test_a_mutated_tokenizer_is_loaded_or_refused(folder: Path) -> None:
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    whole = (folder / "tokenizer.json").read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in chance.sample(range(len(whole)), chance.choice([1, 1, 4])):
            data[place] = chance.choice(b'0{}[]",:xn\x00\xff')
        (folder / "tokenizer.json").write_bytes(data)
        with suppress(InputNotFoundError):
            load_tokenizer(folder)
