"""Whether operators were trained, on what and for how long, as their recipe and their figures say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGE = "distill"
"""Stage of the recipe of operators that were trained."""


def training_of(recipe: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return how operators of this recipe were trained; ``None`` where they were only fitted."""
    return recipe["training"] if recipe and recipe.get("stage") == STAGE else None


def told_training(recipe: Mapping[str, Any] | None, figures: Mapping[str, Any] | None = None) -> str:
    """Say what was trained, on what and for how long; nothing where operators were only fitted.

    Args:
        recipe: Of the operators.
        figures: Diagnostics of one of them; without, the steps are those that were allowed.
    """
    training = training_of(recipe)
    if recipe is None or training is None:
        return ""
    what = "operators, and the norms behind them" if training["norms"] else "operators"
    return f"{what}, in {told_course(training, figures or {})}, on {told_windows(recipe)}"


def told_course(training: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Say in how many rounds of boosting and steps.

    Args:
        training: Of a recipe.
        figures: Diagnostics of a trained operator; without, the numbers are those that were allowed.
    """
    rounds, steps = training["boost"], training["steps"]
    if "step_losses" not in figures:
        most = [f"at most {_told(rounds, 'round')} of boosting"] * bool(rounds)
        return " and ".join([*most, f"at most {_told(steps, 'step')}"] if steps else most)
    done = f"{_told(len(figures['boosts']), 'round')} of boosting, of which {figures['best_rounds']} count"
    taken = f"{_told(len(figures['step_losses']), 'step')}, of which {figures['best_step']} count"
    return " and ".join([done] * bool(rounds) + [taken] * bool(steps))


def _told(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def told_windows(recipe: Mapping[str, Any]) -> str:
    """Say on which windows operators of a recipe were trained."""
    text, training = recipe["text"], recipe["training"]
    spec = text["spec"] if isinstance(text["spec"], str) else ", ".join(text["spec"])
    return f"{training['n_train']} windows of at most {text['length']} tokens of {spec}"
