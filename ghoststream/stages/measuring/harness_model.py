"""The model ``ghoststream`` of lm-evaluation-harness: its requests, answered by streamed passes.

The harness finds :class:`StreamedLM` by the entry point ``lm_eval.models``. This module needs the extra
``tasks``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from tqdm import tqdm

from ghoststream.errors import RequestError
from ghoststream.evaluation.harness_requests import HARNESS_ADVICE, answers_of, distinct_requests, request_of
from ghoststream.options import Compute
from ghoststream.recipe import library_versions
from ghoststream.stages.measuring.model_groups import ModelGroup, group_models
from ghoststream.stages.measuring.task_pass import TaskPass

# The harness shows lines of its own log.
_log = logging.getLogger("lm_eval.ghoststream")
_UNASKED_DEVICE = "cuda:0"


class StreamedLM(LM):
    """A model that the harness asks, and that is never in memory as a whole.

    Each kind of request is one pass over the weights. The answers are those of ``ghoststream tasks``, to the
    bit where all tasks ask the same kind.

    Args:
        pretrained: Local folder or hub id of a model or of a recovered checkpoint.
        batch_size: Not used, since the harness gives 1 where nobody asked; ``micro_batch`` is the option.
        max_batch_size: Not used.
        device: As in :class:`~ghoststream.Compute`. ``cuda:0``, which the harness gives where nobody
            asked, means ``auto``.
        **options: Further fields of :class:`~ghoststream.Compute`: ``dtype``, ``micro_batch`` ...

    Raises:
        RequestError: If an option is unknown.
        GhoststreamError: What opening a model raises.

    Memory: that of a :class:`~ghoststream.streaming.StreamedPass`, and the requests as text and tokens.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str = _UNASKED_DEVICE,
        **options: Any,
    ) -> None:
        del batch_size, max_batch_size
        super().__init__()
        if device != _UNASKED_DEVICE:
            options["device"] = device
        (group,) = group_models([pretrained], Compute.make(options, where="--model_args"))
        self._group: ModelGroup = group
        self.tokenizer = group.session.load_tokenizer()

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer where it keeps requests."""
        return self._group.session.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes of the model into its results."""
        session = self._group.session
        return {"model_sha": session.fingerprint["digest"], "model_dtype": session.describe()["dtype"]}

    def chat_template(self, chat_template: bool | str = False) -> str | None:  # noqa: FBT001, FBT002 - theirs
        """Return the template that :meth:`apply_chat_template` applies."""
        return self.tokenizer.get_chat_template() if chat_template else None

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - theirs
    ) -> str:
        """Write a conversation as the model's tokenizer does."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests in one pass: log-likelihood in nats, and whether it is the greedy continuation."""
        asked = distinct_requests(requests)
        recipe = {"tasks": (), "limit": None, "harness": library_versions(["lm_eval"])["lm_eval"]}
        progress = _HarnessProgress()
        try:
            ((_, scores),) = TaskPass(self._group, asked, recipe).run(progress)
        finally:
            progress.finish()
        answers = answers_of(asked, scores.results())
        return [answers[request_of(one)] for one in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Answer requests for whole texts in one pass: the log-likelihood in nats."""
        return self.loglikelihood(requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: every new token would be a pass over the weights.

        Raises:
            RequestError: In any case; names the tasks.
        """
        names = ", ".join(sorted({str(one.task_name) for one in requests}))
        msg = (
            f"the model writes text in {names}, and every new token would be a pass over the weights; "
            f"{HARNESS_ADVICE}"
        )
        raise RequestError(msg)


class _HarnessProgress:
    """Progress as the harness shows its own: a bar, and lines of its log."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, task: str, total: int, unit: str) -> None:
        self.finish()
        self._bar = tqdm(desc=task, total=total or None, unit=f" {unit}", unit_scale=unit == "B")

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def log(self, message: str) -> None:
        _log.info(message)
