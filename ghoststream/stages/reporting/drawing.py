"""Drawing with matplotlib: SVG that takes its colours from the page, and PNG; the same bytes every time."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from ghoststream.errors import RequestError
from ghoststream.stages.reporting.comparison import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 10.0, 4.6
"""Inches. A page shows the narrow drawing on a telephone: a wide one would have letters too small to read."""

MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
_PNG_DPI = 110
_LONGEST_NAME = {False: 34, True: 17}


@dataclass(frozen=True)
class Ink:
    """Colours of a drawing, as matplotlib takes them.

    Attributes:
        text: Letters and axes.
        faint: Grid lines and layers that are kept.
        accent: What is chosen or removed.
        ground: What it is drawn on.
        series: Runs, in order; they also differ in marker and dash.
    """

    text: str
    faint: str
    accent: str
    ground: str
    series: tuple[str, ...]


LIGHT = Ink(
    "#1b1f24",
    "#c4cad1",
    "#b3261e",
    "#ffffff",
    ("#1c62a8", "#a8480c", "#17703a", "#7a3fb0", "#a61e4d", "#0b6e75", "#765a00", "#5a6270"),
)
# Colours that nobody draws in: each becomes the name of a colour of the page, which has two schemes.
_NAMED = Ink("#010101", "#010102", "#010103", "#010104", tuple(f"#0102{number:02x}" for number in range(8)))
_NAMES = {
    _NAMED.text: "var(--ink)",
    _NAMED.faint: "var(--faint)",
    _NAMED.accent: "var(--accent)",
    _NAMED.ground: "var(--ground)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_NAMED.series)},
}


@dataclass(frozen=True)
class Canvas:
    """What a figure is drawn on.

    Attributes:
        figure: Of matplotlib.
        ink: Its colours.
        is_narrow: Whether it is for a narrow screen.
    """

    figure: Figure
    ink: Ink
    is_narrow: bool

    def axes(self, rows: int = 1, heights: Sequence[float] | None = None) -> list[Axes]:
        """Return axes below one another."""
        found = self.figure.subplots(rows, 1, squeeze=False, height_ratios=heights)
        for axes in found[:, 0]:
            axes.grid(visible=True, axis="x", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return list(found[:, 0])

    def series(self, number: int) -> dict[str, Any]:
        """Return colour, marker and dash of a run."""
        return {
            "color": self.ink.series[number % len(self.ink.series)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": _DASHES[number // len(self.ink.series) % len(_DASHES)],
        }

    def short(self, name: str) -> str:
        """Return a name that fits beside an axis."""
        return shortened(name, _LONGEST_NAME[self.is_narrow])

    def logarithmic(self, axes: Axes, name: Literal["x", "y"]) -> None:
        """Make an axis logarithmic, with numbers as they are spoken: formulas are not set."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = axis.get_data_interval()
        if high < 50 * low:
            # Less than two decades have too few powers of ten to read by.
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())

    def legend(self, axes: Axes) -> None:
        """Put the legend below everything, each name once."""
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 1 if self.is_narrow else min(3, len(handles))
            self.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        name: Its id, and the name of its PNG file.
        title: What it shows.
        lead: A sentence on how to read it, with units.
        alt: What somebody is told who does not see it.
        height: Inches.
        paint: Draws it.
        table: The same figures.
    """

    name: str
    title: str
    lead: str
    alt: str
    height: float
    paint: Callable[[Canvas], None]
    table: Table


@dataclass(frozen=True)
class Absent:
    """A figure that cannot be drawn, and why."""

    title: str
    reason: str


def shortened(name: str, most: int) -> str:
    """Return a name of at most so many letters, its middle left out."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        RequestError: If the extra ``report`` is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ModuleNotFoundError as error:
        msg = f"a page with figures needs matplotlib ({error}); install ghoststream[report], or use --no-page"
        raise RequestError(msg) from error


def svg(drawing: Drawing, *, is_narrow: bool) -> str:
    """Return a drawing as SVG for a page: text as text, colours by the page's names, ids of its own."""
    with _style(_NAMED, is_narrow=is_narrow):
        figure = _painted(drawing, _NAMED, is_narrow=is_narrow)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(file.getvalue(), f"{drawing.name}-{'narrow' if is_narrow else 'wide'}", drawing.alt)


def png(drawing: Drawing) -> bytes:
    """Return a drawing as PNG, dark on white."""
    with _style(LIGHT, is_narrow=False):
        figure = _painted(drawing, LIGHT, is_narrow=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def is_wide_range(values: Sequence[float]) -> bool:
    """Say whether positive values are better drawn over a logarithmic axis."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return len(finite) == len(values) > 0 and max(finite) > 20 * min(finite)


def _painted(drawing: Drawing, ink: Ink, *, is_narrow: bool) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(NARROW if is_narrow else WIDE, drawing.height), layout="constrained")
    drawing.paint(Canvas(figure, ink, is_narrow))
    return figure


@contextmanager
def _style(ink: Ink, *, is_narrow: bool) -> Iterator[None]:
    import matplotlib as mpl
    from cycler import cycler

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ghoststream",
        # A name is no formula, whatever is in it.
        "text.parse_math": False,
        "font.size": 10.5 if is_narrow else 10.0,
        "axes.prop_cycle": cycler(color=ink.series),
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.edgecolor": ink.faint,
        "grid.color": ink.faint,
        "lines.markersize": 5,
        "hatch.linewidth": 0.8,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink.text
        ),
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(cast("Any", settings))
        # Letters that matplotlib has no width of are drawn by the browser all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # Many names on a narrow page leave little room; what does not fit is in the table.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def _for_page(text: str, name: str, alt: str) -> str:
    import html

    view = re.search(r'viewBox="([^"]*)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\bid=\"([^\"]*)\"", rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"(?:xlink:)?href=\"#([^\"]*)\"", rf'href="#{name}-\1"', body)
    body = re.sub(r"font: ((?:[\w.]+ )*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", body)
    body = re.sub(r"#0[01][0-9a-f]{4}\b", lambda found: _NAMES.get(found[0], found[0]), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    box = "" if view is None else view[1]
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(alt)}">\n{body}\n</svg>'
