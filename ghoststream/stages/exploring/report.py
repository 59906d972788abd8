"""What an exploration found: typed, as JSON (``explore.json``) and as text. torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from ghoststream.errors import ArtifactError
from ghoststream.files import atomic_write_json, format_bytes, json_digest, read_json, sealed, unseal
from ghoststream.options import Method
from ghoststream.spans import PruningPlan
from ghoststream.stages.exploring.curve import Curve, Findings, find, verdict

NAME = "explore.json"
"""The report, in the folder of an exploration."""

ENCODING = "ghoststream-exploration"
_VERSION = "1.0"
_ADVICE = "restore it from a copy, or explore again"
Grid = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """The plan that is taken for one number of layers.

    Attributes:
        removed: How many layers go.
        spans: Which ones, ``[start, stop)`` each.
        methods: How each boundary is repaired, as options.
        repair: The same for a reader.
        loss: Loss of the repaired model on the windows that were held out, in nats a token.
        perplexity: ``exp(loss)``.
        gap: Mean over windows of its loss above the dense model's.
        gap_standard_error: Standard error of that; None with one window.
        gap_low: Lower end of the 95 % interval of ``gap``; None with one window.
        gap_high: Upper end.
        window_gaps: Loss above the dense model's, for each window.
        weight_bytes: Bytes that the weights of the result take, predicted.
        decode_speedup: Tokens a second one by one, over the dense model's, predicted by the weights read.
        prefill_speedup: Tokens a second of a prompt, over the dense model's, predicted by arithmetic.
        cache_share: Bytes of the result's key-value cache over the dense model's.
        plan: Its plan file, in the folder.
    """

    removed: int
    spans: tuple[tuple[int, int], ...]
    methods: tuple[Method, ...]
    repair: tuple[str, ...]
    loss: float
    perplexity: float
    gap: float
    gap_standard_error: float | None
    gap_low: float | None
    gap_high: float | None
    window_gaps: tuple[float, ...]
    weight_bytes: int
    decode_speedup: float
    prefill_speedup: float
    cache_share: float
    plan: str

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON data."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        methods = [method.to_json() for method in self.methods]
        return {**found, "spans": [list(span) for span in self.spans], "methods": methods}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a point from :meth:`to_json`."""
        spans = tuple((int(start), int(stop)) for start, stop in data["spans"])
        methods = tuple(Method.make(method) for method in data["methods"])
        lists = {name: tuple(data[name]) for name in ("repair", "window_gaps")}
        return cls(**{**data, "spans": spans, "methods": methods, **lists})


@dataclass(frozen=True, slots=True)
class DenseFigures:
    """The dense model, measured on the same windows.

    Attributes:
        loss: Loss on the windows that were held out, in nats a token.
        perplexity: ``exp(loss)``.
        weight_bytes: Bytes of its weights.
    """

    loss: float
    perplexity: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class HeatMaps:
    """What is known of single spans: ``map[i][j]`` is of the span of ``lengths[i]`` layers at ``starts[j]``.

    Attributes:
        starts: First layers of the spans.
        lengths: Layers of the spans.
        channel_cosine: Mean cosine of a channel over the tokens of a window, before and behind the span.
        token_cosine: Mean cosine of a token over the channels.
        residual: Relative residual of the repair on the tokens that it was fitted on; None where the span was
            not fitted.
        gap: Loss above the dense model's of the model without the span, repaired, on few windows; None where
            it was not measured.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    channel_cosine: Grid
    token_cosine: Grid
    residual: Grid
    gap: Grid

    names: ClassVar[tuple[str, ...]] = ("channel_cosine", "token_cosine", "residual", "gap")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the maps from JSON data."""
        grids = {name: tuple(map(tuple, data[name])) for name in cls.names}
        return cls(tuple(data["starts"]), tuple(data["lengths"]), **grids)


@dataclass(frozen=True, slots=True)
class Spent:
    """What the exploration took.

    Attributes:
        passes: Passes over the weights.
        layer_runs: Windows that went through a layer, summed over layers and lanes.
        head_runs: Windows whose logits were taken, summed over lanes; a part of a window is a part.
        dense_passes: Products of both, over those of the dense model on the whole calibration text.
    """

    passes: int
    layer_runs: int
    head_runs: float
    dense_passes: float


@dataclass(frozen=True, repr=False)
class ExplorationReport:
    """The answer to how many layers can go.

    Attributes:
        model: What the user called the model.
        n_layers: Its decoder layers.
        points: One for each number of layers, ascending.
        dense: The dense model.
        maps: What is known of single spans.
        norms: How large the dense model's hidden states are, as a plan file says it of a race.
        spent: What it took.
        cheap: Loss above the dense model's below which layers are cheap, in nats.
        broken: Loss above which the model is broken.
        candidates: Figures of everything that was measured, as JSON data: those of a plan file, with how many
            layers are ``removed``.
        recipe: What decides all of it.
        base: The model's fingerprint and digests of its tensors.
        versions: Library versions.
        files: Digests of the files beside the report, by their names.
    """

    model: str
    n_layers: int
    points: tuple[Point, ...]
    dense: DenseFigures
    maps: HeatMaps
    spent: Spent
    cheap: float
    broken: float
    norms: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the recipe."""
        return json_digest(dict(self.recipe))

    @property
    def curve(self) -> Curve:
        """Numbers of layers, and their loss above the dense model's."""
        return [(point.removed, point.gap) for point in self.points]

    @cached_property
    def findings(self) -> Findings:
        """Knee, and where layers cease to be cheap and the model breaks."""
        return find(self.curve, cheap=self.cheap, broken=self.broken)

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        return verdict(self.curve, self.findings, cheap=self.cheap, broken=self.broken)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON data of ``explore.json``, with its digest."""
        data = {
            "encoding-type": ENCODING,
            "encoding-version": _VERSION,
            "model": self.model,
            "n_layers": self.n_layers,
            "thresholds": {"cheap": self.cheap, "broken": self.broken},
            **asdict(self.findings),
            "verdict": self.verdict,
            "dense": asdict(self.dense),
            "points": [point.to_json() for point in self.points],
            "heat_maps": asdict(self.maps),
            "norms": dict(self.norms),
            "spent": asdict(self.spent),
            "candidates": [dict(row) for row in self.candidates],
            "recipe": dict(self.recipe),
            "base": dict(self.base),
            "versions": dict(self.versions),
            "files": dict(self.files),
        }
        return sealed(data)

    def save(self, path: Path) -> None:
        """Write ``explore.json``, whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        atomic_write_json(path, self.to_json())

    def __repr__(self) -> str:
        """What a notebook shows."""
        return self.to_text()

    def to_text(self) -> str:
        """Return the report as lines for a reader, without colours or lines of a table."""
        rows = [
            f"{point.removed:>3} layers  loss {point.gap:+.3f} ({_interval(point)})  perplexity "
            f"{point.perplexity:.2f}  {format_bytes(point.weight_bytes)}  {self.plan_of(point)}"
            for point in self.points
        ]
        return "\n".join([*rows, self.verdict])

    def plan_of(self, point: Point) -> PruningPlan:
        """Return the plan of a point."""
        return PruningPlan.from_json({"n_layers": self.n_layers, "spans": point.spans})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report.

        Args:
            path: ``explore.json``, or its folder.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is damaged, or nothing that `explore` wrote.
        """
        path = path / NAME if path.is_dir() else path
        data = unseal(read_json(path), path, advice=_ADVICE)
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            msg = (
                f"{path} lacks a part of what `ghoststream explore` writes ({error!r}): another version "
                "wrote it; explore again"
            )
            raise ArtifactError(msg) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            model=str(data["model"]),
            n_layers=int(data["n_layers"]),
            points=tuple(map(Point.from_json, data["points"])),
            dense=DenseFigures(**data["dense"]),
            maps=HeatMaps.from_json(data["heat_maps"]),
            spent=Spent(**data["spent"]),
            cheap=float(data["thresholds"]["cheap"]),
            broken=float(data["thresholds"]["broken"]),
            candidates=tuple(dict(row) for row in data["candidates"]),
            **{name: dict(data[name]) for name in ("norms", "recipe", "base", "versions", "files")},
        )


def table_of(report: ExplorationReport) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
    """Return headers and rows of the points, for a table."""
    marks = _marks(report.findings)
    headers = [
        "removed", "spans", "above dense", "95 % interval", "perplexity", "weights", "decode", "prefill", "",
    ]  # fmt: skip
    rows = [
        [
            point.removed,
            str(report.plan_of(point)),
            f"{point.gap:.3f}",
            _interval(point),
            f"{point.perplexity:.2f}",
            format_bytes(point.weight_bytes),
            f"{point.decode_speedup:.2f}x",
            f"{point.prefill_speedup:.2f}x",
            ", ".join(marks.get(point.removed, ())),
        ]
        for point in report.points
    ]
    return headers, rows


def _marks(findings: Findings) -> dict[int, list[str]]:
    """Return what is said of some numbers of layers."""
    marks: dict[int, list[str]] = {}
    told = (
        (findings.cheap_up_to, "last cheap"),
        (findings.knee, "knee"),
        (findings.breaks_at, "breaks"),
    )
    for removed, mark in told:
        if removed:
            marks.setdefault(removed, []).append(mark)
    return marks


def _interval(point: Point) -> str:
    if point.gap_low is None or point.gap_high is None:
        return "unknown"
    return f"{point.gap_low:.3f} to {point.gap_high:.3f}"
