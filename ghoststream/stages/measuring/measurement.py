"""One pass that measures several models: its tokens, its lanes, and the losses that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghoststream.activations import ActivationStore
from ghoststream.checkpoint.fingerprint import require_undamaged
from ghoststream.errors import MismatchError
from ghoststream.evaluation import LossAccumulator, LossSummary, LossSums, default_logit_tokens
from ghoststream.options import Text
from ghoststream.progress import Progress
from ghoststream.recipe import CaptureRecipe, EvaluateRecipe, TextRecipe
from ghoststream.stages.lanes import first_needed
from ghoststream.stages.measuring.model_groups import MeasuredModel, ModelGroup
from ghoststream.stages.session import ModelSession
from ghoststream.stages.stored import stored_states
from ghoststream.statistics import base_of
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet, recipe_of


class Measurement:
    """One pass over a text, or over the states of a store from where its models part.

    Args:
        group: The models.
        text: Which tokens, or the store whose tokens and states are taken.
        progress: Who is told how windows begin.
        tokens: The tokens of the text, where they are known.

    Raises:
        TextError: If the text gives too little.
        MismatchError: If the store is of another model, was computed in another way, or holds rounded states.
    """

    def __init__(
        self,
        group: ModelGroup,
        text: Text | ActivationStore,
        progress: Progress,
        tokens: TokenSet | None = None,
    ) -> None:
        self._session, self._models = group.session, group.models
        if isinstance(text, ActivationStore):
            self._store: ActivationStore | None = text
            captured = _usable_capture(text, group.session)
            group.session.expect(base_of(text), f"{text.uri} was captured")
            tokens, asked, micro_batch = TokenSet(*text.tokens()), captured.text, captured.micro_batch
            self._memory = group.session.memory(tokens.length)
        else:
            self._store, tokens = None, tokens or group.session.tokens(text, progress)
            asked = recipe_of(text, tokens)
            self._memory = group.session.memory(tokens.length)
            micro_batch = group.session.micro_batch(tokens.length)
        self.tokens = tokens
        self._recipe = self._make_recipe(asked, tokens.digest, micro_batch)
        self._batches = make_batches(tokens.ids, tokens.mask, self._recipe.micro_batch)
        self._losses = [LossAccumulator(tokens.n_sequences, name=model.name) for model in self._models]

    def requests(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what decides the figures of each model, with its place in the request."""
        recipe = self._recipe.to_json()
        return [
            (model.position, {"fingerprint": model.fingerprint, "recipe": recipe}) for model in self._models
        ]

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed together."""
        return self._recipe.micro_batch

    def results(self) -> list[tuple[MeasuredModel, LossSummary, dict[str, Any]]]:
        """Return what was measured: one result a model, in their order."""
        recipe = self._recipe.to_json()
        pairs = zip(self._models, self._losses, strict=True)
        return [(model, losses.summary(), recipe) for model, losses in pairs]

    def sums(self) -> list[LossSums]:
        """Return the sums of what was measured, for each model."""
        return [losses.sums() for losses in self._losses]

    def add(self, sums: Sequence[LossSums]) -> None:
        """Add what was measured elsewhere, on other sequences."""
        for losses, own in zip(self._losses, sums, strict=True):
            losses.add(own)

    def run(self, progress: Progress, rows: tuple[int, int] | None = None) -> None:
        """Run the pass over all sequences, or over some: whole micro-batches ``[start, stop)``."""
        skeleton = self._session.skeleton
        start, stop = rows or (0, self.tokens.n_sequences)
        batches = [batch for batch in self._batches if start <= batch.start and batch.stop <= stop]
        pairs = list(zip(self._models, self._losses, strict=True))
        lanes = [model.lane(self._session, losses) for model, losses in pairs]
        first = self._first_layer(lanes)
        if first:
            progress.log(f"starting from h[{first}], which is in the store")
        options = PassOptions(
            first_layer=first,
            initial=stored_states(self._store, first, skeleton.device) if self._store and first else None,
            logit_tokens=self._recipe.loss_chunk_tokens,
            progress=progress,
        )
        factory = self._memory.states_factory(batches)
        StreamedPass(skeleton, batches, lanes, factory, options).run()
        self._session.require_unchanged(progress)

    def _first_layer(self, lanes: list[Lane]) -> int:
        """Return the last stored position that every lane still comes through."""
        if self._store is None:
            return 0
        latest = min(map(first_needed, lanes), default=self._session.skeleton.n_layers)
        return max((layer for layer in self._store.completed_layers() if layer <= latest), default=0)

    def _make_recipe(self, text: TextRecipe, tokens_digest: str, micro_batch: int) -> EvaluateRecipe:
        skeleton = self._session.skeleton
        return EvaluateRecipe.model_validate(
            {
                "text": text,
                "tokens_digest": tokens_digest,
                **self._session.describe(),
                "micro_batch": micro_batch,
                "loss_chunk_tokens": default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes),
            }
        )


def _usable_capture(store: ActivationStore, session: ModelSession) -> CaptureRecipe:
    """Check that going on from a store's states gives what the whole pass would."""
    captured = CaptureRecipe.model_validate(store.recipe)
    if captured.model_digest != session.fingerprint["digest"]:
        require_undamaged(
            base_of(store), session.fingerprint, session.skeleton.index, f"{store.uri} was captured"
        )
        msg = (
            f"{store.uri} was captured from another model than {session.name}; give the model of the store, "
            "and what was recovered from it"
        )
        raise MismatchError(msg)
    asked = {
        **session.describe(),
        "micro_batch": session.compute.micro_batch or captured.micro_batch,
    }
    changed = [
        f"{key} {getattr(captured, key)}, not {value}"
        for key, value in asked.items()
        if value != getattr(captured, key)
    ]
    if changed:
        msg = (
            f"{store.uri} was computed with {', '.join(changed)}; leave these options out, or measure on a "
            "text"
        )
        raise MismatchError(msg)
    if captured.store_dtype != captured.dtype:
        msg = (
            f"{store.uri} holds states rounded from {captured.dtype} to {captured.store_dtype}: going on "
            "from them would change the figures; measure on the text itself"
        )
        raise MismatchError(msg)
    return captured
