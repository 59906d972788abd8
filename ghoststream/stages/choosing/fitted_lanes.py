"""The lanes of a pass whose boundaries are fitted while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.options import Method
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.fitting import StreamedFit
from ghoststream.stages.choosing.moments import Figures, FitPlace, place_fits
from ghoststream.stages.choosing.refitting import RefittedLayer, RefittedProjection, refitted_layers
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.streaming import BoundaryMap, Lane, LogitsObserver, PassMemory, ReplacedWeights

_Path = tuple[tuple[Span, Method], ...]


class FittedLanes:
    """The lanes of one pass whose boundaries are fitted one after another to its dense lane.

    Maps are made once for all that was removed and fitted up to them, themselves included: lanes that begin
    alike have their first maps in common, and do that part of the way together. An operator with dense inputs
    is fitted once for all lanes, by a helper that goes over its boundary alone.

    Args:
        ranges: How the sequences that serve to fit are divided; ``None`` if nothing is fitted: the spans are
            just cut.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        carried: Sequences that the dense lane and all others carry on; see
            :class:`~ghoststream.streaming.Lane`.
        figures: Which figures of the operators are wanted.
    """

    def __init__(
        self,
        ranges: Ranges | None,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        carried: tuple[int, int] | None = None,
        *,
        figures: Figures = "all",
    ) -> None:
        self._figures = figures
        self._place = FitPlace()
        self._ranges = ranges
        self._mask = mask
        self._session = session
        self._carried = carried
        self._maps: dict[_Path, StreamedFit] = {}
        self._helpers: dict[object, Lane] = {}
        self._refits: dict[tuple[_Path, int], RefittedLayer] = {}

    def lane(
        self,
        name: str,
        repair: Repair,
        *,
        logits: LogitsObserver | None = None,
        until: int | None = None,
    ) -> Lane:
        """Return the lane of a repair.

        Its maps are :class:`StreamedFit` objects, whose operators can be read after the pass.

        Raises:
            RequestError: If features of the layer before are asked for where there is none.
            UnsupportedModelError: If the model does not allow them.
        """
        maps: dict[Span, StreamedFit] = {}
        behind: dict[int, BoundaryMap] = {}
        new: dict[str, torch.Tensor] = {}
        so_far: _Path = ()
        for span, method in repair.by_span.items():
            so_far = (*so_far, (span, method if so_far else method.model_copy(update={"inputs": "repaired"})))
            if self._ranges is None:
                continue
            maps[span] = self._map(so_far, self._ranges)
            for layer in refitted_layers(repair.plan, span, method.refit):
                before = Lane(
                    f"{name} before layer {layer}",
                    repair.plan,
                    dict(maps),
                    until=layer + 1,
                    carried=self._carried,
                    weights=self._weights(new),
                    behind=dict(behind),
                )
                refitted = self._refit((so_far, layer), before, self._ranges)
                behind[layer] = refitted.mlp
                new[refitted.attention.projection.weight] = refitted.attention.weight
        return Lane(
            name,
            repair.plan,
            maps,
            logits=logits,
            until=until,
            carried=self._carried,
            weights=self._weights(new),
            behind=behind,
        )

    def memory(self, progress: Progress) -> PassMemory:
        """Return the memory of the pass, with all lanes made; fits that an accelerator holds are there.

        States leave what the largest fit takes on the host.

        Args:
            progress: Told which fits have no room on the accelerator.
        """
        parts = [part for refitted in self._refits.values() for part in refitted.parts]
        own = [one.boundary for one in self._maps.values() if one.target is not None]
        fits = [*own, *(part.boundary for part in parts)]
        memory = self._session.memory(self._mask.shape[1], buffers=self._waiting_bytes())
        place_fits(self._place, self._session, memory, fits, progress)
        return memory

    def _waiting_bytes(self) -> int:
        """Return the bytes of operators that wait for others to take them over: all that end at one place."""
        waiting: Counter[int] = Counter()
        for one in self._maps.values():
            if one.serves_others and self._figures != "all":
                waiting[one.span.stop] += one.boundary.operator_bytes
        return max(waiting.values(), default=0)

    def helpers(self) -> list[Lane]:
        """Return the lanes that fit for others; they go before them."""
        return list(self._helpers.values())

    def refits(self, lane: Lane) -> dict[int, RefittedLayer]:
        """Return what was fitted anew for a lane, by layer."""
        found = {refitted.mlp: refitted for refitted in self._refits.values()}
        return {
            layer: found[one] for layer, one in lane.behind.items() if isinstance(one, RefittedProjection)
        }

    def _refit(self, key: tuple[_Path, int], before: Lane, ranges: Ranges) -> RefittedLayer:
        """Return the refit of a layer, made once for lanes that begin alike.

        Args:
            key: What was removed and fitted up to the layer, and the layer.
            before: The lane up to the layer, with the layer as it is. It fits attention; the lane itself then
                runs the layer with that, and fits the MLP.
            ranges: How the sequences that serve to fit are divided.
        """
        if key not in self._refits:
            layer = key[1]
            refitted = RefittedLayer.make(
                layer, ranges, self._mask, self._session, diagnosed=self._figures == "all", place=self._place
            )
            self._refits[key] = refitted
            helper = replace(before, behind={**before.behind, layer: refitted.attention})
            self._helpers[key] = helper
        return self._refits[key]

    def _weights(self, new: Mapping[str, torch.Tensor]) -> ReplacedWeights | None:
        return ReplacedWeights(self._session.skeleton, dict(new)) if new else None

    def _map(self, path: _Path, ranges: Ranges) -> StreamedFit:
        span, method = path[-1]
        # What is fitted anew behind a boundary does not change the fit there.
        path = (*path[:-1], (span, method.model_copy(update={"refit": 0})))
        if path not in self._maps:
            span, method = path[-1]
            source = self._alone(span, method, ranges) if method.inputs == "dense" else None
            self._maps[path] = StreamedFit(
                span,
                method,
                ranges,
                self._mask,
                self._session,
                source,
                figures=self._figures,
                place=self._place,
            )
        return self._maps[path]

    def _alone(self, span: Span, method: Method, ranges: Ranges) -> StreamedFit:
        path: _Path = ((span, method.model_copy(update={"inputs": "repaired", "refit": 0})),)
        fit = self._map(path, ranges)
        plan = PruningPlan(self._session.skeleton.n_layers, (span,))
        self._helpers[path] = Lane(f"{span} alone", plan, {span: fit}, until=span.stop, carried=self._carried)
        return fit
