"""What a recovery run would need, from headers and a second of measurement: nothing is loaded.

``U`` is the unit of memory: the largest of one decoder layer, the embedding and the head. ``L`` layers, hidden
size ``C``, widest matrix of a layer ``I``, ``S`` sequences of ``T`` tokens, micro-batch ``B``, ``b`` bytes an element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ghoststream.errors import PlanError, UnsupportedModelError
from ghoststream.operators import OperatorOptions, features_of, make_operator
from ghoststream.options import dtype_name
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import tap_width, taps_width
from ghoststream.stages.planning.costs import all_needs, describe_problem, stage_costs
from ghoststream.stages.planning.figures import ModelSizes, Need, Request, StageCost
from ghoststream.stages.planning.machine import Rates, measure_rates
from ghoststream.stages.planning.search_costs import (
    fitted_by_passes,
    in_passes,
    pass_route_needs,
    pass_route_stages,
    stored_request,
)
from ghoststream.stages.planning.sweep_costs import (
    MomentRequest,
    StoreShape,
    SweepCost,
    select_sweeps,
    solve_sweeps,
)
from ghoststream.stages.repair.auto import AUTO
from ghoststream.stages.select import read_plan
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, Precision, taps_of
from ghoststream.streaming import Skeleton
from ghoststream.streaming.budget import work_bytes_per_token


@dataclass(frozen=True, slots=True)
class MomentOptions:
    """Of which spans moments would be gathered and how, as :func:`ghoststream.solve` takes it.

    Attributes:
        plan: The plan, its file, or spans such as ``13:19``; by default one span.
        weights, precision, folds, memory, workers: See there.
    """

    plan: PruningPlan | str | Path | None = None
    weights: str = UNIFORM
    precision: Precision = "float64"
    folds: int = DEFAULT_FOLDS
    memory: int | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The balance of a run: sizes, needs against what is free, work of each stage."""

    model: ModelSizes
    request: Request
    needs: Mapping[str, Need]
    stages: tuple[StageCost, ...]
    rates: Rates | None
    sweeps: tuple[SweepCost, ...] = ()

    @property
    def n_remove(self) -> int:
        """How many layers are to be removed."""
        return self.request.n_remove

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit, one sentence each, with what to do."""
        needs = [describe_problem(name, need) for name, need in self.needs.items() if not need.fits]
        return (*needs, *(cost.problem for cost in self.sweeps if cost.problem is not None))

    @property
    def seconds(self) -> float | None:
        """Estimated time of all stages; ``None`` if nothing was measured."""
        times = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(times) if len(times) == len(self.stages) else None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data; bytes, seconds, FLOPs."""
        return {
            "model": {**asdict(self.model), "root": str(self.model.root)},
            "request": asdict(self.request),
            "needs": {name: {**asdict(need), "fits": need.fits} for name, need in self.needs.items()},
            "stages": [asdict(stage) for stage in self.stages],
            "sweeps": [asdict(cost) for cost in self.sweeps],
            "rates": None if self.rates is None else asdict(self.rates),
            "seconds": self.seconds,
            "problems": list(self.problems),
            "fits": not self.problems,
        }


def plan_run(
    model: str | Path,
    *,
    n_remove: int,
    sequences: int = 128,
    length: int = 512,
    criterion: str = "measured",
    max_spans: int | None = None,
    operator: str = AUTO,
    options: OperatorOptions | None = None,
    layers: tuple[int, ...] | None = None,
    store_dtype: str | None = None,
    store: str | None = None,
    out: str | Path | None = None,
    measure: bool = True,
    moments: MomentOptions | None = None,
    **compute: Unpack[ComputeRequest],
) -> RunPlan:
    """Work out what recovering a model takes, and whether it fits this machine.

    Args:
        model: Local checkpoint folder, or a hub id (which is downloaded).
        n_remove: How many layers are to go.
        sequences: Windows of calibration text, S.
        length: Tokens of a window, T.
        criterion: How layers are chosen (``docs/selection.md``); those of :func:`ghoststream.search` make no store.
        max_spans: As :func:`ghoststream.search` takes it.
        operator: What is fitted, see :func:`ghoststream.solve`, or ``auto``.
        options: Options of the operator.
        layers: Positions whose hidden states are stored; ``None`` is all of ``0..L``.
        store_dtype: Dtype of the store; ``None`` is the compute dtype.
        store: Where the store would go; its disk is checked if it is a local path.
        out: Where the export would go; the working directory's disk is checked if ``None``.
        measure: Whether to read a part of the checkpoint and multiply matrices for about two seconds.
        moments: Which spans are solved and how, and within which memory; decides the number of sweeps over the store.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Returns:
        The plan. What does not fit is in its ``problems``, not an error.

    Raises:
        PlanError: If the model has not enough layers, or the spans are others than ``n_remove`` layers.
        RequestError: If options of the operator do not go together.
        GhoststreamError: If the checkpoint is incomplete or of an unknown architecture, or one that operators on features of the
            layer before cannot be absorbed into.

    Memory: headers of the checkpoint and three matrices of 8 MiB.
    """
    options = options or OperatorOptions()
    session = ModelSession(model, ModelOptions(**compute))
    skeleton = session.skeleton
    sizes = _model_sizes(skeleton, length)
    _require_layers(sizes, n_remove, layers)
    request = Request(
        n_remove=n_remove,
        sequences=sequences,
        length=length,
        micro_batch=min(
            session.options.micro_batch or session.memory(length).choose_micro_batch(), sequences
        ),
        operator=operator,
        features=options.features,
        criterion=criterion,
        device_memory=session.options.device_memory,
        host_memory=session.options.host_memory,
        scratch=session.options.scratch,
        store_dtype=store_dtype or sizes.dtype,
        max_spans=max_spans,
        n_stored=sizes.n_layers + 1 if layers is None else len(layers),
    )
    if operator == AUTO or request.reads_taps:
        request = replace(
            request, intermediate=_intermediate(skeleton, options.features, required=operator != AUTO)
        )
    shards = [skeleton.root / shard for shard in skeleton.index.shards]
    rates = measure_rates(shards, skeleton.dtype, session.device) if measure else None
    if in_passes(request):
        needs = pass_route_needs(sizes, request, session.device, Path(out or "."))
        return RunPlan(sizes, request, needs, pass_route_stages(sizes, request, rates), rates)
    moments = moments or MomentOptions()
    stored = replace(stored_request(request), solver=options.solver)
    sweeps = _sweeps(skeleton, stored, replace(options, features=stored.features), moments)
    store_path = None if store is not None and "://" in store else Path(store or ".")
    needs = all_needs(sizes, stored, sweeps, device=session.device, store=store_path, out=Path(out or "."))
    stages = stage_costs(sizes, stored, rates, sweeps)
    if operator == AUTO:
        needs, stages = fitted_by_passes(sizes, request, needs, stages, rates)
        sweeps = tuple(cost for cost in sweeps if cost.stage != "solve")
    return RunPlan(sizes, request, needs, stages, rates, sweeps)


def _sweeps(
    skeleton: Skeleton, request: Request, options: OperatorOptions, moments: MomentOptions
) -> tuple[SweepCost, ...]:
    spans: tuple[Span, ...] = (Span(1, 1 + request.n_remove),)
    if moments.plan is not None:
        plan = read_plan(moments.plan, skeleton.n_layers)
        if plan.n_removed != request.n_remove:
            msg = f"the plan {plan} removes {plan.n_removed} layers, and {request.n_remove} were asked for; give one number"
            raise PlanError(msg)
        spans = plan.spans
    taps = taps_of(features_of(make_operator(request.operator, options), options))
    wanted = MomentRequest(
        spans,
        request.operator,
        options,
        moments.weights,
        moments.precision,
        moments.folds,
        taps_width(skeleton, spans[0].start - 1, taps) if taps else 0,
        moments.memory,
        moments.workers,
    )
    shape = StoreShape(request.sequences, request.length, skeleton.hidden_size)
    selecting = select_sweeps(request.criterion, skeleton.n_layers, request.n_remove, shape, wanted)
    return (*selecting, *solve_sweeps(wanted, shape))


def _intermediate(skeleton: Skeleton, features: str, *, required: bool) -> int:
    """Return the width of the features ``mlp``, as far as the first layer says; 0 where they are not required and do not fold.

    Raises:
        UnsupportedModelError: If they are required, and operators cannot be absorbed.
    """
    try:
        require_absorbable(skeleton, Span(1, 2), features if required else "mlp")
    except UnsupportedModelError:
        if required:
            raise
        return 0
    return tap_width(skeleton, 0, "mlp_intermediate")


def _require_layers(sizes: ModelSizes, n_remove: int, layers: tuple[int, ...] | None) -> None:
    if not 0 < n_remove < sizes.n_layers:
        msg = f"cannot remove {n_remove} of the {sizes.n_layers} layers of {sizes.root}; at least one must survive"
        raise PlanError(msg)
    if layers is not None and max(layers) > sizes.n_layers:
        msg = f"there is no hidden state h[{max(layers)}]: {sizes.root} has h[0] to h[{sizes.n_layers}]"
        raise PlanError(msg)


def _model_sizes(skeleton: Skeleton, length: int) -> ModelSizes:
    itemsize = skeleton.dtype.itemsize
    tensors, model = skeleton.index.tensors, skeleton.model
    largest = max(range(skeleton.n_layers), key=skeleton.layer_bytes)
    layer_sources = skeleton.keys.sources(f"{skeleton.architecture.layers_path}.{largest}")
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    sources = {
        part: skeleton.keys.names[f"{name}.weight"]
        for part, module in ends.items()
        for name, candidate in model.named_modules()
        if candidate is module
    }
    return ModelSizes(
        root=skeleton.root,
        model_type=str(skeleton.config.model_type),
        dtype=dtype_name(skeleton.dtype),
        n_layers=skeleton.n_layers,
        hidden=skeleton.hidden_size,
        work_bytes=work_bytes_per_token(skeleton, length),
        layer_bytes=skeleton.layer_bytes(largest),
        layer_elements=skeleton.layer_bytes(largest) // itemsize,
        stored_layer_bytes=sum(tensors[source].n_bytes for source in layer_sources),
        embedding_bytes=ends["embedding"].weight.numel() * itemsize,
        head_bytes=ends["head"].weight.numel() * itemsize,
        tied=sources["head"] == sources["embedding"],
        unit_bytes=skeleton.unit_bytes,
        checkpoint_bytes=skeleton.index.n_bytes,
    )
