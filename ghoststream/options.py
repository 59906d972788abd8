"""Every option that a user can give, declared once.

The command line, the Python API and pipeline files use these very objects: the text of a field is its
``--help`` and its documentation, its constraint is checked everywhere, and a recipe embeds it. What was given
can be told from what is a default, so that a stage refuses by name what it would not use
(:meth:`Options.refuse`).

A new option is one field here and the line that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ghoststream.errors import RequestError
from ghoststream.option_types import (
    OR_SPEC,
    SPEC_FORMS,
    Bytes,
    Count,
    Few,
    Layers,
    Length,
    Nats,
    Number,
    Options,
    Ridge,
    one_or_several,
    option,
)
from ghoststream.spans import PruningPlan, count_or_spans

AUTO = "auto"
"""In the place of an operator's name: several ways to repair are tried, and held-out text decides."""

UNIFORM = "uniform"
"""Name of the token weight of the paper: every token counts the same."""

Dtype = Literal["float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16", "int8"]
Bos = Literal["auto", "always", "never", "stream"]
TextPart = Literal["all", "fit", "heldout"]
Inputs = Literal["repaired", "dense"]
Resume = Literal["auto", "required", "never"]
Precision = Literal["auto", "float64", "float32-blocked"]
Form = Literal["custom", "folded", "adapter", "gguf", "mlx"]
GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
Solver = Literal["gram", "tsqr", "svd", "sketch-features", "sketch-range"]


def dtype_name(dtype: Any) -> str:
    """Return what options, recipes and files call a torch dtype: ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class Text(Options):
    """Which token windows are cut from which text, or from several texts.

    Two defaults depend on the role of the text: :meth:`to_calibrate` and :meth:`to_evaluate`.
    """

    title: ClassVar[str] = "Text"

    spec: Annotated[str | tuple[str, ...], BeforeValidator(one_or_several)] = option(
        ...,
        f"file:PATH, ids:FILE.npy, wikitext2, c4, hf:NAME ...\nIn full: {SPEC_FORMS}, or NAME[:REST] of an "
        "installed package. To calibrate, several: each gives its share of the windows, and they take turns.",
    )
    sequences: Count | None = option(
        None, "Windows of text. Default: 128 to calibrate, all to evaluate.", usual=True, metavar="S"
    )
    length: Length = option(512, "Tokens of a window.", usual=True, metavar="T")
    pack: bool = option(
        True,
        "Join documents into full windows, or one document a window.\nWindows of one document are as long as "
        "the longest one, at most --length.",
    )
    bos: Bos = option(
        "auto",
        "Whether windows begin with the begin-of-text token: auto, always, never or stream.\nauto: each does "
        "where the tokenizer puts it in front of a text. always: each does. never: none does. stream: the "
        "first one does, as where a whole text is tokenised at once.",
    )
    part: TextPart | None = option(
        None, "Part of a text with a standard split. Default: fit to calibrate, heldout to evaluate."
    )

    @model_validator(mode="after")
    def _one_stream(self) -> Self:
        if self.bos == "stream" and not self.pack:
            msg = "--bos stream joins documents, and --no-pack does not; use --bos auto"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _enough_for_each(self) -> Self:
        n_texts, wanted = len(self.specs), self.to_calibrate().sequences or 0
        if n_texts > 1 and wanted < n_texts:
            msg = f"{n_texts} texts cannot share {wanted} windows; give --sequences {n_texts} or more"
            raise ValueError(msg)
        return self

    @classmethod
    def of(cls, text: TextLike) -> Text:
        """Return the text of a specification or of several, or the text itself.

        Raises:
            RequestError: If there is no specification.
        """
        return text if isinstance(text, Text) else cls.make({"spec": text})

    @property
    def specs(self) -> tuple[str, ...]:
        """The specifications: mostly one."""
        return (self.spec,) if isinstance(self.spec, str) else self.spec

    def to_calibrate(self) -> Text:
        """Return the text with the defaults of one that is calibrated on."""
        return self._with(128 if self.sequences is None else self.sequences, self.part or "fit")

    def to_evaluate(self) -> Text:
        """Return the text with the defaults of one that is measured on.

        Raises:
            RequestError: If it is several texts.
        """
        _one_text(self)
        return self._with(self.sequences, self.part or "heldout")

    def _with(self, sequences: int | None, part: TextPart) -> Text:
        return self.model_copy(update={"sequences": sequences, "part": part})


TextLike = Text | str | Sequence[str]
"""A text, or its specification alone; to calibrate on, several specifications too."""


def _one_text(text: Text | None) -> Text | None:
    if text is not None and len(text.specs) > 1:
        found = f"{', '.join(text.specs)} are {len(text.specs)} texts"
        msg = f"{found}, and figures are of one; measure on each by itself"
        raise RequestError(msg)
    return text


class Source(Options):
    """Where hidden states come from: an activation store, or a model that is run over a text.

    With a store, ``model`` is what it was captured from, for those criteria and operators that read its
    weights too.
    """

    model: str | Path | None = Field(default=None, description="Checkpoint folder or hub id.")
    store: str | Path | None = Field(default=None, description="Activation store.")
    calibration: Annotated[Text | None, OR_SPEC] = Field(default=None, description="Text to calibrate on.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.store is None) == (self.calibration is None):
            msg = "give either --store, or --model and --calibration"
            raise ValueError(msg)
        if self.calibration is not None and self.model is None:
            msg = "--calibration needs the --model that is run over it"
            raise ValueError(msg)
        return self


class Method(Options):
    """How a boundary is fitted.

    Operators read what concerns them and refuse what they cannot honour.
    """

    title: ClassVar[str] = "Repair"

    operator: str | None = option(
        None,
        "How a gap is repaired, e.g. auto, ghost or none. Default: auto; ghost from a store.\nauto tries "
        "several and keeps the best on held-out windows; ghost is the paper's. Others: least-squares, "
        "diagonal, scalar, symmetric, orthogonal, linear-patch-diagonal, linear-patch-rotated, "
        "prune-and-comp, replace-me-ls, replace-me-cosine, replace-me-cosine-whole, "
        "replace-me-cosine-published, replace-me-cosine-whole-published.",
        usual=True,
        metavar="NAME",
    )
    features: str = option(
        "hidden",
        "States that least-squares reads, e.g. normed or hidden+mlp.\nhidden, normed (over its root mean "
        "square), hidden+normed; of the layer before, mlp (what enters down_proj), mlp_output (what the MLP "
        "adds) or hidden+mlp, which are absorbed into that weight.",
        usual=True,
        metavar="NAME",
    )
    token_weights: str = option(
        UNIFORM,
        "Weight of a token in the fit: uniform, drop_sinks or relative.\n"
        "drop_sinks: massive activations born in a span do not count. relative: 1/|target|^2.",
        usual=True,
        metavar="NAME",
    )
    ridge: Ridge = option(
        None,
        "Ridge of ghost (default 1e-6) or least-squares (default auto).\nAdded to the diagonal of the Gram "
        "matrix: as it is by ghost, times the diagonal's mean by least-squares, where auto takes what "
        "predicts held-out folds best, and gcv needs no folds.",
        usual=True,
        metavar="RIDGE",
    )
    shrink: Literal["identity", "zero"] = option(
        "identity", "Map that a large ridge of least-squares ends at: one that changes nothing, or zero."
    )
    intercept: bool = option(False, "Let least-squares fit a constant too.")
    rank: Count | None = option(
        None, "Best map of this rank, by least-squares. Default: full rank.", metavar="R"
    )
    solver: Solver = option(
        "gram",
        "gram: normal equations. tsqr: QR, for features that are nearly dependent. svd: singular values, "
        "the paper's equation as it is written, for ghost. Sketches from a store: see docs/operators.md.",
    )
    per_layer: bool = option(
        False,
        "Fit each removed layer for itself and multiply the maps, as the paper's code does where removed "
        "layers are apart.",
    )
    sketch_size: Count | None = option(None, "Columns of a sketch. Default: 2 R + 10.", metavar="K")
    power_iterations: Few = option(
        0, "Steps of subspace iteration of sketch-features, one more read of the store each.", metavar="Q"
    )
    seed: Number = option(0, "Seed of a sketch.", metavar="N")
    precision: Precision = option(
        "auto",
        "Precision of summed products: float64 on a processor, float32-blocked on CUDA.\nfloat32-blocked "
        "takes products in float32, of bfloat16 by tensor cores, and adds up blocks of tokens in float64.",
    )
    inputs: Inputs = option(
        "repaired",
        "States that a later operator is fitted on: those of the model repaired so far, or of the dense "
        "model.",
    )
    refit: Few = option(
        0,
        "Layers behind each gap whose o_proj and down_proj are fitted anew.\nTheir weights change, by "
        "least-squares towards the dense model's states; the recovered model costs the same.",
        metavar="N",
    )

    @property
    def is_named(self) -> bool:
        """Whether an operator is named; otherwise several ways to repair are tried, as ``auto`` says."""
        return self.operator not in (None, AUTO)


class Search(Options):
    """How the layers to remove are chosen, and what is held out for it."""

    title: ClassVar[str] = "Choice of layers"

    trying: ClassVar[tuple[str, ...]] = ("search", "max_spans", "beam", "candidates", "lanes")
    """How much is tried: the fields that only criteria which run the model read, each of them some."""
    choosing: ClassVar[tuple[str, ...]] = ("criterion", *trying)
    """The fields that nothing reads where a plan is given."""
    measuring: ClassVar[tuple[str, ...]] = ("held_out", "across_texts")
    """The fields that nothing reads where nothing is measured."""

    criterion: str | None = option(
        None,
        "How layers are chosen. Default: measured; streamline-published from a store.\nBy running the "
        "model: measured (repairs and measures candidates), prune-and-repair, sleb, perplexity, "
        "perplexity-plus, taylor, taylor-plus, taylor-published, taylor-plus-published, prune-and-comp-bi. "
        "From hidden states: streamline, shortgpt (by their formulas), streamline-published, "
        "shortgpt-published (as the paper's published code computes them), uidl, uidl-all, lorp, residual, "
        "residual-in-sample. From these and the final norm: streamline-authors, shortgpt-authors, "
        "uidl-pruneme. From weights: magnitude, magnitude-plus, magnitude-l2, magnitude-published, "
        "magnitude-plus-published, magnitude-l2-published. "
        "Without a look: reverse, reverse-last.",
        usual=True,
        metavar="NAME",
    )
    search: Literal["race", "exhaustive"] = option(
        "race",
        "How much measured measures.\nrace: spans that similarity prefers, on few windows; the best go on to "
        "more. exhaustive: every span, on all windows.",
        usual=True,
    )
    max_spans: Count = option(
        2,
        "Spans that measured removes at most.\nEach has an operator, and takes a pass of the search.",
        usual=True,
        metavar="K",
    )
    held_out: Count | None = option(
        None,
        "Windows held out for measuring, taken from the end. Default: a quarter.",
        usual=True,
        metavar="S",
    )
    beam: Count = option(
        1,
        "Best plans of a step that measured (of each partition), prune-and-repair and sleb go on with.",
        metavar="B",
    )
    candidates: Count = option(
        8,
        "Plans of each partition that measured measures once a span stands: those whose spans cost least "
        "alone.",
        metavar="M",
    )
    across_texts: Literal["mean", "worst"] = option(
        "mean",
        "Whether candidates are ranked by the mean of all held-out windows, or by that of the worst text.\n"
        "worst: of several --calibration the one on which a candidate loses most against the dense model.",
    )
    lanes: Count | None = option(None, "Most candidates in one pass. Default: all.", metavar="N")
    folds: Few = option(
        4, "Parts of the text, each left out once for the figures out of sample; 0 for none.", metavar="K"
    )


class Exploration(Options):
    """Which numbers of layers are explored, and what counts as cheap."""

    title: ClassVar[str] = "Exploration"

    counts: Layers | None = option(
        None,
        "Numbers of layers, e.g. 2,4,8 or 1:13 (half-open). Default: up to half of them, at most 16 numbers.",
        usual=True,
        metavar="LIST",
    )
    per_count: Count = option(
        3, "Plans of each number of spans measured for a number of layers.", metavar="M"
    )
    cheap: Nats = option(
        0.2, "Loss above the dense model's below which layers are cheap.", usual=True, metavar="NATS"
    )
    broken: Nats = option(
        0.7,
        "Loss above the dense model's beyond which it is broken: 0.7 doubles the perplexity.",
        usual=True,
        metavar="NATS",
    )


class Compute(Options):
    """How a model is opened and run.

    Device, memory and scratch change no bit of a result on one kind of device.
    """

    title: ClassVar[str] = "Running the model"

    dtype: Dtype | None = option(None, "Compute type. Default: the checkpoint's.", usual=True)
    attention: str | None = option(
        None, "Attention implementation, e.g. eager or sdpa. Default: transformers' choice.", metavar="NAME"
    )
    micro_batch: Count | None = option(
        None,
        "Sequences computed at once. Default: what half of the largest layer's bytes holds, at most 2,048 "
        "tokens; on an accelerator twice these bytes, and 8,192 tokens.",
        metavar="B",
    )
    device: str = option(
        "auto",
        "cpu, cuda or cuda:N; auto is CUDA where there is one.\nSeveral, such as cuda:0,cuda:1, share the "
        "windows of capture and evaluate, and the candidates of select.",
        usual=True,
        metavar="NAME",
    )
    device_memory: Bytes | None = option(
        None,
        "Accelerator memory that a pass may take, e.g. 20GiB. Default: nine tenths of what is free.",
        metavar="SIZE",
    )
    host_memory: Bytes | None = option(
        None,
        "Host memory that a pass may take. Default: nine tenths of what is free.\nHidden states that do not "
        "fit go to scratch.",
        usual=True,
        metavar="SIZE",
    )
    scratch: Path | None = option(
        None,
        "Folder for hidden states that do not fit. Default: beside the store, or the temporary folder.",
        metavar="DIR",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.", metavar="REV")
    trust_remote_code: bool = option(
        False, "Allow code that comes with the model to run; for tasks also that of --include-path."
    )


class Reduction(Options):
    """Where statistics of a store are reduced, and what that may take. Changes no bit."""

    title: ClassVar[str] = "Statistics of a store"

    scheduler: Any = option(
        None, "Address of a Dask scheduler, e.g. tcp://host:8786. Default: this process.", metavar="ADDRESS"
    )
    workers: Count | None = option(
        None,
        "Threads in this process. Default: as many as there are processors, and memory for.",
        metavar="W",
    )
    memory: Bytes | None = option(
        None,
        "Memory of all statistics at a time, e.g. 8GiB; less takes more sweeps over the store. Default: "
        "half of what is free.",
        metavar="SIZE",
    )


class Storage(Options):
    """What an activation store keeps."""

    title: ClassVar[str] = "Activation store"

    layers: Layers | None = option(
        None, "Hidden states h[l] to keep, e.g. 10:20 or 0,13,19. Default: all of h[0..L].", metavar="LIST"
    )
    store_dtype: StoredDtype | None = option(
        None,
        "Type of the stored hidden states. Default: the compute type.\nint8: 8-bit integers with a scale for "
        "each channel and each token of a window, half the disk of bfloat16.",
    )


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
    evaluate: Annotated[Text | None, OR_SPEC, AfterValidator(_one_text)] = Field(
        default=None, description="Text to measure the base and the recovered model on."
    )
