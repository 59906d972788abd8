"""Pages in tests: files to make one of, and a page read as a browser would, without one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ghoststream.files import file_digest, write_sealed_json
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.exploring.report import NAME as EXPLORATION
from ghoststream.stages.exploring.report import DenseFigures, ExplorationReport, HeatMaps, Point, Spent
from ghoststream.stages.measuring.figures import write_figures
from ghoststream.stages.run_record import RunRecord, StageRecord
from ghoststream.testing.operators import random_operators

_VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})


class Page(HTMLParser):
    """A page, parsed.

    Attributes:
        tables: Rows of cells of each table, by the section or figure that it is in.
        ids: Every id.
        links: Every address that an element names.
        tags: Every element.
        text: All text.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "xlink:href", "action") if name in given]
        if tag not in _VOID:
            self._open.append((tag, given.get("id", "")))
        if tag == "table":
            self.tables.setdefault(self._place(), []).append([])
        elif tag == "tr":
            self.tables[self._place()][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._place()][-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1][0] in ("td", "th"):
            self.tables[self._place()][-1][-1][-1] += data

    def rows(self, place: str) -> list[list[str]]:
        """Return the rows of the one table of a section or figure, without its headers."""
        (table,) = self.tables[place]
        return table[1:]

    def _place(self) -> str:
        return next((name for tag, name in reversed(self._open) if tag in ("figure", "section")), "")


def write_everything(folder: Path, name: str = "run") -> list[Path]:
    """Write files with something for every figure of a page, with a name that runs have; return them.

    Args:
        folder: Where they go; must be there.
        name: Part of the names of models and files.
    """
    work = folder / f"{name}.work"
    work.mkdir()
    plan = PruningPlan.parse(8, "2:4 5:6")
    base = {"digest": "sha256:base"}
    _plan_file(plan, base).save(work / "plan-measured-3.json")
    operators = random_operators(plan, 32)
    for boundary in operators.boundaries:
        curve = [[1e-6, 0.8], [1e-4, 0.7], [1e-2, 0.9]]
        boundary.diagnostics.update(ridge_curve=curve, ridge_relative=1e-4, warnings=["it is <odd>"])
    replace(operators, metadata={"base": base, "recipe": {"text": {"spec": f"file:{name}"}}}).save(
        work / "auto-2-4_5-6.safetensors"
    )
    operators_digest = file_digest(work / "auto-2-4_5-6.safetensors")
    record = RunRecord(
        name, state="done", seconds=12.5, peak_bytes=2**30, command=f"ghoststream recover '{name}'"
    )
    record.stages = [StageRecord("search", 9.0, 2**29), StageRecord("fit", 3.0, 2**30)]
    record.estimate = {"stages": [{"name": "search", "seconds": 8.0, "peak_bytes": 2**28}]}
    (work / "run.json").write_text(json.dumps(record.to_json()))
    models = [(f"models/of/{name}", "sha256:base"), (str(work), operators_digest)]
    write_figures(
        folder / "evaluation.json", "evaluation", [_loss_row(*one, at) for at, one in enumerate(models)]
    )
    write_figures(folder / "tasks.json", "tasks", [_task_row(*one, at) for at, one in enumerate(models)])
    exploration = folder / f"{name}.explored"
    exploration.mkdir()
    write_sealed_json(exploration / EXPLORATION, _exploration().to_json())
    return [work, folder / "evaluation.json", folder / "tasks.json", exploration]


def _plan_file(plan: PruningPlan, base: dict[str, str]) -> Selection:
    rows = [
        {
            "spans": spans,
            "gap": 0.1 * number,
            "gap_standard_error": 0.02,
            "window_gaps": [0.1, 0.2],
            "repair": ["least-squares, hidden"],
            "round": 2,
            "chosen": number == 1,
        }
        for number, spans in enumerate([[[2, 4], [5, 6]], [[1, 4]], [[2, 5]]], start=1)
    ]
    positions = list(range(8))
    norms = {
        "position": positions,
        "mean": [1.0 + one for one in positions],
        "median": [1.0 + one for one in positions],
        "largest": [10.0 ** (one % 4) for one in positions],
        "largest_ratio": [2.0 for _ in positions],
        "massive": [one % 3 for one in positions],
        "tokens": [64 for _ in positions],
    }
    maps = {"starts": [1, 2, 3], "lengths": [1, 3], "channel_cosine": [[0.5, 0.6, None], [0.7, 0.8, 0.9]]}
    details = {"norms": norms, "similarity": {**maps, "token_cosine": maps["channel_cosine"]}}
    return Selection(plan, "measured", "loss", tuple(rows), (), 3.0, 4, {"stage": "select"}, details, base)


def _loss_row(model: str, fingerprint: str, at: int) -> dict[str, Any]:
    losses = [3.0 + 0.5 * at + 0.1 * number for number in range(4)]
    text = {"spec": "file:text & more.txt", "sequences": 4, "length": 16}
    return {
        "model": model,
        "fingerprint": fingerprint,
        "perplexity": math.exp(3.15 + 0.5 * at),
        "loss": 3.15 + 0.5 * at,
        "standard_error": 0.05,
        "tokens": 60,
        "window_losses": losses,
        "recipe": {"text": text, "tokens_digest": "sha256:tokens"},
    }


def _task_row(model: str, fingerprint: str, at: int) -> dict[str, Any]:
    def result(right: int) -> dict[str, Any]:
        items = [float(number < right) for number in range(10)]
        metrics = {"acc": {"value": right / 10, "standard_error": 0.1}}
        return {"metrics": metrics, "n_items": 10, "items": {"acc": items}, "items_digest": "sha256:items"}

    tasks = {"arc_easy": result(8 - 3 * at), "piqa": result(7 - at)}
    return {"model": model, "fingerprint": fingerprint, "tasks": tasks, "recipe": {}}


def _exploration() -> ExplorationReport:
    def point(removed: int, gap: float) -> Point:
        spans = ((1, 1 + removed),)
        low, high = gap - 0.02, gap + 0.02
        figures = (3.0 + gap, 20.0, gap, 0.01, low, high, (gap, gap), 2**20, 1.1, 1.2, 0.9)
        return Point(removed, spans, (), ("ghost",), *figures, f"plans/remove-{removed}.json")

    grid = ((0.5, None, 0.25), (None, None, 1.0))
    return ExplorationReport(
        "tiny", 8, tuple(point(*one) for one in ((1, 0.05), (2, 0.1), (3, 0.15), (4, 1.0))),
        DenseFigures(3.0, 20.1, 2**20), HeatMaps((1, 2, 3), (1, 2), grid, grid, grid, grid),
        Spent(4, 96, 8.0, 1.5), 0.2, 0.7,
    )  # fmt: skip
