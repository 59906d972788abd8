"""Options of how operators are trained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ghoststream.option_types import Count, Number, Options, option


class Training(Options):
    """How operators are trained towards the dense model."""

    title: ClassVar[str] = "Training"

    train: Literal["operators", "operators+norms"] = option(
        "operators+norms",
        "operators, or operators+norms.\noperators: the operators of the plan and nothing else. "
        "operators+norms: the weights of the norms behind the first span too, the final one included.",
        usual=True,
    )
    epochs: Count = option(4, "How often every training window is seen, at most.", metavar="N")
    steps: Count | None = option(
        None, "Steps of the optimiser at most, in the place of --epochs.", metavar="N"
    )
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
