"""The README of a recovered checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ghoststream.files.json_data import pretty_json
from ghoststream.operators import OperatorSet
from ghoststream.recovery.absorbing import is_absorbed, standing_operator
from ghoststream.spans import PruningPlan

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- ghoststream
- layer-pruning
---
"""

_RECOVERED = """
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


def model_card(
    operators: OperatorSet,
    *,
    title: str,
    model_type: str,
    base: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    stands: bool,
    has_base_card: bool,
) -> str:
    """Write the card: what was done to which model, with which residuals, and how to load it.

    Args:
        operators: The plan and its operators with their diagnostics.
        title: What the base is called; not its folder, which says nothing elsewhere.
        model_type: ``model_type`` of the written configuration.
        base: Fingerprint of the base checkpoint.
        rounds: What the base was made of, where it is a recovered checkpoint itself.
        stands: Whether operators stand in the model.
        has_base_card: Whether the card of the model that all began with lies beside as ``README.base.md``.
    """
    plan = operators.plan
    plans = [PruningPlan.from_json(one["plan"]) for one in rounds]
    whole = functools.reduce(PruningPlan.then, [*plans, plan])
    is_recovered = bool(operators.operators) or any(one["operators"]["boundaries"] for one in rounds)
    text = _FRONT + f"\n# {title}, {whole.n_removed} of {whole.n_layers} layers removed\n"
    kind = _RECOVERED if stands else _FOLDED if is_recovered else _PRUNED
    recipes = [
        operators.metadata.get("recipe"),
        *(one["operators"]["metadata"].get("recipe") for one in rounds),
    ]
    text += kind.format(model_type=model_type, trained=_trained(recipes))
    text += "\n## What was removed\n\n"
    if rounds:
        text += f"Layers {whole} (0-based, half-open) of {whole.n_layers}, in {len(rounds) + 1} rounds. "
        text += "Each round counts the layers that the one before it left:\n\n"
        for number, removed in enumerate([*plans, plan], 1):
            text += f"{number}. layers {removed} of {removed.n_layers}\n"
        text += f"\n{len(plan.kept)} are left. The last round began with: `{base['digest']}`.\n"
    else:
        text += f"Layers {plan} (0-based, half-open) of {plan.n_layers}; {len(plan.kept)} are left. "
        text += f"Base checkpoint: `{base['digest']}`.\n"
    text += "The base's own card is `README.base.md`.\n" if has_base_card else ""
    if operators.operators:
        text += f"\n## Operators: {operators.kind}\n\n{_operator_table(operators)}"
    text += _HIDDEN_STATES if stands else ""
    if operators.warnings:
        text += "\n## Warnings\n\n" + "".join(f"- {warning}\n" for warning in operators.warnings)
    text += _recipe(operators.metadata, "\n## Recipe\n")
    for number, (one, earlier) in enumerate(zip(rounds, plans, strict=True), 1):
        recorded = one["operators"]
        text += f"\n## Round {number}: {earlier} of {earlier.n_layers} layers, by {recorded['kind']}\n"
        text += f"\nIt began with: `{one['base']['digest']}`.\n{_recipe(recorded['metadata'], '')}"
    text += "\nVersions, fingerprints and a digest of every tensor are in `ghoststream.json`.\n"
    return text


def _trained(recipes: Sequence[Mapping[str, Any] | None]) -> str:
    """Say whether something was trained, and what."""
    trainings = [one["training"] for one in recipes if one and one.get("stage") == "distill"]
    if not trainings:
        return "Nothing was trained."
    what = "it and the norms behind it were" if any(one["norms"] for one in trainings) else "it was"
    steps = max(int(one["steps"]) for one in trainings)
    return f"Then {what} trained towards the outputs of the base, in at most {steps} steps."


def _recipe(metadata: Mapping[str, Any], heading: str) -> str:
    recipe = metadata.get("recipe")
    return f"{heading}\n```json\n{pretty_json(recipe)}```\n" if recipe else ""


def _operator_table(operators: OperatorSet) -> str:
    figures = sorted(
        {
            name
            for operator in operators.operators
            for name, value in operator.diagnostics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    )
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
    return "\n".join(lines) + "\n"


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
