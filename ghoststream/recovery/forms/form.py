"""What a form is: it says what it cannot hold, and writes what it can."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ghoststream.errors import RequestError
from ghoststream.files import FileLock
from ghoststream.options import GgufType, Method
from ghoststream.progress import Progress

if TYPE_CHECKING:
    import torch

    from ghoststream.operators import OperatorSet
    from ghoststream.recovery.export import ExportReport
    from ghoststream.recovery.notes import CardNotes
    from ghoststream.recovery.provenance import RecoveredInfo
    from ghoststream.streaming import Skeleton


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """What is written, and where.

    Attributes:
        skeleton: The base.
        operators: The plan and its operators.
        out: Folder (or file, as the form says) to make.
        max_shard_bytes: Largest number of tensor bytes in one shard; as usual if ``None``.
        operator_dtype: Dtype of the operators; the one that most of the base's bytes have if ``None``.
        fingerprint: The base's, where it is known already.
        lock: The lock of ``out``, where the caller holds it.
        progress: Told the bytes written.
        notes: What the card tells of the whole recovery.
        gguf_type: Type of the numbers in a GGUF, as the option ``gguf_type`` has it.
    """

    skeleton: Skeleton
    operators: OperatorSet
    out: Path
    max_shard_bytes: int | None = None
    operator_dtype: torch.dtype | None = None
    fingerprint: Mapping[str, Any] | None = None
    lock: FileLock | None = None
    progress: Progress | None = None
    notes: CardNotes | None = None
    gguf_type: GgufType = "auto"


class Form(ABC):
    """A form in which a recovered model is written.

    Attributes:
        name: What ``--form`` calls it.
        meaning: What it is, in one line.
        loads: What loads it.
        cost: What it costs beside the layers that are left.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    loads: ClassVar[str]
    cost: ClassVar[str]

    def runs(self, out: Path) -> str | None:
        """Return a command that uses a result which ghoststream itself does not load; ``None`` for others."""
        del out
        return None

    def holds(self, features: str, model_type: str) -> bool:
        """Say whether it can hold operators on some features: ``auto`` tries no others.

        Args:
            features: Their name.
            model_type: Type of the base, without what a recovered one puts in front of it.
        """
        del features, model_type
        return True

    def check_methods(self, methods: Sequence[Method]) -> None:
        """Check, before anything is fitted, that what these methods fit can be held.

        Args:
            methods: How boundaries are fitted; where a search chooses, all that it may take.

        Raises:
            RequestError: If it cannot be, with what can.
        """
        del methods

    def _require_features(
        self, methods: Sequence[Method], held: Sequence[str], lacking: str, advice: str
    ) -> None:
        """Check that methods fit operators on some features only, or none.

        Raises:
            RequestError: If one fits another.
        """
        for method in methods:
            if method.operator != "none" and method.features not in held:
                msg = f"the operator {method.operator} on the features {method.features} {lacking}; {advice}"
                raise RequestError(msg)

    def check_model(self, skeleton: Skeleton, methods: Sequence[Method]) -> None:
        """Check, before anything is fitted, that this model can be written with what these methods fit.

        Args:
            skeleton: The base.
            methods: As for :meth:`check_methods`, which allowed them.

        Raises:
            RequestError: If it cannot.
        """
        del skeleton, methods

    def check(self, operators: OperatorSet, skeleton: Skeleton) -> None:
        """Check that these operators of this base can be held exactly.

        Raises:
            RequestError: If not: names the operator, and says what to do instead.
        """
        del operators, skeleton

    def write(self, request: WriteRequest) -> ExportReport:
        """Write the model; what :func:`~ghoststream.recovery.export_recovered` promises of kills holds.

        Raises:
            RequestError: What :meth:`check` raises.
            GhoststreamError: What :func:`~ghoststream.recovery.export_recovered` raises.
        """
        self.check(request.operators, request.skeleton)
        return self._write(request)

    @abstractmethod
    def _write(self, request: WriteRequest) -> ExportReport: ...

    def read(self, out: Path) -> RecoveredInfo | None:
        """Return what a finished result of this form says of itself; ``None`` if ``out`` is none.

        Raises:
            ArtifactError: If it is one, and damaged.
        """
        from ghoststream.recovery.provenance import load_recovered

        return load_recovered(out)
