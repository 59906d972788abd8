"""Taps of the layers before boundaries, kept in a store of their own while operators are fitted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from ghoststream.activations import ActivationStore, StoreRequest, verify_store
from ghoststream.activations.manifest import MANIFEST_KEY
from ghoststream.costs import FitShape
from ghoststream.errors import ArtifactError, BudgetError, RequestError
from ghoststream.files import disk_errors, format_bytes, json_digest, read_kept, short_digest
from ghoststream.machine import free_host_memory
from ghoststream.operators import OperatorKind
from ghoststream.progress import Progress
from ghoststream.recipe import CaptureRecipe
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.recovery.features import ABSORBED
from ghoststream.spans import Span
from ghoststream.stages.capturing.replay import replay_layer, rounding_notes
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import HiddenStateSource, TapSource, get_feature, store_digest, taps_of
from ghoststream.statistics.features import require_layer_before
from ghoststream.streaming import Skeleton, tap_point

_SHARD_BYTES = 64 * 1024 * 1024
_BEFORE_A_MAP = ("attention_heads", "mlp_intermediate")


@dataclass(frozen=True)
class WantedTaps:
    """The taps that a fit needs.

    Attributes:
        session: The model, opened to compute as the capture did.
        taps: Names of the taps, in the order in which features read them.
        layers: The layers whose taps they are.
        width: Width of the taps of a layer together, at all layers the same.
    """

    session: ModelSession
    taps: tuple[str, ...]
    layers: tuple[int, ...]
    width: int


def require_taps(features: str, spans: Sequence[Span], skeleton: Skeleton, *, intercept: bool) -> None:
    """Check that features of the layer before each boundary can be read, and operators on them absorbed.

    Args:
        features: Name of the features.
        spans: The removed spans.
        skeleton: The model.
        intercept: Whether operators will have a constant.

    Raises:
        RequestError: If a span begins with the first layer, or there is no such layer.
        UnsupportedModelError: If a layer does not have a tap, or an operator on them could not be absorbed.
    """
    taps = taps_of(features)
    for span in spans if taps else ():
        require_layer_before(features, span)
        if span.start > skeleton.n_layers:
            msg = (
                f"there is no layer {span.start - 1}: the model has {skeleton.n_layers}; give the model of "
                "the store"
            )
            raise RequestError(msg)
        if features in ABSORBED:
            require_absorbable(skeleton, span, features, constant=intercept)
        taps_width(skeleton, span.start - 1, taps)


def wanted_taps(
    features: str, spans: Sequence[Span], session: ModelSession | None, *, intercept: bool
) -> WantedTaps | None:
    """Return what must be computed again for features of the layer before each boundary.

    None for other features.

    Args:
        features: Name of the features.
        spans: The removed spans.
        session: The model of the store, if it is known; see
            :func:`~ghoststream.stages.capturing.replay.session_of`.
        intercept: Whether operators will have a constant.

    Raises:
        RequestError: If the model is needed and not given, taps differ in width, or what :func:`require_taps`
            raises.
        UnsupportedModelError: What :func:`require_taps` raises.
    """
    taps = taps_of(features)
    if not taps:
        return None
    if session is None:
        msg = (
            f"the features {features} are of the layer before each boundary, which is run again on the "
            "stored states: give the model that the store was captured from (--model)"
        )
        raise RequestError(msg)
    require_taps(features, spans, session.skeleton, intercept=intercept)
    layers = tuple(span.start - 1 for span in spans)
    widths = {taps_width(session.skeleton, layer, taps) for layer in layers}
    if len(widths) > 1:
        msg = (
            f"{' and '.join(taps)} have widths {sorted(widths)} at the layers {list(layers)}; "
            "fit the spans one at a time"
        )
        raise RequestError(msg)
    return WantedTaps(session, taps, layers, widths.pop())


def require_fit_memory(
    wanted: WantedTaps, kind: OperatorKind, store: HiddenStateSource, memory: int | None
) -> None:
    """Check that this machine can hold a fit on wide features before anything is computed for it.

    Args:
        wanted: The taps that the features are made of.
        kind: The operator.
        store: The states that it is fitted on.
        memory: What the request says that the machine has: believed where it is more than what is free. Less
            bounds statistics, which take more sweeps then; a solution takes what it takes.

    Raises:
        BudgetError: If it cannot: 47 GB for 28,672 features of a hidden size of 8,192, while folds choose the
            ridge.
    """
    width = get_feature(kind.features).width(wanted.width)
    needed = kind.cost(FitShape(store.hidden, width, 0)).memory.n_bytes
    free = max(free_host_memory(), memory or 0)
    if needed > free:
        msg = (
            f"fitting {width:,} features ({kind.features}) takes {format_bytes(needed)} of memory, "
            f"{format_bytes(free)} are free; use --solver sketch-features with --rank, or --features "
            "mlp_output; or give --memory where the machine has more than it says is free"
        )
        raise BudgetError(msg)


def taps_width(skeleton: Skeleton, layer: int, taps: Sequence[str]) -> int:
    """Return the width of some taps of a layer together: what a feature of them is given.

    Raises:
        RequestError: If there is no such tap.
        UnsupportedModelError: If the layer does not have one.
    """
    return sum(tap_width(skeleton, layer, tap) for tap in taps)


def tap_width(skeleton: Skeleton, layer: int, tap: str) -> int:
    """Return the width of a tap of a layer.

    Raises:
        RequestError: If there is no such tap.
        UnsupportedModelError: If the layer does not have it.
    """
    module = skeleton.layers[layer]
    point = tap_point(skeleton.architecture, module, tap)
    if tap not in _BEFORE_A_MAP:
        return skeleton.hidden_size
    linear = module.get_submodule(point.path)
    shape = linear.get_parameter("weight").shape
    return int(shape[0 if isinstance(linear, Conv1D) else 1])


def store_taps(wanted: WantedTaps, store: str | Path, folder: Path, *, progress: Progress) -> TapSource:
    """Run layers again on the hidden states of a store, in order, and keep taps of each, side by side.

    A killed run goes on: layers that are complete are not run again. Hidden states that were rounded in the
    store are accepted with a warning.

    Args:
        wanted: Which taps.
        store: Path or URL of the store.
        folder: Folder in which the store of the taps is made.
        progress: Who is told how many sequences are done.

    Returns:
        Where the taps are.

    Raises:
        BudgetError: If they do not fit the disk.
        GhoststreamError: What :func:`ghoststream.replay` raises.

    Memory: what :func:`ghoststream.replay` states, the taps of one micro-batch once more, and up to
    five shards of 64 MiB. Disk: ``S T`` times the width of the taps, in elements of compute dtype, a layer.
    """
    source = ActivationStore.open(str(store))
    width, layers = wanted.width, wanted.layers
    recipe = {
        "taps": list(wanted.taps),
        "layers": list(layers),
        "store_digest": store_digest(source),
        "tokens_digest": source.tokens_digest,
    }
    dtype = CaptureRecipe.from_json(source.recipe, source.uri).dtype
    itemsize = 4 if dtype == "float32" else 2
    request = StoreRequest(
        recipe=recipe,
        tokens=source.tokens(),
        fingerprint=source.fingerprint,
        n_layers=source.n_layers,
        n_sequences=source.n_sequences,
        length=source.length,
        hidden=width,
        store_dtype=dtype,
        layers=layers,
        sequences_per_shard=min(
            source.n_sequences, max(1, _SHARD_BYTES // (source.length * width * itemsize))
        ),
        sequences_per_chunk=1,
    )
    place = folder / f"taps-{short_digest(json_digest(recipe))}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _open(place, request) as taps:
        for layer in layers:
            if layer not in taps.completed_layers():
                _fill(taps, wanted, source, layer, progress)
    return TapSource(str(place), width)


def _open(place: Path, request: StoreRequest) -> ActivationStore:
    if (place / MANIFEST_KEY).exists() and read_kept(_require_sound, place) is None:
        shutil.rmtree(place)
    return ActivationStore.create_or_resume(str(place), **request)


def _require_sound(place: Path) -> Path:
    problems = verify_store(str(place))
    if problems:
        msg = f"{place}: {problems[0]}"
        raise ArtifactError(msg)
    return place


def _fill(
    taps: ActivationStore, wanted: WantedTaps, source: ActivationStore, layer: int, progress: Progress
) -> None:
    notes = rounding_notes(source, allow_rounded=True)
    batches = replay_layer(wanted.session, source, layer, wanted.taps, None, notes, progress)
    with closing(batches), taps.writer(layer) as writer:
        for first, taken in batches:
            writer.write(first, torch.cat([taken[tap] for tap in wanted.taps], dim=-1))
        writer.commit()
