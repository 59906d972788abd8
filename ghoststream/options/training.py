"""Options of how operators are trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ghoststream.option_types import Count, Few, Number, Options, option


class Training(Options):
    """How operators are trained towards the dense model."""

    title: ClassVar[str] = "Training"

    train: Literal["operators", "operators+norms"] = option(
        "operators+norms",
        "operators, or operators+norms.\noperators: the operators of the plan and nothing else. "
        "operators+norms: the weights of the norms behind the first span too, the final one included.",
        usual=True,
    )
    boost: Few = option(
        0,
        "Rounds of gradient boosting before the steps: least-squares fits, and no rate.\nIn each round every "
        "operator is fitted to the gradient of the divergence over all training windows, and goes as far "
        "along that as held-out windows gain. With --steps 0 that is all.",
        usual=True,
        metavar="N",
    )
    epochs: Count = option(4, "How often every training window is seen, at most.", metavar="N")
    steps: Few | None = option(None, "Steps of the optimiser at most, in the place of --epochs.", metavar="N")
    batch: Count = option(
        8, "Windows of a step; each step reads the layers behind the first span twice.", metavar="B"
    )
    learning_rate: Annotated[float, Field(gt=0, le=100)] = option(
        0.02,
        "Largest step of an entry at first, as a share of the root mean square of its tensor.\nIt falls to "
        "zero along half a cosine, and is halved where held-out windows do not gain.",
        metavar="RATE",
    )
    top: Count = option(100, "Logits of the dense model that count for a token.", metavar="K")
    held_out: Count | None = option(
        None, "Windows held out for measuring, taken from the end. Default: a quarter.", metavar="S"
    )
    seed: Number = option(0, "Order of the windows.", metavar="N")

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.steps == 0 and not self.boost:
            msg = "neither a step nor a round of boosting is asked for; give more --steps, or --boost"
            raise ValueError(msg)
        return self


def _or_steps(value: Any) -> Any:
    if isinstance(value, bool) or value in ("true", "false"):
        return {} if value in (True, "true") else None
    if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
        return {"steps": int(value)}
    if isinstance(value, str):
        msg = f"{value!r} is no number of steps; put what follows the option in front of it, or give a number"
        raise ValueError(msg)  # noqa: TRY004 - pydantic's
    return value or None


OR_STEPS = BeforeValidator(_or_steps)
"""A training that is off unless something is said of it: a number is its steps, true is all defaults."""
