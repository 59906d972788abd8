"""What of a recovery is refused before any work: `recover` and `estimate` ask the same questions.

What is asked here needs the request, the headers of the checkpoint and small files; neither torch nor
transformers is imported. :func:`check_export` builds the model without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.checkpoint.configuration import GHOSTED
from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.errors import OutputExistsError, RequestError, UnsupportedModelError
from ghoststream.files import differences, require_writable
from ghoststream.options import AUTO, Compute, Form, GgufType, Method, Reduction, Search
from ghoststream.recovery.config_surgery import own_code, require_independent_layers
from ghoststream.recovery.features import ABSORBED, ABSORBED_WHOLE
from ghoststream.recovery.forms import find_form
from ghoststream.recovery.training import training_of
from ghoststream.selection import make_criterion
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.checks import (
    check_search,
    named_method,
    require_criterion,
    require_shareable,
)
from ghoststream.stages.choosing.division import divided
from ghoststream.stages.choosing.repair import require_standing
from ghoststream.stages.choosing.ways import Ways
from ghoststream.stages.distillation.schedule import Schedule
from ghoststream.stages.from_store.kind import make_store_kind
from ghoststream.stages.sharing import is_shared
from ghoststream.stages.way import Way
from ghoststream.statistics import get_feature, taps_of
from ghoststream.statistics.features import require_layer_before

if TYPE_CHECKING:
    from ghoststream.recovery import RecoveredInfo
    from ghoststream.stages.session import ModelSession
    from ghoststream.streaming import Skeleton

_STORE_OPTIONS = "layers are chosen and operators fitted in passes over the model, without a store"


def check_recovery(way: Way, sizes: ModelSizes, at_once: Callable[[], int]) -> None:
    """Find before any work what a recovery cannot do, and what of its options would not be used.

    Args:
        way: The request, and which way it goes.
        sizes: The model, as its headers show it.
        at_once: Says how many sequences memory allows in a micro-batch.

    Raises:
        RequestError: If options exclude one another, one would not be used, or a number does not fit.
        UnsupportedModelError: If the model cannot be pruned, or does not allow the features.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
    """
    _check_choice(way, sizes.n_layers)
    _check_number(way, sizes)
    method = _check_fit(way)
    _check_form(way, method, sizes.model_type)
    _check_training(way, sizes, method)
    check_prunable(sizes, way.recovery.compute)
    if method is not None:
        spans = (Span(1, 2),) if way.given is None else way.given.plan.spans
        require_features(method, spans, sizes)
    elif not _known(way):
        _require_ways(way, sizes)
    if way.captures:
        _check_storage(way, sizes.n_layers)
    text, search = way.recovery.calibration.to_calibrate(), way.recovery.search
    if way.measures and text.sequences is not None:
        divided(text.sequences, search.held_out, way.recovery.compute.micro_batch, at_once)


def check_prunable(sizes: ModelSizes, compute: Compute) -> None:
    """Check, as far as its configuration file tells, that layers can be removed from a model.

    Raises:
        UnsupportedModelError: If they cannot.
    """
    config = sizes.config
    model_type, has_code = str(config.get("model_type")), "AutoModelForCausalLM" in config.get("auto_map", ())
    if compute.trust_remote_code and has_code and not model_type.startswith(GHOSTED):
        raise UnsupportedModelError(own_code(sizes.root))
    require_independent_layers(config, model_type, sizes.n_layers)


def check_model(
    session: ModelSession, method: Method | None, spans: Sequence[Span], plan: PruningPlan
) -> None:
    """Find before a text is read what a pass over a model, or the export of what is fitted, could not do.

    Args:
        session: The model.
        method: How boundaries are repaired, where an operator is named.
        spans: The boundaries that it is for.
        plan: Removes as many layers as will be.

    Raises:
        RequestError, UnsupportedModelError: What :func:`check_prunable`, :func:`require_features` and
            :func:`check_export` raise.
    """
    check_prunable(session.sizes, session.compute)
    if method is not None:
        require_features(method, spans, session.sizes)
    check_export(session.skeleton, plan)


def check_export(skeleton: Skeleton, plan: PruningPlan) -> None:
    """Check that the model without the layers of a plan can be written.

    Raises:
        UnsupportedModelError: If a layer that is left could not be what it was.
    """
    from ghoststream.recovery.job import require_prunable

    require_prunable(skeleton, plan)


def check_form(way: Way, skeleton: Skeleton) -> None:
    """Check that the model, with what will be fitted, can be written in the form that is asked for.

    Raises:
        RequestError: If it cannot.
    """
    methods = _methods(way, _check_fit(way), str(skeleton.config.model_type))
    find_form(way.recovery.form).check_model(skeleton, methods)


def require_features(method: Method, spans: Sequence[Span], sizes: ModelSizes) -> None:
    """Check that a model has the features of a method, and can hold operators on them.

    Raises:
        RequestError: If a span begins with the first layer and the features are of the layer before, or they
            are none of a recovered checkpoint.
        UnsupportedModelError: If an operator could not be absorbed, or the model's norm names no epsilon.
    """
    features, taps = method.features, taps_of(method.features)
    feature = get_feature(features)
    require_standing(features)
    if feature.needs_epsilon and not sizes.norm_names_epsilon:
        msg = (
            f"the final norm of a {sizes.model_type} does not say which epsilon it has, which the features "
            f"{features} need; use features of the hidden state"
        )
        raise UnsupportedModelError(msg)
    for span in spans if taps else ():
        require_layer_before(features, span)
        end, place = (
            sizes.mlp_ends[span.start - 1],
            f"operators on the features {features} cannot be absorbed",
        )
        if features in ABSORBED and end.refusal:
            msg = f"{place} at {span}: {end.refusal}; use features of the hidden state"
            raise UnsupportedModelError(msg)
        if features in ABSORBED_WHOLE and method.intercept and not end.has_bias:
            msg = (
                f"{place} at {span}: the last linear map of the MLP has no bias that could take up the "
                "constant; fit without an intercept"
            )
            raise UnsupportedModelError(msg)


def check_place(out: Path, way: Way, digest: Callable[[], str]) -> None:
    """Check that the recovered checkpoint can be written, or is there already; the export checks the rest.

    Args:
        out: Its folder.
        way: The request.
        digest: Gives the digest of the base's fingerprint.

    Raises:
        OutputExistsError: If the place is taken.
        RequestError: If it cannot be written to.
        ArtifactError: If a recovered checkpoint is there that is damaged.
    """
    if out.exists() and not out.is_dir():
        msg = f"{out} is a file, a folder was to be made there; choose another place"
        raise OutputExistsError(msg)
    if not out.is_dir() or not any(out.iterdir()):
        require_writable(out.with_name(f".{out.name}.partial"))
        return
    found = find_form(way.recovery.form).read(out)
    if found is None:
        msg = f"{out} is not empty; choose another folder, or move what is there away"
        raise OutputExistsError(msg)
    changed = _changes(found, way, digest)
    if changed:
        msg = (
            f"{out} holds the recovered checkpoint of another request ({'; '.join(changed)});"
            " choose another folder, or move it away"
        )
        raise OutputExistsError(msg)


def _changes(found: RecoveredInfo, way: Way, digest: Callable[[], str]) -> list[str]:
    # Of an estimate, which has no result to look at, no text is read: it waits for no tokenizer.
    from ghoststream.text.identity import without_folders

    asked: dict[str, Any] = {
        "base": digest(),
        "operator": way.recovery.method.operator or AUTO,
        "layers removed": way.n_removed,
    }
    there: dict[str, Any] = {
        "base": found.base.get("digest"),
        "operator": found.kind,
        "layers removed": found.plan.n_removed,
    }
    if way.given is not None:
        asked["plan"], there["plan"] = way.given.plan.to_json(), found.plan.to_json()
    recipe = found.recorded["metadata"].get("recipe") or {}
    text = way.recovery.calibration.to_calibrate()
    named = {"spec": without_folders(text), "sequences": text.sequences, "length": text.length}
    # An operator that was fitted from a store names its text there.
    known = recipe.get("text") or named
    asked["text"], there["text"] = named, {name: known[name] for name in named}
    training, trained = way.recovery.distill, training_of(recipe)
    asked["distill"], there["distill"] = training is not None, trained is not None
    if training is not None and trained is not None:
        for name in training.given(trained):
            asked[name], there[name] = getattr(training, name), trained[name]
    return differences(there, asked)


def _check_number(way: Way, sizes: ModelSizes) -> None:
    if way.given is None and way.n_removed >= sizes.n_layers:
        msg = (
            f"cannot remove {way.n_removed} of {sizes.n_layers} layers; at least one must survive: give a "
            f"number from 1 to {sizes.n_layers - 1}"
        )
        raise RequestError(msg)


def _check_choice(way: Way, n_layers: int) -> None:
    search, method = way.recovery.search, way.recovery.method
    if way.given is not None:
        search.refuse(Search.choosing, "the plan says which layers go")
        if not way.measures:
            search.refuse(Search.measuring, "nothing is measured, as it is known how each boundary is fitted")
    elif way.runs_model:
        rule, _ = check_search(n_layers, way.n_removed, search, method)
        if not rule.repairs and method.is_named:
            because = f"the criterion {search.criterion} measures on all windows, and an operator is named"
            search.refuse(("held_out",), because)
    else:
        name = require_criterion(str(search.criterion), runs_model=False)
        search.refuse(Search.trying, f"the criterion {name} runs nothing")
        make_criterion(name).check(n_layers, way.n_removed)


def _check_fit(way: Way) -> Method | None:
    """Check how boundaries are fitted; return the method where one is named."""
    recovery = way.recovery
    is_shared(recovery.compute, recovery.reduction.scheduler)
    if not way.fits_in_passes:
        recovery.search.refuse(Search.measuring, "nothing is measured")
        return make_store_kind(recovery.method).method
    method = named_method(recovery.method)
    if not way.reads_store:
        recovery.refuse(("store",), _STORE_OPTIONS)
        recovery.storage.refuse(None, _STORE_OPTIONS)
        recovery.reduction.refuse(set(Reduction.model_fields) - {"scheduler"}, _STORE_OPTIONS)
    if way.shares_passes:
        require_shareable(recovery.method, () if way.given is None else way.given.methods)
    return method


def _check_form(way: Way, method: Method | None, model_type: str) -> None:
    """Check that what will be fitted can be written in the form that is asked for."""
    require_gguf(way.recovery.form, way.recovery.gguf_type)
    find_form(way.recovery.form).check_methods(_methods(way, method, model_type))


def _check_training(way: Way, sizes: ModelSizes, method: Method | None) -> None:
    """Check that what will be fitted can be trained, on this text and in this type."""
    training, sequences = way.recovery.distill, way.recovery.calibration.to_calibrate().sequences
    if training is None:
        return
    known = _methods(way, method, sizes.model_type)
    if all(one.operator == "none" for one in known):
        way.recovery.refuse(("distill",), "the operator none leaves nothing to train")
    if sizes.dtype == "float16":
        import torch

        from ghoststream.streaming.gradients import require_gradient_dtype

        require_gradient_dtype(torch.float16)
    if sequences is not None:
        Schedule.of(training, sequences)


def _methods(way: Way, method: Method | None, model_type: str) -> Sequence[Method]:
    """Return how boundaries are fitted; where a search chooses, what it may take."""
    if method is not None:
        return (method,)
    return _known(way) or Ways.of(way.recovery.form, model_type).first


def _known(way: Way) -> Sequence[Method]:
    """Return how the plan's file says that boundaries are fitted."""
    return () if way.given is None else way.given.methods


def _require_ways(way: Way, sizes: ModelSizes) -> None:
    """Check that at every boundary there is a way to repair that the model and the form allow.

    Raises:
        UnsupportedModelError: If there is none: says what stands against the last one.
    """
    ways = Ways.of(way.recovery.form, sizes.model_type)
    everywhere = tuple(Span(layer, layer + 1) for layer in range(1, sizes.n_layers))
    for span in everywhere if way.given is None else way.given.plan.spans:
        refused = ""
        for method in ways.first:
            try:
                require_features(method, (span,), sizes)
            except RequestError as error:
                refused = str(error).partition("; ")[0]
            else:
                break
        else:
            msg = (
                f"{refused}, and the form {way.recovery.form} holds nothing else that the operator auto "
                "tries; write the form custom"
            )
            raise UnsupportedModelError(msg)


def _check_storage(way: Way, n_layers: int) -> None:
    """Check that the store will have every hidden state that is read."""
    layers = way.recovery.storage.layers
    if layers is None:
        return
    if max(layers) > n_layers:
        msg = f"there is no hidden state h[{max(layers)}]: the model has h[0] to h[{n_layers}]"
        raise RequestError(msg)
    everything = tuple(range(n_layers + 1))
    needed = everything if way.given is None else way.needed_layers(way.given.plan)
    missing = sorted(set(needed) - set(layers))
    if missing:
        named = ", ".join(f"h[{layer}]" for layer in missing[:4]) + (" ..." if len(missing) > 4 else "")
        reader = "the choice of layers" if way.given is None else "the fit"
        wanted = "leave --layers out" if way.given is None else f"give --layers {','.join(map(str, needed))}"
        msg = f"--layers leaves {named} out, and {reader} reads it; {wanted}"
        raise RequestError(msg)


def require_gguf(form: Form, gguf_type: GgufType) -> None:
    """Check that a type of numbers is only given for the form that takes it.

    Raises:
        RequestError: If it is given for another one.
    """
    if gguf_type != "auto" and form != "gguf":
        msg = f"--gguf-type is for the form gguf, and the form is {form}; leave it out, or give --form gguf"
        raise RequestError(msg)
