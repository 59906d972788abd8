"""The layer-major pass: load each layer once, run every batch of every lane through it, free it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.progress import Progress, SilentProgress
from ghoststream.spans import Span
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.lanes import BoundaryMap, Lane
from ghoststream.streaming.prefetch import WeightPrefetcher
from ghoststream.streaming.skeleton import Skeleton, Weights
from ghoststream.streaming.states import HiddenStates, StatesFactory


@dataclass
class _Traveller:
    """A lane on its way: the states it carries, and the span whose stop it waits for."""

    lane: Lane
    states: HiddenStates
    waiting: Span | None = None

    def sees(self, position: int) -> bool:
        """Whether the lane stands at this position (it does not inside a span)."""
        return self.waiting is None or self.waiting.stop == position


@dataclass(frozen=True)
class PassOptions:
    """What can be chosen of a pass without changing a bit of its result, and where it starts and ends.

    Attributes:
        first_layer: Start from stored states ``h[first_layer]`` given by ``initial``.
        initial: Gives the states of a batch at ``first_layer``, at compute dtype.
        last_layer: Stop when ``h[last_layer]`` is there; ``None`` is the whole model.
        logit_tokens: Tokens whose logits are held at once; ``None`` is a whole batch.
        progress: Who is told how far the pass is.
    """

    first_layer: int = 0
    initial: Callable[[Batch], torch.Tensor] | None = None
    last_layer: int | None = None
    logit_tokens: int | None = 256
    progress: Progress = field(default_factory=SilentProgress)


class StreamedPass:
    """One trip over the layers with any number of lanes.

    Lanes share work: those that carry the same states go through a layer together, and states are only copied
    where lanes part. A layer that every lane skips is not read.

    Memory: two parts of the model (the one in use and the one being read), the states of each distinct carried
    variant (``S * T * C`` elements each, within the factory's budget), one batch in flight, and
    ``logit_tokens * V`` logits.

    Args:
        skeleton: The model.
        batches: The micro-batches, in order.
        lanes: The variants; a lane with an empty plan is the dense model.
        factory: Where states between layers are kept.
        options: See :class:`PassOptions`.

    Raises:
        PlanError: If a lane's plan is for another number of layers.
        RequestError: If lanes would need states before ``first_layer``.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        lanes: Sequence[Lane],
        factory: StatesFactory,
        options: PassOptions | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._batches = batches
        self._factory = factory
        self._options = options or PassOptions()
        self._calls = ModelCalls(skeleton)
        self._last = skeleton.n_layers if self._options.last_layer is None else self._options.last_layer
        self._lanes = tuple(lanes)
        for lane in lanes:
            lane.plan.require_fits(skeleton.n_layers)
            if any(span.start < self._options.first_layer for span in lane.plan.spans):
                msg = f"lane {lane.name} removes layers before {self._options.first_layer}, where this pass starts"
                raise RequestError(msg)

    def run(self) -> None:
        """Run the pass; results are with the lanes' observers.

        Raises:
            NumericsError: If hidden states stop being finite.
            CheckpointError: If weights cannot be read.
        """
        try:
            with torch.inference_mode(), self._skeleton.loaded_frame():
                self._run()
        except BaseException:
            for lane in self._lanes:
                for observer in lane.observers:
                    observer.failed()
            raise

    def _run(self) -> None:
        return_free_memory()
        first, progress = self._options.first_layer, self._options.progress
        layers = [n for n in range(first, self._last) if any(not lane.skips(n) for lane in self._lanes)]
        with_head = self._last == self._skeleton.n_layers and any(lane.logits for lane in self._lanes)
        progress.start("streaming layers", len(layers) + int(with_head), "layers")
        with WeightPrefetcher(self._reads(layers, with_head=with_head)) as weights:
            travellers = self._depart(first)
            for layer in range(first, self._last):
                if layer in layers:
                    self._through_layer(layer, travellers, weights.take())
                    progress.advance(1)
                self._arrive(layer + 1, travellers)
            if with_head:
                self._through_head(travellers, weights.take())
                progress.advance(1)
        for states in {id(t.states): t.states for t in travellers}.values():
            self._factory.release(states)
        progress.finish()

    def _reads(self, layers: Sequence[int], *, with_head: bool) -> list[Callable[[], Weights]]:
        def reading(layer: int) -> Callable[[], Weights]:
            return lambda: self._skeleton.read_layer(layer)

        reads = [reading(layer) for layer in layers]
        return [*reads, self._skeleton.read_head] if with_head else reads

    def _depart(self, first: int) -> list[_Traveller]:
        states = self._factory.make()
        travellers = [_Traveller(lane, states) for lane in self._lanes]
        source = self._options.initial or self._calls.embed
        for batch in self._batches:
            value = source(batch)
            _require_finite(value, first, batch)
            states.put(batch, value)
            self._show(first, batch, value, travellers)
        self._finished(first, travellers)
        self._enter_spans(first, travellers)
        return travellers

    def _through_layer(self, layer: int, travellers: list[_Traveller], weights: Weights) -> None:
        with self._skeleton.loaded_layer(layer, weights):
            for group in _groups(t for t in travellers if t.waiting is None):
                source = group[0].states
                shared = any(t.states is source for t in travellers if t.waiting is not None)
                target = self._factory.make() if shared else source
                for batch in self._batches:
                    value = self._calls.layer(layer, batch, source.get(batch).to(self._skeleton.device))
                    _require_finite(value, layer + 1, batch)
                    target.put(batch, value)
                    self._show(layer + 1, batch, value, group)
                for traveller in group:
                    traveller.states = target
        return_free_memory()

    def _arrive(self, position: int, travellers: list[_Traveller]) -> None:
        for traveller in travellers:
            span = traveller.waiting
            if span is not None and span.stop == position:
                self._apply(span, traveller, travellers)
                traveller.waiting = None
        self._finished(position, travellers)
        self._enter_spans(position, travellers)

    def _apply(self, span: Span, traveller: _Traveller, travellers: list[_Traveller]) -> None:
        boundary_map = traveller.lane.maps.get(span)
        source = traveller.states
        if boundary_map is None:
            for batch in self._batches:
                self._show(span.stop, batch, source.get(batch), [traveller])
            return
        shared = sum(t.states is source for t in travellers) > 1
        target = self._factory.make() if shared else source
        for batch in self._batches:
            value = _mapped(boundary_map, source.get(batch).to(self._skeleton.device))
            _require_finite(value, span.stop, batch)
            target.put(batch, value)
            self._show(span.stop, batch, value, [traveller])
        traveller.states = target

    def _through_head(self, travellers: list[_Traveller], weights: Weights) -> None:
        with self._skeleton.loaded_head(weights):
            for traveller in travellers:
                if traveller.lane.logits is not None:
                    for batch in self._batches:
                        self._show_logits(traveller, batch)

    def _show_logits(self, traveller: _Traveller, batch: Batch) -> None:
        observer = traveller.lane.logits
        states = traveller.states.get(batch).to(self._skeleton.device)
        finished = self._calls.finish(batch, states)
        n_tokens = batch.ids.numel()
        if self._options.logit_tokens is None:
            logits = self._calls.logits(finished)
            if observer is not None:
                observer.observe_logits(batch, 0, logits.flatten(0, 1))
            return
        flat = finished.reshape(1, n_tokens, -1)
        for begin in range(0, n_tokens, self._options.logit_tokens):
            logits = self._calls.logits(flat[:, begin : begin + self._options.logit_tokens])
            if observer is not None:
                observer.observe_logits(batch, begin, logits[0])

    def _enter_spans(self, position: int, travellers: list[_Traveller]) -> None:
        for traveller in travellers:
            for span in traveller.lane.plan.spans:
                if span.start == position:
                    traveller.waiting = span

    def _show(self, position: int, batch: Batch, states: torch.Tensor, group: Sequence[_Traveller]) -> None:
        for traveller in group:
            for observer in traveller.lane.observers:
                if observer.wants(position):
                    observer.observe(position, batch, states)

    def _finished(self, position: int, travellers: Sequence[_Traveller]) -> None:
        for traveller in travellers:
            if traveller.sees(position):
                for observer in traveller.lane.observers:
                    if observer.wants(position):
                        observer.finished(position)


def _groups(travellers: Iterable[_Traveller]) -> list[list[_Traveller]]:
    groups: dict[int, list[_Traveller]] = {}
    for traveller in travellers:
        groups.setdefault(id(traveller.states), []).append(traveller)
    return list(groups.values())


def _mapped(boundary_map: BoundaryMap, states: torch.Tensor) -> torch.Tensor:
    return boundary_map(states).to(states.dtype)


def _require_finite(states: torch.Tensor, position: int, batch: Batch) -> None:
    if not bool(torch.isfinite(states).all()):
        msg = (
            f"hidden states at position {position} of sequences [{batch.start},{batch.stop}) are not finite; "
            f"use --dtype bfloat16 or float32 (float16 overflows in many models), or check the weights of the layer before"
        )
        raise NumericsError(msg)
