"""What each layer of a pruned and rescaled model does to the stream: how far it turns and scales it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import (
    Batch,
    BoundaryMap,
    HiddenStates,
    Lane,
    PassOptions,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.text import TokenSet


@dataclass(frozen=True)
class LayerChange:
    """What a layer does.

    Attributes:
        influence: Block Influence, ``1 - mean_t cos(x_t, y_t)`` of its input and output; a zero state has
            cosine 0.
        scale: Mean over windows and channels of ``mean_t |y_tk| / mean_t |x_tk|``; a channel that is zero
            throughout a window counts as ratio 1.
    """

    influence: float
    scale: float


def layer_changes(
    session: ModelSession,
    tokens: TokenSet,
    plan: PruningPlan,
    scales: Mapping[int, float],
    *,
    micro_batch: int,
    progress: Progress,
) -> dict[int, LayerChange]:
    """Return what every layer but the last does that is left of a model.

    Args:
        session: The model.
        tokens: The text; masked tokens do not count.
        plan: What was removed.
        scales: By removed layer, what the states are multiplied with in its place.
        micro_batch: Sequences in one forward.
        progress: Who is told how far it is.

    Raises:
        NumericsError: If a state is not finite.
        BudgetError: If two layers and a micro-batch do not fit the memory given.

    Memory: that of the pass, with the states of all sequences once more. Cost: one pass without the head.
    """
    skeleton = session.skeleton
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    factory = session.memory(tokens.length).states_factory(batches)
    left = [layer for layer in range(skeleton.n_layers - 1) if layer not in plan.removed]
    watcher = _Watcher(left, factory)
    maps: dict[Span, BoundaryMap] = {
        span: _Scaled(math.prod(scales[layer] for layer in range(span.start, span.stop)))
        for span in plan.spans
    }
    lane = Lane("pruned", plan, maps, observers=(watcher,), until=skeleton.n_layers - 1)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(kept=1, progress=progress)).run()
    return watcher.changes()


class _Scaled(BoundaryMap):
    """Multiplies the states with a number."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return the scaled states."""
        return self._factor * states


class _Watcher:
    """Compares the states that enter a layer, which it keeps in a place of a factory, with what leaves it."""

    def __init__(self, layers: list[int], factory: StatesFactory) -> None:
        self._layers = layers
        self._factory = factory
        self._entered: HiddenStates | None = None
        self._cosines, self._ratios = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
        self._tokens, self._windows = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def changes(self) -> dict[int, LayerChange]:
        """Return what the layers do."""
        return {
            layer: LayerChange(
                1.0 - self._cosines[layer] / self._tokens[layer], self._ratios[layer] / self._windows[layer]
            )
            for layer in self._layers
        }

    def wants(self, position: int) -> bool:
        """Whether a layer that is left begins or ends here."""
        return position in self._layers or position - 1 in self._layers

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Compare the states with those that entered the layer before, and keep them."""
        if self._entered is None:
            self._entered = self._factory.make()
        if position - 1 in self._layers:
            entered = self._entered.get(batch).to(states.device)
            for number, (x, y) in enumerate(zip(entered, states, strict=True)):
                mask = None if batch.mask is None else batch.mask[number]
                self._compare(position - 1, x if mask is None else x[mask], y if mask is None else y[mask])
        if position in self._layers:
            self._entered.put(batch, states)

    def finished(self, position: int) -> None:
        """Give the place back behind the last layer."""
        if position > max(self._layers):
            self._release()

    def failed(self) -> None:
        """Give the place back."""
        self._release()

    def _release(self) -> None:
        if self._entered is not None:
            self._factory.release(self._entered)
            self._entered = None

    def _compare(self, layer: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if not len(inputs):
            return
        x, y = inputs.double(), outputs.double()
        self._cosines[layer] += float(torch.nn.functional.cosine_similarity(x, y, dim=-1).sum())
        sizes = x.abs().mean(dim=0), y.abs().mean(dim=0)
        ratios = torch.where(sizes[0] > 0, sizes[1] / sizes[0], 1.0)
        self._ratios[layer] += float(ratios.mean())
        self._tokens[layer] += len(x)
        self._windows[layer] += 1
