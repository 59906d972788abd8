"""What each kind of artifact is, from its headers and metadata.

What reads one kind is imported there: a plan must not wait for the libraries of a store.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.checkpoint.configuration import read_config
from ghoststream.checkpoint.header import TensorEntry, read_header
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.packed import with_packed
from ghoststream.checkpoint.sizes import plain_config
from ghoststream.errors import CheckpointError
from ghoststream.files import format_bytes, read_json, unseal
from ghoststream.files.seals import read_tensor_header
from ghoststream.recovery.names import ADAPTER_NAME, GGUF_NAME
from ghoststream.recovery.sidecars import require_sound_sidecars
from ghoststream.recovery.training import told_training
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.run_record import RunRecord

if TYPE_CHECKING:
    from ghoststream.activations.layout import StoreLayout

_MOST_CANDIDATES = 10


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a report."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


Explanation = tuple[dict[str, Any], tuple[Table, ...]]
"""Facts in reading order, and tables."""


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested JSON objects as one level of dotted names; short lists are written as JSON.

    What has an entry for each shard or tensor is for programs, not for readers: it is counted.
    """
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and key in {"shards", "tensors"}:
            flat[name] = f"{len(value)} items"
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, list):
            flat[name] = json.dumps(value) if len(value) <= 12 else f"{len(value)} items"
        else:
            flat[name] = value
    return flat


def explain_store(uri: str) -> Explanation:
    """Say what a store holds, and what is still to be captured.

    A complete one on this machine is told from its manifest, without the libraries that read arrays.
    """
    from ghoststream.activations.manifest import complete_manifest

    manifest = None if "://" in uri else complete_manifest(Path(uri))
    if manifest is None:
        return _explain_opened(uri)
    layout = manifest.layout
    return _store_facts(layout, layout.layers), _origin(manifest.recipe, manifest.fingerprint)


def _explain_opened(uri: str) -> Explanation:
    from ghoststream.activations import ActivationStore

    store = ActivationStore.open(uri)
    done = store.completed_layers()
    facts = _store_facts(store.layout, done)
    missing = [layer for layer in store.layers if layer not in done]
    if missing:
        facts["still to capture"] = ", ".join(f"h[{layer}]" for layer in missing[:20])
    parts = [
        f"sequences {part.name}: {len(part.completed_layers(missing))} of {len(missing)}"
        for part in store.parts()
    ]
    if parts:
        facts["captured in parts"] = "; ".join(parts)
    return facts, _origin(store.recipe, store.fingerprint)


def _store_facts(layout: StoreLayout, done: Sequence[int]) -> dict[str, Any]:
    return {
        "hidden states": f"{len(layout.layers)} of h[0..{layout.n_layers}], {len(done)} complete",
        "complete": len(done) == len(layout.layers),
        "sequences": layout.n_sequences,
        "length": layout.length,
        "hidden size": layout.hidden,
        "dtype": layout.store_dtype,
    }


def _origin(recipe: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> tuple[Table, ...]:
    return _facts_table("recipe", recipe), _facts_table("made from", fingerprint)


def explain_checkpoint(path: str) -> Explanation:
    """Say what a checkpoint is."""
    root = Path(path)
    facts, index = _config_facts(root), CheckpointIndex.open(root)
    index = with_packed(index, plain_config(read_config(root)))
    facts |= _tensor_facts(index.tensors.values())
    parameters = sum(prod(entry.shape) for entry in index.weights.values())
    return {**facts, "parameters": parameters, "shards": len(index.shards)}, ()


def explain_recovered(path: str) -> Explanation:
    """Say what a recovered checkpoint was made of."""
    facts, _ = explain_checkpoint(path)
    return _explain_repair(path, facts)


def explain_gguf(path: str) -> Explanation:
    """Say what a recovered GGUF was made of."""
    size = (Path(path) / GGUF_NAME).stat().st_size
    return _explain_repair(path, {"size": format_bytes(size)})


def explain_adapter(path: str) -> Explanation:
    """Say what an adapter was made of."""
    facts = {**_config_facts(Path(path)), **_tensor_facts(read_header(Path(path) / ADAPTER_NAME))}
    return _explain_repair(path, facts)


def _explain_repair(path: str, facts: dict[str, Any]) -> Explanation:
    provenance = require_sound_sidecars(Path(path))
    if isinstance(provenance.get("plan"), Mapping):
        plans = [one["plan"] for one in provenance.pop("rounds", ())]
        facts["removed"] = _plan_text(*plans, provenance.pop("plan"))
    operators = provenance.pop("operators", {})
    origin = _facts_table("recovered from", provenance)
    if not isinstance(operators, Mapping):
        return facts | {"operator": "unknown"}, (origin,)
    boundaries = operators.get("boundaries", [])
    facts["operator"] = operators.get("kind", "unknown")
    facts |= _trained(operators.get("metadata", {}), boundaries)
    return facts, (origin, _boundaries_table(boundaries))


def explain_operators(path: str) -> Explanation:
    """Say what an operators file holds."""
    place = Path(path)
    data = read_tensor_header(place, advice="restore it from a copy, or run `ghoststream fit` again")
    boundaries = data.pop("boundaries", [])
    facts: dict[str, Any] = {"operator": data.pop("kind", "unknown")}
    if isinstance(data.get("plan"), Mapping):
        facts["removes"] = _plan_text(data.pop("plan"))
    facts |= _trained(data, boundaries)
    return facts, (_boundaries_table(boundaries), _facts_table("metadata", data), _tensor_table(place))


def _trained(metadata: Mapping[str, Any], boundaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say whether operators were trained, on what and for how long."""
    figures = next((one["diagnostics"] for one in boundaries if one["form"] != "identity"), None)
    told = told_training(metadata.get("recipe"), figures)
    return {"trained": told} if told else {}


def _boundaries_table(boundaries: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        {
            "span": str(Span(*boundary["span"])),
            "form": boundary["form"],
            "features": boundary["features"],
            **flatten(boundary["diagnostics"]),
        }
        for boundary in boundaries
    ]
    names = list(dict.fromkeys(name for column in columns for name in column if name != "span"))
    rows = [(name.replace("_", " "), *(column.get(name) for column in columns)) for name in names]
    return Table("boundaries", ("", *(str(column["span"]) for column in columns)), rows)


def _tensor_table(place: Path) -> Table:
    rows = [
        (entry.name, entry.dtype_name, str(list(entry.shape)), format_bytes(entry.n_bytes))
        for entry in read_header(place)
    ]
    return Table("tensors", ("tensor", "dtype", "shape", "bytes"), rows)


def explain_tensors(path: str) -> Explanation:
    """Count the tensors of a safetensors file."""
    return _tensor_facts(read_header(Path(path))), ()


def explain_plan(path: str) -> Explanation:
    """Say which layers a plan removes, and how it came about."""
    from ghoststream.selection import Selection, candidate_table

    found = Selection.load(Path(path))
    plan = found.plan
    facts = {
        "removes": f"{plan} ({plan.n_removed} of {plan.n_layers} layers)",
        "keeps": ", ".join(str(layer) for layer in plan.kept),
        "repaired by": "; ".join(method.label for method in found.methods) or None,
        "criterion": found.criterion or None,
        "figures": found.meaning or None,
        "loss of the dense model": found.dense_loss,
        "passes": found.passes or None,
    }
    tables = []
    if found.candidates:
        shown = found.candidates[:_MOST_CANDIDATES] if found.passes else found.candidates
        title = f"{len(shown)} of {len(found.candidates)} candidates"
        tables.append(Table(title, *candidate_table(shown, found.recipe)))
    if found.recipe:
        tables.append(_recipe_table({**found.recipe, **found.details}))
    return {key: value for key, value in facts.items() if value is not None}, tuple(tables)


def explain_exploration(path: str) -> Explanation:
    """Say how many layers can go, and show the plan of each number of layers."""
    from ghoststream.stages.exploring.report import ExplorationReport, table_of

    found = ExplorationReport.load(Path(path))
    facts = {
        "model": f"{found.model} ({found.n_layers} layers)",
        "verdict": found.verdict,
        "perplexity of the dense model": found.dense.perplexity,
        "bytes of its weights": format_bytes(found.dense.weight_bytes),
        "passes": found.spent.passes,
        "arithmetic, in dense passes": found.spent.dense_passes,
    }
    return facts, (Table("numbers of layers", *table_of(found)), _recipe_table(found.recipe))


def explain_run(path: str) -> Explanation:
    """Say how far a run is, or how it ended."""
    record = RunRecord.load(Path(path))
    facts = {
        "run": record.name,
        "state": record.outcome,
        "failed with": record.error,
        "attempts": record.attempts,
        "begun": record.started,
        "command": record.command or None,
    }
    rows = [(stage.name, f"{stage.seconds:.1f}", format_bytes(stage.peak_bytes)) for stage in record.stages]
    stages = Table("stages", ("stage", "seconds", "memory at most"), rows)
    return {key: value for key, value in facts.items() if value is not None}, (stages,)


def explain_estimate(path: str) -> Explanation:
    """Say what an estimate found."""
    data = read_json(Path(path))
    needs = [
        (name, format_bytes(need["n_bytes"]), "yes" if need["fits"] else "no")
        for name, need in data["needs"].items()
    ]
    return flatten({"model": data.get("model", {}), "fits": data.get("fits")}), (
        Table("needs", ("what", "bytes", "fits"), needs),
    )


def explain_evaluation(path: str) -> Explanation:
    """Show the perplexities of an evaluation."""
    models = figure_rows(path)
    names = ("model", "perplexity", "loss", "standard_error", "tokens")
    rows = [[row.get(name) for name in names] for row in models]
    headers = ["model", "perplexity", "loss (nats)", "standard error", "tokens"]
    return {}, (Table("perplexities", headers, rows),)


def explain_tasks(path: str) -> Explanation:
    """Show the results of tasks."""
    rows = [
        (row["model"], task, name, figure["value"], figure["standard_error"], result["n_items"])
        for row in figure_rows(path)
        for task, result in row["tasks"].items()
        for name, figure in result["metrics"].items()
    ]
    return {}, (Table("tasks", ("model", "task", "metric", "value", "standard error", "items"), rows),)


def figure_rows(path: str | Path) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a file of figures, or of what a command printed."""
    data = read_json(Path(path))
    return data if isinstance(data, list) else list(unseal(data, path, advice="measure again")["models"])


def _config_facts(root: Path) -> dict[str, Any]:
    try:
        config = read_json(root / "config.json", finite=False)
    except FileNotFoundError:
        msg = f"{root} has no config.json: it is not a complete checkpoint folder; copy it again"
        raise CheckpointError(msg) from None
    text = {**config, **config.get("text_config", {})}
    names = {
        "model_type": "architecture",
        "num_hidden_layers": "layers",
        "n_layer": "layers",
        "hidden_size": "hidden size",
        "n_embd": "hidden size",
        "vocab_size": "vocabulary",
        "dtype": "dtype",
    }
    facts = {label: text[name] for name, label in names.items() if name in text}
    return {**facts, "architecture": config.get("model_type", "unknown")}


def _tensor_facts(entries: Iterable[TensorEntry]) -> dict[str, Any]:
    tensors = list(entries)
    kinds = Counter(entry.dtype_name for entry in tensors)
    return {
        "tensors": len(tensors),
        "bytes": format_bytes(sum(entry.n_bytes for entry in tensors)),
        "parameters": sum(prod(entry.shape) for entry in tensors),
        "stored as": ", ".join(f"{name} ({count})" for name, count in kinds.most_common()),
    }


def _recipe_table(recipe: Mapping[str, Any]) -> Table:
    """Show a recipe without the ways to repair that were tried."""
    return _facts_table("recipe", {key: recipe[key] for key in recipe if key not in {"screen", "methods"}})


def _plan_text(*rounds: Mapping[str, Any]) -> str:
    plans = [PruningPlan.from_json(data) for data in rounds]
    texts = [f"{plan} ({plan.n_removed} of {plan.n_layers} layers)" for plan in plans]
    if len(plans) == 1:
        return texts[0]
    whole = functools.reduce(PruningPlan.then, plans)
    return f"{', then '.join(texts)}; in all {whole} of {whole.n_layers}"


def _facts_table(title: str, data: Mapping[str, Any]) -> Table:
    return Table(title, ("field", "value"), [(name, str(value)) for name, value in flatten(data).items()])
