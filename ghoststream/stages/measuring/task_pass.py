"""One pass that answers requests of lm-evaluation-harness for a base and what was recovered from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghoststream.evaluation import RequestBatches, RequestScores, default_logit_tokens
from ghoststream.evaluation.harness_requests import Request, model_length, scored_windows
from ghoststream.progress import Progress
from ghoststream.recipe import TaskRecipe
from ghoststream.stages.measuring.model_groups import MeasuredModel, ModelGroup
from ghoststream.streaming import PassOptions, StreamedPass


class TaskPass:
    """One pass that answers all requests for several models.

    Args:
        group: The models.
        asked: The requests, each once.
        request: The part of the recipe that does not depend on the models.

    Raises:
        InputNotFoundError: If the base has no tokenizer.
        RequestError: If the requests cannot be turned into tokens.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
    """

    def __init__(self, group: ModelGroup, asked: Sequence[Request], request: dict[str, Any]) -> None:
        self._session, self._models = group.session, group.models
        self._batches = self._make_batches(asked)
        skeleton = self._session.skeleton
        self._recipe = TaskRecipe.model_validate(
            {
                **request,
                "requests_digest": self._batches.digest(),
                **self._session.describe(),
                "loss_chunk_tokens": default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes),
            }
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of every model, as JSON data."""
        return self._recipe.to_json()

    def requests(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what decides the figures of each model, with its place in the request."""
        return [
            (model.position, {"fingerprint": model.fingerprint, "recipe": self.recipe})
            for model in self._models
        ]

    def run(self, progress: Progress) -> list[tuple[MeasuredModel, RequestScores]]:
        """Run the pass; the scores of all requests for each model, in their order."""
        skeleton, batches = self._session.skeleton, self._batches.batches
        pairs = [(model, RequestScores(self._batches)) for model in self._models]
        lanes = [model.lane(self._session, scores, self._batches.scored) for model, scores in pairs]
        options = PassOptions(logit_tokens=self._recipe.loss_chunk_tokens, progress=progress)
        factory = self._session.memory(self._longest).states_factory(batches)
        StreamedPass(skeleton, batches, lanes, factory, options).run()
        self._session.require_unchanged(progress)
        return pairs

    def _make_batches(self, asked: Sequence[Request]) -> RequestBatches:
        session = self._session
        tokenizer = session.load_tokenizer()
        max_length = model_length(session.skeleton.config, tokenizer)
        windows = scored_windows(asked, tokenizer, max_length, name=session.name)
        self._longest = max(len(window.inputs) for window in windows)
        return RequestBatches(
            windows,
            len(asked),
            max_length=max_length,
            forward_tokens=session.memory(self._longest).choose_micro_batch() * self._longest,
            micro_batch=session.compute.micro_batch,
        )
