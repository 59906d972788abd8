"""The backward direction, out of core: gradients of a loss with one decoder layer on the device at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.backward_head import HeadBackward
from ghoststream.streaming.backward_states import GradientFlow, InputKeeper
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.boundary_map import BoundaryMap, require_boundary_maps
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.executor import PassOptions, StreamedPass
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.gradients import (
    TokenLoss,
    WeightGradients,
    require_gradient_dtype,
    summed_gradients,
    wanted_weights,
)
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.prefetch import WeightPrefetcher, layer_reads
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.states import HiddenStates, StatesFactory
from ghoststream.streaming.taps import LayerTaps
from ghoststream.streaming.weights import Weights


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing that the lane goes through: a layer, the map of a span, or both.

    ``position``: where its input is kept. A map that reads the layer before its span is one step with it.
    """

    position: int
    layer: int | None = None
    span: Span | None = None


class BackwardPass:
    """A forward pass that keeps the input of every layer, and the way back.

    Back, each layer is run again, in reverse, with autograd. In ten lines, for steps that are layers, or maps
    at boundaries::

        for step in steps:                                      # a StreamedPass
            inputs[step] = states
            states = step(states)
        loss, gradient = value and gradient of loss(head(states))
        for step in reversed(steps):
            for batch in batches:
                output = step(inputs[step][batch])              # again, with autograd this time
                output.backward(gradient[batch])                # adds up in the parameters' gradients
                gradient[batch] = gradient at inputs[step][batch]

    Every layer is read once forward and once backward, whatever the number of micro-batches, the next one
    while this one computes. The layers' weights are frozen. Gradients are taken of the parameters of the maps
    at boundaries, where they add up in ``parameter.grad`` in the order of the micro-batches, and of those
    weights of a layer, or of the final norm, that somebody asks for. Where the lane has weights in the places
    of the model's, they are those of these. They are those of the resident model under autograd for the
    same micro-batches, but for the order in which a resident model would add micro-batches up. The way back
    ends at the lowest step whose gradient is asked for.

    Args:
        skeleton: The model.
        batches: The micro-batches, in order.
        loss: What is differentiated; its value is the sum over all chunks of tokens of all batches.
        factory: Where inputs and gradients are kept.
        lane: The variant of the model; the dense model if ``None``. Of its maps ``enter`` and ``apply`` are
            differentiated.
        gradients: Who sees gradients of weights of layers and the final norm.
        options: Where the pass starts, and who is told how far it is; ``last_layer`` must be ``None``.

    Raises:
        RequestError: If nothing asks for a gradient, the compute dtype is float16 (small gradients vanish in
            it), a map is fitted, or the pass does not run to the end.
        PlanError: If the plan does not fit the model.

    Memory: that of a :class:`StreamedPass`; the states of all sequences once more for each layer on the way
    back and once for their gradient (within the factory's budget; what does not fit goes to scratch); what
    autograd keeps of one layer and one micro-batch, about four times the work of a forward; four bytes for
    each weight of a layer whose gradient is asked for, and the largest of these gradients once more; at the
    head, what the loss keeps of ``logit_tokens * V`` logits and their gradient.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        loss: TokenLoss,
        factory: StatesFactory,
        *,
        lane: Lane | None = None,
        gradients: WeightGradients | None = None,
        options: PassOptions | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._batches = batches
        self._factory = factory
        self._weight_gradients = gradients
        self._options = options or PassOptions()
        self._calls = ModelCalls(skeleton)
        self._lane = lane or Lane("dense", PruningPlan(skeleton.n_layers))
        self._plan, self._maps = self._lane.plan, dict(self._lane.maps)
        _require_known_maps(self._maps, self._plan)
        self._require_possible()
        self._head = HeadBackward(
            skeleton,
            self._calls,
            loss,
            lane=self._lane,
            gradients=gradients,
            logit_tokens=self._options.logit_tokens,
        )
        self._steps = self._steps_back()

    def run(self) -> float:
        """Run both ways and return the loss.

        Raises:
            NumericsError: If states, the loss or a gradient stop being finite.
            UnsupportedModelError: If a layer cannot be differentiated.
            RequestError: If a map cannot.
            CheckpointError: If weights cannot be read.
        """
        end = self._skeleton.n_layers
        with ExitStack() as kept:
            positions = {end, *(step.position for step in self._steps)}
            keeper = InputKeeper(positions, self._factory, self._skeleton)
            kept.callback(keeper.release_all)
            weights = self._lane.weights
            lane = Lane("forward", self._plan, self._maps, observers=(keeper,), weights=weights)
            # Their gradient comes in the place of the states that go forward.
            options = replace(self._options, kept=len(positions))
            StreamedPass(self._skeleton, self._batches, [lane], self._factory, options).run()
            with torch.no_grad(), self._skeleton.loaded_frame():
                return self._way_back(keeper)

    def _way_back(self, keeper: InputKeeper) -> float:
        skeleton, progress = self._skeleton, self._options.progress
        layers = [step.layer for step in self._steps if step.layer is not None]
        progress.start("streaming layers backward", len(layers) + 1, "layers")
        gradients = self._factory.make()
        end = skeleton.n_layers
        with ExitStack() as opened:
            opened.callback(self._factory.release, gradients)
            with skeleton.loaded_head(skeleton.read_head()):
                # Not before: loading the head gives the layers' buffers back.
                weights = opened.enter_context(WeightPrefetcher(layer_reads(skeleton, layers)))
                with StatesFlow(keeper.place(end), gradients, self._batches, skeleton.device) as ended:
                    loss = self._head.run(ended)
            keeper.release(end)
            progress.advance(1)
            for step in self._steps:
                flow = self._flow(keeper.place(step.position), gradients, last=step is self._steps[-1])
                if step.layer is None:
                    self._through_map(step, flow)
                else:
                    self._through_layer(step.layer, step.span, weights.take(), flow)
                    progress.advance(1)
                keeper.release(step.position)
                return_free_memory()
        progress.finish()
        return loss

    def _through_map(self, step: _Step, flow: GradientFlow) -> None:
        assert step.span is not None
        boundary_map = self._maps[step.span]
        with flow:
            for batch, states, above in flow:
                with torch.enable_grad():
                    mapped = boundary_map.apply(states).to(above.dtype)
                _require_differentiable_map(step.span, mapped)
                mapped.backward(above)
                flow.put(batch, states, step.position)
            flow.require_finite()

    def _through_layer(self, layer: int, span: Span | None, weights: Weights, flow: GradientFlow) -> None:
        tapped = None if span is None else self._maps[span]
        with (
            self._skeleton.loaded_layer(layer, weights) as module,
            self._lane.standing(self._skeleton, layer),
            summed_gradients(module, self._wanted(layer)) as sums,
            LayerTaps(self._skeleton, layer, () if tapped is None else tapped.taps) as taps,
            flow,
        ):
            for batch, states, above in flow:
                with torch.enable_grad():
                    output = self._calls.layer(layer, batch, states)
                    if tapped is not None:
                        entered = tapped.enter(output, taps.take(batch)).to(output.dtype)
                        output = tapped.apply(entered).to(output.dtype)
                if tapped is None:
                    self._require_differentiable(layer, module, output)
                else:
                    _require_differentiable_map(span, output)
                output.backward(above)
                flow.put(batch, states, layer)
            flow.require_finite()
            for name, total in sums.items():
                assert self._weight_gradients is not None
                self._weight_gradients.observe(layer, name, module.get_parameter(name).detach(), total)

    def _flow(self, states: HiddenStates, gradients: HiddenStates, *, last: bool) -> GradientFlow:
        return GradientFlow(states, gradients, self._batches, self._skeleton.device, to_inputs=not last)

    def _wanted(self, layer: int) -> list[str]:
        return wanted_weights(self._weight_gradients, layer, self._skeleton.layers[layer])

    def _steps_back(self) -> list[_Step]:
        """Return what the way back goes through, in order: from the last step down to the lowest wanted."""
        plan, end = self._plan, self._skeleton.n_layers
        tapped = {span.start - 1: span for span, found in self._maps.items() if found.taps}
        steps: list[_Step] = []
        for position in range(self._options.first_layer, end + 1):
            steps += [
                _Step(span.start, span=span)
                for span in plan.spans
                if span.stop == position and span in self._maps and span not in tapped.values()
            ]
            if position < end and not any(position in span for span in plan.spans):
                steps.append(_Step(position, layer=position, span=tapped.get(position)))
        lowest = next((index for index, step in enumerate(steps) if self._asks(step)), None)
        if lowest is None and self._head.wanted():
            return []
        if lowest is None:
            msg = (
                "nothing asks for a gradient: no map has parameters that require one, and no weight is wanted"
            )
            raise RequestError(msg)
        return steps[lowest:][::-1]

    def _asks(self, step: _Step) -> bool:
        parameters = () if step.span is None else self._maps[step.span].parameters()
        if any(parameter.requires_grad for parameter in parameters):
            return True
        return step.layer is not None and bool(self._wanted(step.layer))

    def _require_possible(self) -> None:
        if self._lane.behind:
            msg = f"lane {self._lane.name} has maps behind layers: they cannot be differentiated here"
            raise RequestError(msg)
        self._plan.require_fits(self._skeleton.n_layers)
        require_gradient_dtype(self._skeleton.dtype)
        if self._options.last_layer is not None:
            msg = f"a loss needs the whole model, and this pass ends before layer {self._options.last_layer}"
            raise RequestError(msg)

    def _require_differentiable(self, layer: int, module: nn.Module, output: torch.Tensor) -> None:
        if not output.requires_grad:
            msg = (
                f"layer {layer} ({type(module).__name__}) returns states without a gradient: its code "
                "cannot be differentiated; choose another --attention"
            )
            raise UnsupportedModelError(msg)


def _require_known_maps(maps: Mapping[Span, BoundaryMap], plan: PruningPlan) -> None:
    require_boundary_maps("this pass", maps)
    for span, found in maps.items():
        if span not in plan.spans:
            msg = f"the map at {span} is not at a boundary of the plan {plan}"
            raise RequestError(msg)
        if found.target is not None:
            msg = f"the map at {span} is fitted while a pass runs: it cannot be differentiated here"
            raise RequestError(msg)


def _require_differentiable_map(span: Span | None, mapped: torch.Tensor) -> None:
    if not mapped.requires_grad:
        msg = f"the map at {span} returns states without a gradient: it cannot be differentiated"
        raise RequestError(msg)
