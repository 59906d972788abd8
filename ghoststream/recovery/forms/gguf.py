"""The form that is one file for llama.cpp."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import RequestError
from ghoststream.options import Method
from ghoststream.recovery.forms.form import Form, WriteRequest
from ghoststream.recovery.names import GGUF_NAME
from ghoststream.statistics.features import MLP, MLP_OUTPUT

if TYPE_CHECKING:
    from ghoststream.operators import OperatorSet
    from ghoststream.progress import Progress
    from ghoststream.recovery.export import ExportReport
    from ghoststream.recovery.gguf.layout import Layout
    from ghoststream.recovery.job import ExportJob
    from ghoststream.streaming import Skeleton

_HELD = ("normed", MLP.name, MLP_OUTPUT.name)
_ADVICE = (
    "recover with --operator auto, or with least-squares and --features normed or mlp, or write the form "
    "custom"
)
_VERSION = 1
"""Part of a request: raised when the same request gives other bytes."""


class Gguf(Form):
    """A folder with ``model.gguf``, which llama.cpp runs as it is.

    llama.cpp multiplies nothing but normed states. An operator on ``normed`` is the linear map that its
    architecture ``deci`` has in the place of attention. One on ``hidden`` has no place.
    """

    name = "gguf"
    meaning = "one file for llama.cpp, in F32, F16, BF16 or Q8_0"
    loads = "llama.cpp and what is built on it"
    cost = "C x C weights and as many products a token for each operator on normed; nothing for absorbed ones"

    def runs(self, out: Path) -> str:
        """Return the command of llama.cpp."""
        return shlex.join(["llama-cli", "-m", str(out / GGUF_NAME)])

    def holds(self, features: str, model_type: str) -> bool:
        """Say whether llama.cpp has a place for operators on some features."""
        from ghoststream.recovery.gguf.families import FAMILIES

        # Of a type that is not written the model is refused.
        has_room = model_type not in FAMILIES or FAMILIES[model_type].holds_operators
        return features in _HELD and (has_room or features != "normed")

    def check_methods(self, methods: Sequence[Method]) -> None:
        """Check that the methods fit nothing but what llama.cpp computes.

        Raises:
            RequestError: If one fits something else, or the package gguf is missing.
        """
        _require_package()
        self._require_features(methods, _HELD, "has no place in llama.cpp", _ADVICE)

    def check_model(self, skeleton: Skeleton, methods: Sequence[Method]) -> None:
        """Check that llama.cpp has the architecture, room for the operators, and the tokenizer.

        Raises:
            UnsupportedModelError: If it has not.
        """
        import gguf

        from ghoststream.checkpoint.configuration import plain_type
        from ghoststream.recovery.gguf.families import find_family, require_room
        from ghoststream.recovery.gguf.tokenizer import add_tokenizer

        family = find_family(plain_type(skeleton.config), skeleton.config)
        if any(method.features == "normed" for method in methods):
            require_room(family, "an operator on normed")
        writer = gguf.GGUFWriter(None, family.architecture)
        add_tokenizer(writer, skeleton.root, skeleton.config.vocab_size)

    def check(self, operators: OperatorSet, skeleton: Skeleton) -> None:
        """Check that the architecture and the operators, of this removal and earlier ones, have a place.

        Raises:
            UnsupportedModelError: If one has not.
        """
        from ghoststream.checkpoint.configuration import plain_type
        from ghoststream.recovery.gguf.families import find_family
        from ghoststream.recovery.gguf.layout import require_held
        from ghoststream.recovery.layout import standing_operators

        _require_package()
        config, removed = skeleton.config, operators.plan.removed
        family = find_family(plain_type(config), config)
        earlier = getattr(config, "ghost_operators", None) or ()
        entries = [entry for entry in earlier if entry["layer"] not in removed]
        entries += [operator.to_json() for operator in standing_operators(operators)]
        require_held(entries, family, config)

    def _write(self, request: WriteRequest) -> ExportReport:
        from ghoststream.recovery.export import FolderWriter, report_of, write_folder
        from ghoststream.recovery.gguf.file import stored_bytes
        from ghoststream.recovery.job import prepare_export

        job = prepare_export(
            request.skeleton,
            request.operators,
            operator_dtype=request.operator_dtype,
            fingerprint=request.fingerprint,
        )
        made = _Made(job, request.gguf_type)
        decided = {"form": {"name": self.name, "type": made.wanted, "version": _VERSION}}
        writer = FolderWriter(made.write, lambda folder: [GGUF_NAME], decided)
        write_folder(job, request.out, writer, lock=request.lock, progress=request.progress)
        return replace(
            report_of(job, request.out),
            model_type=made.layout.architecture,
            bytes_after=sum(stored_bytes(tensor, made.wanted) for tensor in made.layout.tensors),
            shards=1,
        )


class _Made:
    """Everything of a GGUF that is decided before it is written."""

    def __init__(self, job: ExportJob, gguf_type: str) -> None:
        from ghoststream.recovery.gguf.families import find_family
        from ghoststream.recovery.gguf.layout import lay_out, require_held
        from ghoststream.recovery.gguf.metadata import default_type, make_writer, rope_tensors
        from ghoststream.recovery.gguf.tokenizer import add_tokenizer
        from ghoststream.recovery.job import plain_config
        from ghoststream.recovery.layout import prevailing_dtype

        self._job = job
        index = job.skeleton.index
        self.wanted = default_type(prevailing_dtype(index)) if gguf_type == "auto" else gguf_type.upper()
        config = plain_config(job.config)
        entries = job.config.get("ghost_operators") or []
        family = find_family(config.model_type, config)
        require_held(entries, family, config)
        tensors = [tensor for shard in job.shards for tensor in shard.tensors]
        laid = lay_out(tensors, entries, family, config)
        self.layout: Layout = replace(laid, tensors=(*rope_tensors(config), *laid.tensors))
        self._writer = make_writer(self.layout, config, self.wanted, _title(job))
        add_tokenizer(self._writer, job.skeleton.root, config.vocab_size)

    def write(self, folder: Path, progress: Progress | None) -> Any:
        from ghoststream.recovery.export import Written
        from ghoststream.recovery.gguf.file import write_file

        tensors = self.layout.tensors
        written = write_file(folder / GGUF_NAME, self._writer, tensors, self.wanted, progress)
        sources = {tensor.name: tensor.source.name for tensor in tensors if tensor.source is not None}
        origins = {name: self._job.origins.get(source) for name, source in sources.items()}
        described = {
            name: {"digest": digest, "base": origins.get(name)} for name, digest in written.tensors.items()
        }
        return Written({GGUF_NAME: written.digest}, described)


def _title(job: ExportJob) -> str:
    """Return what the file calls the model: the name of the base, and what was removed."""
    root = job.skeleton.root
    is_hub = root.parent.name == "snapshots"
    name = root.parent.parent.name.rpartition("--")[2] if is_hub else root.name
    return f"{name} without {job.operators.plan}" if job.operators.plan.spans else name


def _require_package() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        msg = "the form gguf needs the package gguf; install it with: pip install gguf"
        raise RequestError(msg)
