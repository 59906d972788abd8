"""The layer-major pass: load each layer once, run every batch of every lane through it, free it.

The loop that everything here is about, for lanes that skip the spans of their plans::

    states = {lane: embed(batches) for lane in lanes}           # one object for all until they part
    for layer in range(n_layers):
        load(layer)                                             # the next one is read meanwhile
        for group in lanes with the same states, not inside a span:
            for batch in batches:
                states[group][batch] = layer(states[group][batch])
                keep[group][batch] = map.enter(states, taps)    # a span starts behind and its map reads taps
        free(layer)
        for group in lanes whose span stops at layer + 1, with the same map:
            map.fit(keep[group], states[target])                # where the map has a target
            states[group] = map.apply(keep[group])              # then observers see every state
    show(head(norm(states)))                                    # a chunk of tokens at a time

``keep`` is a lane's state at ``start`` where its map reads no taps. :class:`LaneGroups` knows who carries
which states, :class:`StatesFlow` brings them to the device and away, :class:`WeightPrefetcher` reads weights,
:class:`~ghoststream.streaming.calls.ModelCalls` runs the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.machine import idle_page_locked_memory
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stopping import require_going_on
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.batches import Batch, states_not_finite
from ghoststream.streaming.boundary_map import Pairs, require_boundary_maps
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.finite import FiniteFlags
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.lane_groups import LaneGroups, LaneState
from ghoststream.streaming.lanes import Behind, Lane, Place
from ghoststream.streaming.output_head import OutputHead
from ghoststream.streaming.prefetch import WeightPrefetcher, layer_reads
from ghoststream.streaming.rehearsal import rehearsed
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.states import StatesFactory
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
        kept: Places for the states of all sequences that observers take of the factory at once, at most. They
            count in what the pass says it needs before it reads.
        progress: Who is told how far the pass is.
    """

    first_layer: int = 0
    initial: Callable[[Batch], torch.Tensor] | None = None
    last_layer: int | None = None
    logit_tokens: int | None = 256
    kept: int = 0
    progress: Progress = field(default_factory=SilentProgress)


class StreamedPass:
    """One trip over the layers with any number of lanes.

    Lanes share work: those that carry the same states go through a layer together, and over a boundary
    together if their map there is one object, which is then fitted once; states are only copied where lanes
    part. A layer that every lane skips is not read.

    Memory: two parts of the model (the one in use and the one being read), the states of each distinct
    carried variant (``S * T * C`` elements each, within the factory's budget), one batch in flight,
    ``logit_tokens * V`` logits, and for each distinct map that reads taps the places of what it keeps
    (``S * T * width`` elements).

    Args:
        skeleton: The model.
        batches: The micro-batches, in order.
        lanes: The variants; a lane with an empty plan is the dense model.
        factory: Where states between layers are kept.
        options: See :class:`PassOptions`.

    Raises:
        PlanError: If a lane's plan is for another number of layers.
        RequestError: If lanes would need states before ``first_layer``, a map is no :class:`BoundaryMap`, or
            is fitted to a lane that is not there.
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
        self._finite = FiniteFlags()
        self._last = skeleton.n_layers if self._options.last_layer is None else self._options.last_layer
        self._lanes = tuple(lanes)
        for lane in lanes:
            lane.plan.require_fits(skeleton.n_layers)
        _require_consistent(self._lanes, self._options.first_layer, batches)

    def run(self) -> None:
        """Run the pass; results are with the lanes' observers.

        Raises:
            BudgetError: If states will not fit their scratch disk; nothing was read then.
            NumericsError: If hidden states stop being finite.
            CheckpointError: If weights cannot be read.
            StoppedError: If the process was asked to stop: behind the next layer, when observers have it.
        """
        first, last = self._options.first_layer, self._last
        layers = [n for n in range(first, last) if any(lane.runs(n) for lane in self._lanes)]
        try:
            self._prepare(self._rehearsed(set(layers)))
            with torch.inference_mode(), self._skeleton.loaded_frame():
                self._run(layers)
        except BaseException as error:
            for lane in self._lanes:
                for observer in lane.observers:
                    observer.failed()
            if isinstance(error, NumericsError):
                # An observer may have met what the pass has only noted, and the pass knows where it is.
                self._finite.look()
            raise

    def _rehearsed(self, layers: set[int]) -> StatesFactory:
        first, kept = self._options.first_layer, self._options.kept
        return rehearsed(self._lanes, self._batches, self._factory, first, self._last, layers, kept)

    def _prepare(self, needed: StatesFactory) -> None:
        self._factory.require_scratch(needed.most_scratch)
        # What torch keeps page-locked serves again.
        idle = idle_page_locked_memory(self._skeleton.device)
        self._skeleton.reader.share_memory(needed.most_host - idle)

    def _run(self, layers: Sequence[int]) -> None:
        return_free_memory()
        first, progress = self._options.first_layer, self._options.progress
        read = set(layers)
        with_head = self._last == self._skeleton.n_layers and any(lane.logits for lane in self._lanes)
        reads = [*layer_reads(self._skeleton, layers), *([self._skeleton.read_head] if with_head else [])]
        progress.start("streaming layers", len(layers), "layers")
        with WeightPrefetcher(reads) as weights:
            groups = self._begin(first)
            for layer in range(first, self._last):
                if layer in read:
                    self._through_layer(layer, groups, weights.take())
                    progress.advance(1)
                for group in groups.stopping(layer + 1):
                    self._over_boundary(layer + 1, groups, group)
                self._finish_position(layer + 1, groups)
                require_going_on()
            if with_head:
                head = OutputHead(self._skeleton, self._calls, self._options.logit_tokens, progress)
                head.run(groups.lanes, weights.take())
        groups.end_all()
        progress.finish()

    def _begin(self, first: int) -> LaneGroups:
        groups = LaneGroups(self._lanes, self._batches, self._factory)
        source = self._options.initial or self._calls.embed
        with self._rows_of_tokens():
            for batch in self._batches:
                value = source(batch).to(self._skeleton.device)
                self._note(value, first, batch)
                groups.first.put(batch, value)
                self._show(first, batch, value, groups.lanes)
        self._finish_position(first, groups)
        return groups

    def _rows_of_tokens(self) -> AbstractContextManager[None]:
        if self._options.initial is not None:
            return nullcontext()
        return self._skeleton.held_embeddings([batch.ids for batch in self._batches])

    def _through_layer(self, layer: int, groups: LaneGroups, weights: Weights) -> None:
        with self._skeleton.loaded_layer(layer, weights):
            for group in groups.running(layer):
                self._group_through_layer(layer, groups, group)
                # At once: a fit here may be of weights that a lane of a later group has in this layer.
                for part in groups.behind(layer, group):
                    self._over_boundary(layer + 1, groups, part)
        return_free_memory()

    def _group_through_layer(self, layer: int, groups: LaneGroups, group: Sequence[LaneState]) -> None:
        entering = groups.entering(group, layer + 1)
        names = {name for one in entering for name in one.boundary_map.taps}
        lane = group[0].lane
        with (
            lane.standing(self._skeleton, layer),
            LayerTaps(self._skeleton, layer, sorted(names)) as taps,
        ):

            def move(batch: Batch, states: torch.Tensor) -> torch.Tensor:
                value = self._calls.layer(layer, batch, states)
                taken = taps.take(batch)
                for one in entering:
                    if batch.start in one.starts:
                        kept = one.boundary_map.enter(value, taken).to(value.dtype)
                        self._note(kept, layer + 1, batch)
                        one.place.put(batch, kept)
                return value

            self._move(layer + 1, groups, group, move)

    def _over_boundary(self, position: int, groups: LaneGroups, group: Sequence[LaneState]) -> None:
        boundary_map = group[0].boundary_map
        if boundary_map.target is not None:
            self._finite.look()
            target = groups.named(boundary_map.target)
            boundary_map.fit(Pairs(groups.batches_of(group), group[0].states, target.states))
        for one in group:
            if one.fits_no_more:
                one.drop_fitting_batches()
        self._move(position, groups, group, lambda _, states: boundary_map.apply(states).to(states.dtype))
        boundary_map.release()
        for one in group:
            one.inside = None

    def _move(self, position: int, groups: LaneGroups, group: Sequence[LaneState], move: Move) -> None:
        """Bring the states that a group carries to ``position``."""
        place = groups.place_after(group)
        batches = groups.batches_of(group)
        with StatesFlow(group[0].states, place, batches, self._skeleton.device) as flow:
            for batch, states in flow:
                value = move(batch, states)
                self._note(value, position, batch)
                flow.put(batch, value)
                self._show(position, batch, value, group)
        for one in group:
            one.states = place

    def _finish_position(self, position: int, groups: LaneGroups) -> None:
        self._finite.look()  # what observers commit now, and what is read from here on, is finite
        for one in groups.lanes:
            if one.inside is None:
                for observer in one.lane.observers:
                    if observer.wants(position):
                        observer.finished(position)
        groups.end_lanes(position)
        groups.enter_spans(position)

    def _note(self, states: torch.Tensor, position: int, batch: Batch) -> None:
        self._finite.note(states, partial(states_not_finite, f"at position {position}", batch))

    def _show(self, position: int, batch: Batch, states: torch.Tensor, group: Sequence[LaneState]) -> None:
        for one in group:
            if one.inside is None and position - 1 in one.lane.behind:
                continue  # shown when they went through the map
            for observer in one.lane.observers:
                if observer.wants(position) and one.carries(batch):
                    observer.observe(position, batch, states)


def _require_consistent(lanes: Sequence[Lane], first_layer: int, batches: Sequence[Batch]) -> None:
    edges = {batch.start for batch in batches} | {batch.stop for batch in batches}
    for lane in lanes:
        if any(span.start < first_layer for span in lane.plan.spans):
            msg = f"lane {lane.name} removes layers before {first_layer}, where this pass starts"
            raise RequestError(msg)
        if lane.weights is not None and lane.weights.first < first_layer:
            msg = f"lane {lane.name} replaces weights before layer {first_layer}, where this pass starts"
            raise RequestError(msg)
        carried = lane.carried
        if carried is not None and not (carried[0] < carried[1] and edges.issuperset(carried)):
            msg = (
                f"lane {lane.name} carries the sequences {list(carried)} on, which are not whole "
                "micro-batches"
            )
            raise RequestError(msg)
        require_boundary_maps(f"lane {lane.name}", {place: lane.map_at(place) for place in lane.places})
        for place in lane.places:
            boundary_map = lane.map_at(place)
            if isinstance(place, Behind):
                _require_behind(lane, place, first_layer)
            if boundary_map.target is not None:
                _require_target(lane, place, boundary_map.target, lanes)
            if boundary_map.taps and place.start <= first_layer:
                msg = (
                    f"the map of lane {lane.name} at {place} reads the layer before it, which this pass does "
                    "not run"
                )
                raise RequestError(msg)


def _require_behind(lane: Lane, place: Behind, first_layer: int) -> None:
    runs = first_layer <= place.layer < lane.plan.n_layers and lane.runs(place.layer)
    if not runs or any(span.start == place.start for span in lane.plan.spans):
        msg = (
            f"lane {lane.name} has a map {place}, which it does not run in this pass, or which a gap follows;"
            " give maps behind layers that it runs and no gap follows"
        )
        raise RequestError(msg)


def _require_target(lane: Lane, place: Place, name: str, lanes: Sequence[Lane]) -> None:
    targets = [other for other in lanes if other.name == name]
    # At the stop of a span of its own, the target could not be told from its neighbour's order.
    if len(targets) != 1 or any(other.start < place.stop <= other.stop for other in targets[0].plan.spans):
        msg = (
            f"lane {lane.name} fits its map at {place} to lane {name!r},"
            f" but not exactly one lane of that name has states of its own at position {place.stop}"
        )
        raise RequestError(msg)
    if targets[0].carried not in (None, lane.carried):
        msg = f"lane {lane.name} fits its map at {place} to lane {name!r}, which carries other sequences on"
        raise RequestError(msg)
    if isinstance(place, Behind) and lanes.index(targets[0]) > lanes.index(lane):
        msg = f"lane {lane.name} fits its map {place} to lane {name!r}, which has to go before it"
        raise RequestError(msg)
