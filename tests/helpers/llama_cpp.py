"""Run GGUF files through llama.cpp, by the C functions inside the package xllamacpp.

A process of its own does it: llama.cpp ends the process on a failed check.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None,
    reason="llama.cpp is not here (pip install gguf xllamacpp)",
)
_WORDS = 128
# Places of 32-bit words in llama.cpp's `llama_context_params`, and their defaults.
_N_CTX, _FLASH, _TYPE_K, _TYPE_V = (0, 512), (13, -1), (26, 1), (27, 1)


class _Words(ctypes.Structure):
    """Settings that llama.cpp takes by value; larger than any version's, which does no harm."""

    _fields_ = [("words", ctypes.c_int32 * _WORDS)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def llama_cpp_logits(
    files: Sequence[Path], ids: npt.NDArray[np.integer[Any]]
) -> list[npt.NDArray[np.float32]]:
    """Return each file's logits ``(S, T, V)`` of sequences ``(S, T)``, with keys and values in float32."""
    return _ask(files, "logits", {"ids": ids.tolist()})


def llama_cpp_tokens(files: Sequence[Path], text: str) -> list[list[int]]:
    """Return the ids of a text, by the tokenizer in each file."""
    return [ids.tolist() for ids in _ask(files, "tokens", {"text": text})]


def _ask(files: Sequence[Path], question: str, request: dict[str, Any]) -> list[Any]:
    outs = [file.with_suffix(f".{question}.npy") for file in files]
    data = {"files": [str(file) for file in files], "outs": [str(out) for out in outs], **request}
    done = subprocess.run(
        [sys.executable, __file__, question],
        input=json.dumps(data),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [np.load(out) for out in outs]


class LlamaCpp:
    """The functions of llama.cpp, with one thread, in float32 and without flash attention."""

    def __init__(self) -> None:
        import xllamacpp

        package = Path(str(xllamacpp.__file__)).parent
        self.library: Any = ctypes.CDLL(str(next(package.glob("xllamacpp*.so"))))
        for name in ("llama_context_default_params", "llama_model_default_params"):
            self.function(name).restype = _Words
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_logits"):
            self.function(name).restype = ctypes.c_void_p
        for name in ("llama_model_get_vocab", "llama_get_memory"):
            self.function(name).restype = ctypes.c_void_p
        self.library.llama_batch_init.restype = _Batch

    def function(self, name: str) -> Any:
        """Return a function by its name."""
        return getattr(self.library, name)

    def load(self, path: str) -> ctypes.c_void_p:
        """Load a model."""
        model = self.library.llama_model_load_from_file(
            path.encode(), self.library.llama_model_default_params()
        )
        assert model, f"llama.cpp does not load {path}"
        return ctypes.c_void_p(model)

    def context(self, model: ctypes.c_void_p, n_threads: int = 1) -> ctypes.c_void_p:
        """Return a context of 512 tokens."""
        settings = self.library.llama_context_default_params()
        for place, default in (_N_CTX, _FLASH, _TYPE_K, _TYPE_V):
            assert settings.words[place] == default, "the settings of this llama.cpp lie elsewhere"
        for place, _ in (_FLASH, _TYPE_K, _TYPE_V):
            settings.words[place] = 0
        made = self.library.llama_init_from_model(model, settings)
        assert made, "llama.cpp makes no context"
        context = ctypes.c_void_p(made)
        self.library.llama_set_n_threads(context, n_threads, n_threads)
        return context

    def logits(self, context: ctypes.c_void_p, ids: Sequence[int], n_vocab: int) -> npt.NDArray[np.float32]:
        """Return the logits ``(T, V)`` of one sequence."""
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
        self.library.llama_memory_clear(ctypes.c_void_p(self.library.llama_get_memory(context)), True)
        assert self.library.llama_decode(context, batch) == 0
        found = ctypes.cast(self.library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        values: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, (len(ids), n_vocab)).copy()
        self.library.llama_batch_free(batch)
        return values

    def tokens(self, model: ctypes.c_void_p, text: str) -> list[int]:
        """Return the ids of a text, special tokens included."""
        vocabulary = ctypes.c_void_p(self.library.llama_model_get_vocab(model))
        encoded, room = text.encode(), 4 * len(text) + 8
        ids = (ctypes.c_int32 * room)()
        n_ids = self.library.llama_tokenize(vocabulary, encoded, len(encoded), ids, room, True, True)
        return list(ids[:n_ids])


def _main(question: str, request: dict[str, Any]) -> None:
    runner = LlamaCpp()
    for path, out in zip(request["files"], request["outs"], strict=True):
        model = runner.load(path)
        if question == "tokens":
            np.save(out, np.array(runner.tokens(model, request["text"])))
            continue
        vocabulary = ctypes.c_void_p(runner.library.llama_model_get_vocab(model))
        n_vocab = runner.library.llama_vocab_n_tokens(vocabulary)
        context = runner.context(model)
        np.save(out, np.stack([runner.logits(context, ids, n_vocab) for ids in request["ids"]]))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.stdin.read()))
