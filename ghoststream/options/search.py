"""Options of which layers are removed: one number of them, or many explored."""

from __future__ import annotations

from typing import ClassVar, Literal

from ghoststream.option_types import Count, Few, Layers, Nats, Options, option


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
