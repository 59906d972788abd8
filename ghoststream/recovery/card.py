"""The README of a recovered checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from ghoststream.checkpoint.configuration import plain_type
from ghoststream.checkpoint.hub import hub_origin
from ghoststream.files.json_data import pretty_json
from ghoststream.operators import OperatorSet
from ghoststream.options import dtype_name
from ghoststream.recovery.absorbing import is_absorbed, standing_operator
from ghoststream.recovery.job import ExportJob
from ghoststream.recovery.layout import prevailing_dtype
from ghoststream.recovery.notes import CardNotes, mergekit_yaml
from ghoststream.recovery.training import told_course, told_windows, training_of
from ghoststream.spans import PruningPlan

_LICENCE = ("license", "license_name", "license_link", "language")
"""What the base's card says that holds for what is made of it."""

_STANDING = """
Layers were removed from this model. At each place where they were, one operator stands in for them. It was
found in closed form (*Ghosted Layers*, arXiv 2605.15491). {trained}

## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`trust_remote_code=True` runs `modeling_ghosted.py` of this folder, which needs only torch and transformers
5.1 or newer. After `import ghoststream` it is not needed. The model has a type of its own, `{model_type}`: a
program that does not know the operators refuses it instead of loading it without them.

    vllm serve FOLDER --model-impl transformers --trust-remote-code
    python -m sglang.launch_server --model-path FOLDER --model-impl transformers --trust-remote-code

Whoever quantises it leaves the operators as they are: `ignore=["lm_head", "re:.*ghost.*"]` for
llm-compressor, `modules_to_not_convert=["lm_head", ".*ghost.*"]` for quantisers of transformers.
"""

_ADAPTER = """
This is what recovering a model has made, without the weights of the base. At each place where layers were
removed, one operator stands in for them. It was found in closed form (*Ghosted Layers*, arXiv 2605.15491).
{trained}

## Loading

```python
import ghoststream

model = ghoststream.load(BASE, FOLDER)
```

Or without ghoststream, by `modeling_ghosted.py` of this folder, which needs only torch and transformers 5.1
or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, base=BASE)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`BASE` is folder or hub id of the very model that it was made of.{known}
"""

_PRUNED = """
Layers were removed from this model; nothing stands in for them. It is an ordinary checkpoint of type
`{model_type}` and loads like any other.
"""

_FOLDED = """
Layers were removed from this model. At each place where they were, one operator stands in for them. It was
found in closed form, and absorbed into the last weight of the MLP before. No parameter was added. {trained}
It is an ordinary checkpoint of type `{model_type}` and loads like any other.
"""

_HIDDEN_STATES = """
## `output_hidden_states`

Entry `i` is what decoder layer `i - 1` returned, entry 0 the embeddings. At a boundary that is the state
*before* the operator: the layer in the column "in front of layer" computes with the operator applied to that
entry. The last entry is the output of the final norm.
"""


def model_card(job: ExportJob, base_card: Path | None) -> str:
    """Write the card: what was done to which model, with which residuals, and how to load it.

    Args:
        job: What is written.
        base_card: The card of the model that all began with, if there is one.
    """
    operators, rounds, plan = job.operators, job.rounds, job.operators.plan
    plans = _plans(job)
    whole = functools.reduce(PruningPlan.then, plans)
    title = plain_type(job.skeleton.config)
    text = _front(job, base_card) + f"\n# {title}, {whole.n_removed} of {whole.n_layers} layers removed\n"
    text += _loading(job)
    text += "\n## What was removed\n\n"
    digest = job.fingerprint["digest"]
    if rounds:
        text += f"Layers {whole} (0-based, half-open) of {whole.n_layers}, in {len(plans)} rounds. "
        text += "Each round counts the layers that the one before it left:\n\n"
        for number, removed in enumerate(plans, 1):
            text += f"{number}. layers {removed} of {removed.n_layers}\n"
        text += f"\n{len(plan.kept)} are left. The last round began with: `{digest}`.\n"
    else:
        text += f"Layers {plan} (0-based, half-open) of {plan.n_layers}; {len(plan.kept)} are left. "
        text += f"Base checkpoint: `{digest}`.\n"
    text += "`mergekit.yaml` removes the same layers, without operators.\n"
    text += "" if base_card is None else f"The base's own card is `{base_card.name}`.\n"
    text += _figures(job.notes, operators)
    if operators.operators:
        text += f"\n## Operators: {operators.kind}\n\n{_operator_table(operators)}"
    text += _HIDDEN_STATES if job.stands else ""
    if operators.warnings:
        text += "\n## Warnings\n\n" + "".join(f"- {warning}\n" for warning in operators.warnings)
    text += _recipes(job)
    text += "\nVersions, fingerprints and a digest of every tensor are in `ghoststream.json`.\n"
    return text


def pruning_yaml(job: ExportJob) -> str:
    """Return what removes the same layers by mergekit, without operators."""
    whole = functools.reduce(PruningPlan.then, _plans(job))
    origin = None if job.rounds else hub_origin(job.skeleton.root)
    head = "# The layers that are left, for mergekit; operators are no part of it.\n"
    head += "" if origin else "# BASE stands for the model that all began with.\n"
    dtype = dtype_name(prevailing_dtype(job.skeleton.index))
    return head + mergekit_yaml(whole, model=origin[0] if origin else "BASE", dtype=dtype)


def _plans(job: ExportJob) -> list[PruningPlan]:
    """Return the plans of all rounds, the first one first."""
    return [*(PruningPlan.from_json(one["plan"]) for one in job.rounds), job.operators.plan]


def _is_adapter(job: ExportJob) -> bool:
    return "ghost_base" in job.config


def _front(job: ExportJob, base_card: Path | None) -> str:
    """Return the front matter, as the hub reads it."""
    origin = hub_origin(job.skeleton.root)
    tags = ["ghoststream", "layer-pruning", *(["custom_code"] if job.stands else [])]
    data: dict[str, Any] = {} if origin is None else {"base_model": [origin[0]]}
    if origin is not None and _is_adapter(job):
        data["base_model_relation"] = "adapter"
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    said = _metadata(base_card)
    data |= {key: said[key] for key in _LICENCE if key in said}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _metadata(card: Path | None) -> Mapping[str, Any]:
    try:
        return (None if card is None else metadata_load(card)) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def _loading(job: ExportJob) -> str:
    """Say what it is, and how it is loaded."""
    recipes = [
        job.operators.metadata.get("recipe"),
        *(one["operators"]["metadata"].get("recipe") for one in job.rounds),
    ]
    is_recovered = bool(job.operators.operators)
    earlier = (boundary for one in job.rounds for boundary in one["operators"]["boundaries"])
    is_recovered |= any(boundary["form"] != "identity" for boundary in earlier)
    known = " The one on the hub is known already." if hub_origin(job.skeleton.root) else ""
    kind = _ADAPTER if _is_adapter(job) else _STANDING if job.stands else _FOLDED if is_recovered else _PRUNED
    return kind.format(model_type=job.config["model_type"], trained=_trained(recipes), known=known)


_SHOWN = ("relative_residual", "relative_residual_out_of_sample", "ridge", "absorption_growth")
"""Figures of an operator that the card has; ``ghoststream.json`` has all."""

_FIGURES = "| | loss (nats a token) | perplexity |\n| --- | --- | --- |\n"


def _figures(notes: CardNotes | None, operators: OperatorSet) -> str:
    """Return the figures that the choice of layers measured, and the training."""
    text = ""
    if notes is not None and notes.dense_loss is not None and notes.loss is not None:
        text += "\nOn the held-out windows of the calibration text, on which the layers were chosen"
        text += ", before any training:\n\n" if training_of(operators.metadata.get("recipe")) else ":\n\n"
        text += _FIGURES + _row("dense model", notes.dense_loss) + _row("repaired", notes.loss)
    if training_of(operators.metadata.get("recipe")):
        found = operators.operators[0].diagnostics
        text += "\nOn windows of the calibration text that were held out from the training:\n\n" + _FIGURES
        text += _row("fitted", found["held_out_loss_before"]) + _row("trained", found["held_out_loss"])
    return f"\n## Figures\n{text}" if text else ""


def _row(name: str, loss: float) -> str:
    return f"| {name} | {loss:.4f} | {math.exp(loss):.2f} |\n"


def _recipes(job: ExportJob) -> str:
    """Return the pipeline file that does the same, and the recipes of all rounds."""
    text = ""
    if job.notes is not None and job.notes.recipe:
        text += "\n## Recipe\n\n"
        text += "Saved as `recipe.yaml`, with the files that it names beside it, this does the same:\n\n"
        text += f"```yaml\n{job.notes.recipe}```\n\n"
        text += "    ghoststream run recipe.yaml --model BASE --out FOLDER\n"
    text += _recipe(job.operators.metadata, "\n## Recipe of the operators\n")
    plans = _plans(job)
    for number, (one, earlier) in enumerate(zip(job.rounds, plans, strict=False), 1):
        recorded = one["operators"]
        text += f"\n## Round {number}: {earlier} of {earlier.n_layers} layers, by {recorded['kind']}\n"
        text += f"\nIt began with: `{one['base']['digest']}`.\n{_recipe(recorded['metadata'], '')}"
    return text


def _trained(recipes: Sequence[Mapping[str, Any] | None]) -> str:
    """Say whether something was trained, and what."""
    trained = [one for one in recipes if one and training_of(one)]
    if not trained:
        return "Nothing was trained."
    is_more = any(one["training"]["norms"] for one in trained)
    what = "it and the norms behind it were" if is_more else "it was"
    course = " and ".join(dict.fromkeys(told_course(one["training"], {}) for one in trained))
    texts = " and ".join(dict.fromkeys(told_windows(one) for one in trained))
    return f"Then {what} trained towards the outputs of the base, in {course} on {texts}."


def _recipe(metadata: Mapping[str, Any], heading: str) -> str:
    recipe = metadata.get("recipe")
    return f"{heading}\n```json\n{pretty_json(recipe)}```\n" if recipe else ""


def _operator_table(operators: OperatorSet) -> str:
    known = [operator.diagnostics for operator in operators.operators]
    figures = [name for name in _SHOWN if any(one.get(name) is not None for one in known)]
    head = ["span", "in front of layer", "form", *(name.replace("_", " ") for name in figures)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for operator in operators.operators:
        layer = operators.plan.boundary_index(operator.span)
        place = "final norm" if operator.span.stop == operators.plan.n_layers else str(layer)
        values = [_figure(operator.diagnostics.get(name)) for name in figures]
        form: str = operator.form
        if is_absorbed(operator):
            share = "absorbed" if standing_operator(operator) is None else "its part on mlp is absorbed"
            form = f"{operator.form} on {operator.features} ({share})"
        lines.append("| " + " | ".join([str(operator.span), place, form, *values]) + " |")
    legend = (
        "\nA relative residual is what an operator leaves of its gap; `ghoststream.json` has all figures.\n"
    )
    return "\n".join(lines) + "\n" + legend


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
