"""Documents of datasets on the Hugging Face hub, or in a local dataset folder, through ``datasets``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from ghoststream.errors import GhoststreamError, TextError
from ghoststream.options import TextPart
from ghoststream.text.documents import Document
from ghoststream.text.rows import document_of_row
from ghoststream.text.spec import TextSpec


@dataclasses.dataclass(frozen=True, slots=True)
class _Dataset:
    """How one dataset is loaded, and how its rows become documents (``joiner``: all rows make one)."""

    name: str
    split: str
    config: str | None = None
    field: str | None = None
    joiner: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    streaming: bool = True


# The splits that are fitted and measured on, and the preparation, as in the perplexity code of SparseGPT and
# its successors: WikiText-2 rows joined by blank lines, Penn Treebank sentences joined by blanks, C4's first
# files of either split, one document a row.
_FIT_SPLITS = MappingProxyType({"wikitext2": "train", "ptb": "train", "c4": "train"})
_HELDOUT_SPLITS = MappingProxyType({"wikitext2": "test", "ptb": "test", "c4": "validation"})
_C4_FILES = MappingProxyType(
    {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
)


def hub_documents(spec: TextSpec, part: TextPart, *, max_bytes: int | None = None) -> Iterator[Document]:
    """Yield the documents of an ``hf:`` specification or of a named set.

    A named set without a split means its training split for ``fit``, else the split that perplexities are
    reported on. Rows are read as a stream, so that no more of a large dataset is fetched than needed, unless
    the set is small, a slice is asked for, or the libraries are told to stay offline (then the cache is
    used).

    Raises:
        TextError: If ``datasets`` is missing, the dataset cannot be loaded, or a row lacks the field.
    """
    dataset = _named(spec, part) if spec.kind == "named" else _plain(spec)
    rows = _rows(dataset, spec)
    if dataset.joiner is None:
        for number, row in enumerate(rows):
            yield _document(row, dataset.field, f"{spec} row {number}")
    else:
        yield _joined(rows, dataset, spec, max_bytes)


def resolve_split(spec: TextSpec, part: TextPart) -> str | None:
    """Return the split that is read, or ``None`` where the source has none."""
    if spec.kind != "named":
        return spec.split if spec.kind == "hf" else None
    return spec.split or (_FIT_SPLITS if part == "fit" else _HELDOUT_SPLITS)[spec.source]


def _plain(spec: TextSpec) -> _Dataset:
    return _Dataset(spec.source, spec.split or "train", config=spec.config, field=spec.field)


def _named(spec: TextSpec, part: TextPart) -> _Dataset:
    split = resolve_split(spec, part) or ""
    if spec.source == "wikitext2":
        return _Dataset(
            "Salesforce/wikitext",
            split,
            config="wikitext-2-raw-v1",
            field="text",
            joiner="\n\n",
            streaming=False,
        )
    if spec.source == "ptb":
        # The dataset itself is a script, which `datasets` no longer runs; the hub's own conversion is read.
        options = {"revision": "refs/convert/parquet"}
        name = "ptb-text-only/ptb_text_only"
        return _Dataset(name, split, field="sentence", joiner=" ", options=options, streaming=False)
    base = split.partition("[")[0]
    if base not in _C4_FILES:
        msg = f"c4 has no split {base!r}; write c4:train or c4:validation"
        raise TextError(msg)
    return _Dataset("allenai/c4", split, field="text", options={"data_files": {base: _C4_FILES[base]}})


def _rows(dataset: _Dataset, spec: TextSpec) -> Iterator[Mapping[str, Any]]:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        msg = f"{spec} needs the package datasets; install ghoststream[text], or name a file with file:PATH"
        raise TextError(msg) from error
    offline = bool(getattr(library.config, "HF_HUB_OFFLINE", False))
    streaming = dataset.streaming and not offline and "[" not in dataset.split
    with _loading(spec):
        yield from library.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=streaming, **dataset.options
        )


@contextmanager
def _loading(spec: TextSpec) -> Iterator[None]:
    try:
        yield
    except GhoststreamError:
        raise
    # Whatever datasets, its file readers and the HTTP client raise: there is no common kind.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        msg = (
            f"cannot load {spec} ({type(error).__name__}: {reason}); check the name and the connection,"
            " or name a local file with file:PATH"
        )
        raise TextError(msg) from error


def _document(row: Mapping[str, Any], field: str | None, place: str) -> Document:
    return document_of_row(row, place, field=field, advice="; name one of them after the split")


def _joined(
    rows: Iterator[Mapping[str, Any]], dataset: _Dataset, spec: TextSpec, max_bytes: int | None
) -> Document:
    joiner = dataset.joiner or ""
    texts: list[str] = []
    n_bytes = 0
    truncated = False
    for number, row in enumerate(rows):
        text = _document(row, dataset.field, f"{spec} row {number}").text or ""
        n_bytes += len(text.encode()) + len(joiner)
        truncated = max_bytes is not None and n_bytes > max_bytes
        if truncated:
            break
        texts.append(text)
    whole = joiner.join(texts)
    if not whole.strip():
        msg = f"{spec} is empty"
        raise TextError(msg)
    return Document(place=str(spec), raw=whole.encode(), text=whole, truncated=truncated)
