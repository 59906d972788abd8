"""The tokenizer of a checkpoint folder, and what may be missing for it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError
from ghoststream.files import read_json, system_error

_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json")
# Package by module: what transformers needs to read a vocabulary that is not a tokenizer.json.
_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"}
_INSTEAD = "or use ids:FILE.npy"
_LARGEST_ID = 2**27
_NONE = f"{{root}} has no tokenizer; copy its tokenizer files there, {_INSTEAD}"


def load_tokenizer(root: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Args:
        root: The checkpoint folder.
        trust_remote_code: Whether code of the folder may run.

    Raises:
        InputNotFoundError: If the folder has none, or one that transformers cannot load.
        RequestError: If a package is missing that reads it.
    """
    _require_possible_ids(root / "tokenizer.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            root, trust_remote_code=trust_remote_code
        )
        # Some damage shows at the first use.
        _use(tokenizer)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # Whatever transformers, the tokenizers library and code of the folder raise at a file that is not as they
    # expect: there is no common kind, and a panic in Rust is not even an Exception.
    except BaseException as error:
        raise _refusal(root, error) from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        # Made of its class's defaults alone: every word would be the unknown one.
        raise InputNotFoundError(_NONE.format(root=root))
    return tokenizer


def _require_possible_ids(path: Path) -> None:
    """Refuse an id that no vocabulary reaches: the library makes place for all ids below it, or aborts."""
    try:
        model = read_json(path, finite=False)["model"]
        vocabulary = model["vocab"].items()
    except (GhoststreamError, LookupError, TypeError, AttributeError):
        return  # said by whoever loads it, or a list, whose ids are its places
    far = next((pair for pair in vocabulary if isinstance(pair[1], int) and pair[1] > _LARGEST_ID), None)
    if far is not None:
        msg = f"{path} gives the token {far[0]!r} the id {far[1]}, which no vocabulary reaches; get it again"
        raise RequestError(msg)


def _use(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer("a", verbose=False)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    for name in (*ids, "all_special_tokens", "vocab_size"):
        getattr(tokenizer, name)


def _refusal(root: Path, error: BaseException) -> GhoststreamError:
    refused = system_error(error, root, doing="read the tokenizer in")
    if refused is not None:
        return refused
    reason = shorten(str(error) or type(error).__name__, 200, placeholder="...")
    has_vocabulary = any(any(root.glob(pattern)) for pattern in _FILES)
    if not has_vocabulary and not isinstance(error, ImportError) and "trust_remote_code" not in str(error):
        return InputNotFoundError(_NONE.format(root=root))
    missing = _missing_packages(error)
    if missing:
        return RequestError(
            f"the tokenizer in {root} needs a package that is not installed ({reason}); pip install "
            f"{' '.join(missing)}, {_INSTEAD}"
        )
    return InputNotFoundError(
        f"{root} has no tokenizer that can be loaded ({type(error).__name__}: {reason}); copy its tokenizer "
        f"files there again, {_INSTEAD}"
    )


def _missing_packages(error: BaseException) -> list[str]:
    """Return which packages transformers wants, as ``pip install`` names them; none if none is missing.

    It asks for the one that it tries last: where it wants ``tiktoken``, ``sentencepiece`` would do as well,
    and is what most vocabularies are made for.
    """
    text = str(error).lower()
    if any(package in text for package in _PACKAGES.values()):
        return [package for module, package in _PACKAGES.items() if not _is_installed(module)]
    if not isinstance(error, ImportError):
        return []
    named = re.search(r"(?:pip install|need to install) ([\w\[\]-]+)", str(error))
    return [named[1] if named else error.name or "the package that it names"]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
