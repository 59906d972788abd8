"""Options of how a gap is repaired."""

from __future__ import annotations

from typing import ClassVar, Literal

from ghoststream.option_types import Count, Few, Number, Options, Ridge, option

AUTO = "auto"
"""In the place of an operator's name: several ways to repair are tried, and held-out text decides."""

UNIFORM = "uniform"
"""Name of the token weight of the paper: every token counts the same."""

Inputs = Literal["repaired", "dense"]
Precision = Literal["auto", "float64", "float32-blocked"]
Solver = Literal["gram", "tsqr", "svd", "sketch-features", "sketch-range"]


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
        "Ridge. Default: 1e-6 (ghost), auto (least-squares).\nAdded to the diagonal of the Gram "
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

    @property
    def label(self) -> str:
        """What a reader calls it: operator, features and token weights, and what is unusual."""
        unusual = ("on dense states",) if self.inputs == "dense" else ()
        if self.refit:
            unusual = (*unusual, f"{self.refit} layers refitted")
        return ", ".join((str(self.operator), self.features, self.token_weights, *unusual))
