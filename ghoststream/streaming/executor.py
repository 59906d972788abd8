"""The layer-major pass: load each layer once, run every batch of every lane through it, free it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.progress import Progress, SilentProgress
from ghoststream.spans import Span
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.convoy import Convoy, Traveller
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.lanes import BoundaryMap, FittedMap, Lane, TappedFit, TappedMap
from ghoststream.streaming.output_head import OutputHead
from ghoststream.streaming.prefetch import WeightPrefetcher
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.states import HiddenStates, StatesFactory
from ghoststream.streaming.taps import LayerTaps
from ghoststream.streaming.weights import Weights

Move = Callable[[Batch, torch.Tensor], torch.Tensor]
"""Takes the states of a batch to the next position of a lane."""


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

    Lanes share work: those that carry the same states go through a layer together, and over a boundary together if their
    map there is one object, which is then fitted once; states are only copied where lanes part. A layer that every lane
    skips is not read.

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
        RequestError: If lanes would need states before ``first_layer``, or fit a map to a lane that is not
            there.
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
        _require_consistent(self._lanes, self._options.first_layer, batches)

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
        layers = [n for n in range(first, self._last) if any(lane.runs(n) for lane in self._lanes)]
        with_head = self._last == self._skeleton.n_layers and any(lane.logits for lane in self._lanes)
        progress.start("streaming layers", len(layers), "layers")
        with WeightPrefetcher(self._reads(layers, with_head=with_head)) as weights:
            convoy = self._depart(first)
            for layer in range(first, self._last):
                if layer in layers:
                    self._through_layer(layer, convoy, weights.take())
                    progress.advance(1)
                self._arrive(layer + 1, convoy)
            if with_head:
                head = OutputHead(self._skeleton, self._calls, self._options.logit_tokens, progress)
                head.run(convoy.travellers, weights.take())
        convoy.disband()
        progress.finish()

    def _reads(self, layers: Sequence[int], *, with_head: bool) -> list[Callable[[], Weights]]:
        def reading(layer: int) -> Callable[[], Weights]:
            return lambda: self._skeleton.read_layer(layer)

        reads = [reading(layer) for layer in layers]
        return [*reads, self._skeleton.read_head] if with_head else reads

    def _depart(self, first: int) -> Convoy:
        convoy = Convoy(self._lanes, self._batches, self._factory)
        source = self._options.initial or self._calls.embed
        for batch in self._batches:
            value = source(batch).to(self._skeleton.device)
            _require_finite(value, first, batch)
            convoy.first.put(batch, value)
            self._show(first, batch, value, convoy.travellers)
        self._leave(first, convoy)
        return convoy

    def _through_layer(self, layer: int, convoy: Convoy, weights: Weights) -> None:
        with self._skeleton.loaded_layer(layer, weights):
            for group in convoy.going():
                self._group_through_layer(layer, convoy, group)
        return_free_memory()

    def _group_through_layer(self, layer: int, convoy: Convoy, group: Sequence[Traveller]) -> None:
        maps = _tapped_maps(group, layer + 1)
        repaired = [(tapped, convoy.prepare(ones, _kept_width(tapped))) for tapped, ones in maps]
        names = {name for tapped, _ in maps for name in tapped.taps}
        with LayerTaps(self._skeleton, layer, sorted(names)) as taps:

            def move(batch: Batch, states: torch.Tensor) -> torch.Tensor:
                value = self._calls.layer(layer, batch, states)
                taken = taps.take(batch)
                for tapped, place in repaired:
                    estimate = tapped.with_taps(value, taken).to(value.dtype)
                    _require_finite(estimate, layer + 1, batch)
                    place.put(batch, estimate)
                return value

            self._move(layer + 1, convoy, group, move)

    def _arrive(self, position: int, convoy: Convoy) -> None:
        for group in convoy.arriving(position):
            self._over_boundary(position, convoy, group)
        self._leave(position, convoy)

    def _over_boundary(self, position: int, convoy: Convoy, group: Sequence[Traveller]) -> None:
        span = group[0].waiting
        assert span is not None
        boundary_map = group[0].lane.maps.get(span)
        if isinstance(boundary_map, FittedMap):
            boundary_map.fit(self._pairs(convoy, group, convoy.find(boundary_map.target)))
        for traveller in group:
            if traveller.at_last_boundary:
                traveller.narrow()
        if isinstance(boundary_map, TappedFit) or not isinstance(boundary_map, TappedMap | None):
            self._move(position, convoy, group, _as_move(boundary_map))
        else:
            with self._flow(convoy, group) as flow:
                for batch, states in flow:
                    self._show(position, batch, states, group)
        if isinstance(boundary_map, FittedMap):
            boundary_map.release()
        for traveller in group:
            traveller.waiting = None

    def _move(self, position: int, convoy: Convoy, group: Sequence[Traveller], move: Move) -> None:
        """Bring the states that a group carries to ``position``."""
        target = convoy.target_for(group)
        with self._flow(convoy, group, target) as flow:
            for batch, states in flow:
                value = move(batch, states)
                _require_finite(value, position, batch)
                flow.put(batch, value)
                self._show(position, batch, value, group)
        for traveller in group:
            traveller.states = target

    def _flow(
        self, convoy: Convoy, group: Sequence[Traveller], target: HiddenStates | None = None
    ) -> StatesFlow:
        return StatesFlow(group[0].states, target, convoy.batches_of(group), self._skeleton.device)

    def _pairs(
        self, convoy: Convoy, group: Sequence[Traveller], target: Traveller
    ) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for batch in convoy.batches_of(group):
            yield batch, group[0].states.get(batch), target.states.get(batch)

    def _leave(self, position: int, convoy: Convoy) -> None:
        for traveller in convoy.travellers:
            if traveller.waiting is None:
                for observer in traveller.lane.observers:
                    if observer.wants(position):
                        observer.finished(position)
        convoy.retire(position)
        convoy.enter_spans(position)

    def _show(self, position: int, batch: Batch, states: torch.Tensor, group: Sequence[Traveller]) -> None:
        for traveller in group:
            for observer in traveller.lane.observers:
                if observer.wants(position) and traveller.carries(batch):
                    observer.observe(position, batch, states)


def _tapped_maps(group: Sequence[Traveller], start: int) -> list[tuple[TappedMap, list[Traveller]]]:
    """Return the maps of a group that read taps at a boundary, each with those whose map it is."""
    found: dict[int, tuple[TappedMap, list[Traveller]]] = {}
    for traveller in group:
        tapped = traveller.lane.tapped(start)
        if tapped is not None:
            found.setdefault(id(tapped), (tapped, []))[1].append(traveller)
    return list(found.values())


def _kept_width(boundary_map: TappedMap) -> int | None:
    return boundary_map.width if isinstance(boundary_map, TappedFit) else None


def _as_move(boundary_map: BoundaryMap) -> Move:
    return lambda _batch, states: boundary_map(states).to(states.dtype)


def _require_consistent(lanes: Sequence[Lane], first_layer: int, batches: Sequence[Batch]) -> None:
    edges = {batch.start for batch in batches} | {batch.stop for batch in batches}
    for lane in lanes:
        if any(span.start < first_layer for span in lane.plan.spans):
            msg = f"lane {lane.name} removes layers before {first_layer}, where this pass starts"
            raise RequestError(msg)
        if lane.goes_on is not None and not (
            lane.goes_on[0] < lane.goes_on[1] and edges.issuperset(lane.goes_on)
        ):
            msg = f"lane {lane.name} goes on with the sequences {list(lane.goes_on)}, which are not whole micro-batches"
            raise RequestError(msg)
        for span, boundary_map in lane.maps.items():
            if isinstance(boundary_map, FittedMap):
                _require_target(lane, span, boundary_map.target, lanes)
            if isinstance(boundary_map, TappedMap) and span.start <= first_layer:
                msg = f"the map of lane {lane.name} at {span} reads the layer before it, which this pass does not run"
                raise RequestError(msg)


def _require_target(lane: Lane, span: Span, name: str, lanes: Sequence[Lane]) -> None:
    targets = [other for other in lanes if other.name == name]
    # At the stop of a span of its own, the target could not be told from its neighbour's order.
    if len(targets) != 1 or any(other.start < span.stop <= other.stop for other in targets[0].plan.spans):
        msg = (
            f"lane {lane.name} fits its map at {span} to lane {name!r},"
            f" but not exactly one lane of that name has states of its own at position {span.stop}"
        )
        raise RequestError(msg)
    if targets[0].goes_on not in (None, lane.goes_on):
        msg = f"lane {lane.name} fits its map at {span} to lane {name!r}, which goes on with other sequences"
        raise RequestError(msg)


def _require_finite(states: torch.Tensor, position: int, batch: Batch) -> None:
    if not bool(torch.isfinite(states).all()):
        msg = (
            f"hidden states at position {position} of sequences [{batch.start},{batch.stop}) are not finite;"
            " use --dtype bfloat16 or float32 (float16 overflows in many models), or check the weights of the"
            " layer before"
        )
        raise NumericsError(msg)
