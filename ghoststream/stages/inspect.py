"""Explains any artifact from its headers and metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.index import CheckpointIndex, TensorEntry, read_header, read_metadata
from ghoststream.errors import ArtifactError, CheckpointError
from ghoststream.files import format_bytes, read_json
from ghoststream.options import dtype_name
from ghoststream.recovery.provenance import PROVENANCE_NAME
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.artifacts import OPERATORS_KEY, Kind, identify
from ghoststream.stages.searching.result import SearchResult, candidate_table

_MOST_CANDIDATES = 10


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a report."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What an artifact is: facts in reading order, and tables."""

    path: str
    kind: str
    facts: Mapping[str, Any]
    tables: tuple[Table, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "facts": dict(self.facts)}


def inspect_path(path: str | Path) -> InspectReport:
    """Explain the artifact at ``path``: a local path, or the URL of a store.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows.
        DataError: If its headers or metadata are broken.

    Memory: headers and metadata.
    """
    explainers: dict[Kind, Callable[[str], tuple[dict[str, Any], tuple[Table, ...]]]] = {
        Kind.STORE: _store,
        Kind.CHECKPOINT: _checkpoint,
        Kind.RECOVERED: _recovered,
        Kind.OPERATORS: _operators,
        Kind.TENSORS: _tensors,
        Kind.PLAN: _plan,
        Kind.RUN_PLAN: _run_plan,
        Kind.EVALUATION: _evaluation,
        Kind.TASKS: _tasks,
    }
    kind = identify(path)
    facts, tables = explainers[kind](str(path))
    return InspectReport(str(path), kind.value, facts, tables)


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


def _store(uri: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    from ghoststream.activations import ActivationStore

    store = ActivationStore.open(uri)
    done = store.completed_layers()
    facts = {
        "hidden states": f"{len(store.layers)} of h[0..{store.n_layers}], {len(done)} complete",
        "complete": store.complete,
        "sequences": store.n_sequences,
        "length": store.length,
        "hidden size": store.hidden,
        "dtype": dtype_name(store.dtype),
    }
    missing = [layer for layer in store.layers if layer not in done]
    if missing:
        facts["still to capture"] = ", ".join(f"h[{layer}]" for layer in missing[:20])
    parts = [
        f"sequences {part.name}: {len(part.completed_layers(missing))} of {len(missing)}"
        for part in store.parts()
    ]
    if parts:
        facts["captured in parts"] = "; ".join(parts)
    return facts, (_facts_table("recipe", store.recipe), _facts_table("made from", store.fingerprint))


def _checkpoint(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    root = Path(path)
    index = CheckpointIndex.open(root)
    return {**_config_facts(root), **_tensor_facts(index.tensors.values()), "shards": len(index.shards)}, ()


def _recovered(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    facts, _ = _checkpoint(path)
    provenance = read_json(Path(path) / PROVENANCE_NAME)
    if not isinstance(provenance, dict):
        msg = f"{Path(path) / PROVENANCE_NAME} does not hold a JSON object; export the checkpoint again"
        raise ArtifactError(msg)
    if isinstance(provenance.get("plan"), Mapping):
        facts["removed"] = _plan_text(provenance.pop("plan"))
    operators = provenance.pop("operators", {})
    boundaries = (
        _boundaries_table(operators.get("boundaries", [])) if isinstance(operators, Mapping) else None
    )
    facts["operator"] = operators.get("kind", "unknown") if boundaries else "unknown"
    origin = _facts_table("recovered from", provenance)
    return facts, (origin, boundaries) if boundaries else (origin,)


def _operators(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    place = Path(path)
    try:
        data = json.loads(read_metadata(place)[OPERATORS_KEY])
    except ValueError as error:
        msg = f"{place}: the metadata is not JSON ({error}); run `ghoststream solve` again"
        raise ArtifactError(msg) from error
    boundaries = data.pop("boundaries", [])
    facts: dict[str, Any] = {"operator": data.pop("kind", "unknown")}
    if isinstance(data.get("plan"), Mapping):
        facts["removes"] = _plan_text(data.pop("plan"))
    return facts, (_boundaries_table(boundaries), _facts_table("metadata", data), _tensor_table(place))


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


def _tensors(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    return _tensor_facts(read_header(Path(path))), ()


def _plan(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    data = read_json(Path(path))
    if "candidates" in data:
        return _measured_plan(SearchResult.load(Path(path)))
    plan = PruningPlan.from_json(data.get("plan", data))
    facts = _plan_facts(plan)
    scores = data.get("scores", [])
    rest = {key: value for key, value in data.items() if key not in {"plan", "spans", "n_layers", "scores"}}
    tables = (_facts_table("how it was chosen", rest),) if rest else ()
    return facts, (*tables, _scores_table(scores)) if scores else tables


def _plan_facts(plan: PruningPlan) -> dict[str, Any]:
    return {
        "removes": f"{plan} ({plan.n_removed} of {plan.n_layers} layers)",
        "keeps": ", ".join(str(layer) for layer in plan.kept),
    }


def _measured_plan(found: SearchResult) -> tuple[dict[str, Any], tuple[Table, ...]]:
    repair = found.repair
    facts = {
        **_plan_facts(found.plan),
        "repaired by": None if repair is None else repair.label,
        "criterion": found.criterion,
        "loss of the dense model": found.dense_loss,
        "passes": found.passes,
    }
    recipe = {key: value for key, value in found.recipe.items() if key not in {"screen", "methods"}}
    shown = found.candidates[:_MOST_CANDIDATES]
    title = f"best {len(shown)} of {len(found.candidates)} candidates"
    return {key: value for key, value in facts.items() if value is not None}, (
        Table(title, *candidate_table(shown)),
        _facts_table("recipe", recipe),
    )


def _scores_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    rows = [(str(Span(*row["span"])), row["score"], "removed" if row["chosen"] else "") for row in scores]
    return Table("scores", ("layers", "score", ""), rows)


def _run_plan(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    data = read_json(Path(path))
    needs = [
        (name, format_bytes(need["n_bytes"]), "yes" if need["fits"] else "no")
        for name, need in data["needs"].items()
    ]
    return flatten({"model": data.get("model", {}), "fits": data.get("fits")}), (
        Table("needs", ("what", "bytes", "fits"), needs),
    )


def _evaluation(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    data = read_json(Path(path))
    models = data if isinstance(data, list) else data["models"]
    names = ("model", "perplexity", "loss", "standard_error", "tokens")
    rows = [[row.get(name) for name in names] for row in models]
    rest = {} if isinstance(data, list) else {key: value for key, value in data.items() if key != "models"}
    return flatten(rest), (Table("perplexities", [name.replace("_", " ") for name in names], rows),)


def _tasks(path: str) -> tuple[dict[str, Any], tuple[Table, ...]]:
    rows = [
        (row["model"], task, name, figure["value"], figure["standard_error"], result["n_items"])
        for row in read_json(Path(path))
        for task, result in row["tasks"].items()
        for name, figure in result["metrics"].items()
    ]
    return {}, (Table("tasks", ("model", "task", "metric", "value", "standard error", "items"), rows),)


def _config_facts(root: Path) -> dict[str, Any]:
    try:
        config = read_json(root / "config.json")
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


def _tensor_facts(entries: Any) -> dict[str, Any]:
    tensors: list[TensorEntry] = list(entries)
    kinds = Counter(entry.dtype_name for entry in tensors)
    return {
        "tensors": len(tensors),
        "bytes": format_bytes(sum(entry.n_bytes for entry in tensors)),
        "parameters": sum(entry.n_bytes // entry.dtype.itemsize for entry in tensors),
        "stored as": ", ".join(f"{name} ({count})" for name, count in kinds.most_common()),
    }


def _plan_text(data: Mapping[str, Any]) -> str:
    plan = PruningPlan.from_json(data)
    return f"{plan} ({plan.n_removed} of {plan.n_layers} layers)"


def _facts_table(title: str, data: Mapping[str, Any]) -> Table:
    return Table(title, ("field", "value"), [(name, str(value)) for name, value in flatten(data).items()])
