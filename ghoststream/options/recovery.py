"""A whole job: the groups that it has, and options of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ghoststream.option_types import OR_SPEC, Options, option
from ghoststream.options.compute import Compute, Reduction, Storage
from ghoststream.options.method import Method
from ghoststream.options.search import Search
from ghoststream.options.text import Text, one_text
from ghoststream.options.training import OR_STEPS, Training
from ghoststream.spans import PruningPlan, count_or_spans

Resume = Literal["auto", "required", "never"]
Form = Literal["custom", "folded", "adapter", "gguf", "mlx"]
GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]


class Recovery(Options):
    """A whole job: a pipeline file holds it, ``recover`` builds it, and ``estimate`` prices it."""

    name: str = Field(
        default="recovery", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the job."
    )
    description: str = Field(default="", description="What it is for.")
    model: str | None = Field(default=None, description="Checkpoint folder or hub id.")
    remove: Annotated[int | str | PruningPlan, BeforeValidator(count_or_spans)] = Field(
        description="Layers to remove: how many (a criterion chooses them), a plan file, or spans like 13:19."
    )
    calibration: Annotated[Text, OR_SPEC] = Field(description="Text to calibrate on.")
    search: Search = Search()
    method: Method = Method()
    compute: Compute = Compute()
    store: str | None = Field(
        default=None,
        description="Activation store to write, where one is needed. Default: in the work folder.",
    )
    storage: Storage = Storage()
    reduction: Reduction = Reduction()
    distill: Annotated[Training | None, OR_STEPS] = option(
        None,
        "Train what was fitted: 4 epochs, or so many steps.\nOperators, and norms behind them, towards the "
        "dense model, as `ghoststream distill` does; a pipeline file has its other options.",
        usual=True,
        metavar="[STEPS]",
        bare="true",
    )
    form: Form = option(
        "custom",
        "Form of the result: custom holds every operator exactly; folded is an ordinary checkpoint.\n"
        "custom: with its modelling file, unless everything is absorbed. folded: without code, or refused. "
        "adapter: what was made, without the base's weights. gguf: one file for llama.cpp, or refused. mlx: "
        "custom, with a modelling file for mlx-lm too. See docs/forms.md.",
    )
    gguf_type: GgufType = option(
        "auto",
        "Type of the numbers in a GGUF; auto is that of the checkpoint.\n"
        "Of matrices only: vectors stay in float32.",
    )
    evaluate: Annotated[Text | None, OR_SPEC, AfterValidator(one_text)] = Field(
        default=None, description="Text to measure the base and the recovered model on."
    )
