"""Requests of lm-evaluation-harness as tokens, and their scores as the harness wants them.

The harness's own code makes tokens of text. This module needs the extra ``tasks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ghoststream.errors import RequestError
from ghoststream.evaluation.requests import ScoredWindow

Request = tuple[str, tuple[str, ...]]
"""The harness's kind of a request, and its arguments: ``("loglikelihood", (context, continuation))``."""

Answer = tuple[float, bool] | float
"""Log-likelihood in nats and whether it is the greedy continuation; for a rolling one the log-likelihood
alone."""

ROLLING = "loglikelihood_rolling"
"""The kind of a request for the log-likelihood of a whole text."""

HARNESS_ADVICE = (
    "the harness's own backend runs the others on a folder that fits in memory: lm_eval --model hf "
    "--model_args pretrained=DIR,trust_remote_code=True --tasks NAME"
)
"""What to do with a task in which the model writes text."""


def request_of(instance: Any) -> Request:
    """Return what one of the harness's ``Instance`` objects asks."""
    return instance.request_type, tuple(instance.args)


def distinct_requests(instances: Iterable[Any]) -> tuple[Request, ...]:
    """Return what instances ask, each question once, in the order in which they ask it first."""
    return tuple(dict.fromkeys(map(request_of, instances)))


def answers_of(requests: Sequence[Request], scores: Sequence[tuple[float, bool]]) -> dict[Request, Answer]:
    """Return the scores of requests as the harness wants them."""
    return {
        request: score[0] if request[0] == ROLLING else score
        for request, score in zip(requests, scores, strict=True)
    }


def scored_windows(
    requests: Sequence[Request], tokenizer: Any, max_length: int, *, name: str
) -> list[ScoredWindow]:
    """Turn requests into tokens, as the harness's transformers backend does it.

    Args:
        requests: The requests; a window knows the number of its own.
        tokenizer: The model's.
        max_length: The longest input of the model; longer ones lose their beginning.
        name: The model's, for messages.

    Raises:
        RequestError: If the tokenizer has no token to put before a text, or a continuation is empty or
            too long.
    """
    encoder = _Encoder(tokenizer, max_length, name)
    found = []
    for owner, (kind, arguments) in enumerate(requests):
        for context, continuation in encoder.pairs(kind, arguments):
            if not 0 < len(continuation) <= max_length:
                msg = (
                    f"{name} reads at most {max_length} tokens, and a continuation of "
                    f"{len(continuation)} tokens is to be scored: {shorten(arguments[-1], 60)!r}; leave "
                    "this task out"
                )
                raise RequestError(msg)
            tokens = (*context, *continuation)[-(max_length + 1) :]
            found.append(ScoredWindow(owner, tokens[:-1], tuple(continuation)))
    return found


def model_length(config: Any, tokenizer: Any) -> int:
    """Return the longest input that the harness gives to a model of this configuration."""
    return int(resolve_max_length(config, tokenizer))


class _Encoder(TemplateLM):
    """The harness's way from text to tokens, and nothing behind it."""

    def __init__(self, tokenizer: Any, max_length: int, name: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._max_length = max_length
        if self.prefix_token_id is None:
            msg = (
                f"the tokenizer of {name} has neither a begin-of-text nor an end-of-text token; tasks need "
                "one"
            )
            raise RequestError(msg)
        self._prefix = tokenizer.decode(self.prefix_token_id)

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: FBT001 - the harness's signature
        **kwargs: Any,
    ) -> list[int]:
        del kwargs
        if add_special_tokens is None and string.startswith(self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def pairs(self, kind: str, arguments: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
        """Return context and continuation of each window of a request, as tokens."""
        if kind == ROLLING:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(arguments[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            return [make_disjoint_window(window) for window in windows]
        context, continuation = arguments
        if context:
            return [self._encode_pair(context, continuation)]
        tokens, prefix = self.tok_encode(continuation, add_special_tokens=False), self.prefix_token_id
        return [([prefix], tokens) if tokens[:1] != [prefix] else (tokens[:1], tokens[1:])]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
