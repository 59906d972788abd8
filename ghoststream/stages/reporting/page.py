"""The page: one HTML file that asks for nothing else, put together from runs and their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ghoststream.redaction import without_secrets
from ghoststream.stages.artifacts.explain import flatten
from ghoststream.stages.reporting.comparison import Table, by_column, comparison, figure, verdict
from ghoststream.stages.reporting.drawing import Absent, Drawing, svg
from ghoststream.stages.reporting.runs import Run, texts_of

GENERATOR = "ghoststream report"
"""What a page says that made it: a page of ours may be replaced, another file may not."""

_HERE = Path(__file__).parent
_TEMPLATE = "page.html.jinja"
_MOST_NAMES = 4


@dataclass(frozen=True)
class _Shown:
    name: str
    title: str
    lead: str
    table: Table
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class _RunFacts:
    name: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    command: str
    diagnostics: Table | None
    recipe: str


def page(runs: Sequence[Run], figures: Sequence[Drawing | Absent]) -> str:
    """Return the page of some runs. The same runs give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        generator=GENERATOR,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        title=_title(runs),
        verdicts=[verdict(run, runs) for run in runs],
        comparison=by_column(comparison(runs)),
        is_paired=any(run.base_digest for run in runs) and bool(texts_of(runs)),
        drawings=[_shown(one) for one in figures if isinstance(one, Drawing)],
        absent=[one for one in figures if isinstance(one, Absent)],
        runs=[_facts(run) for run in runs],
    )


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{', '.join(names[:_MOST_NAMES])}{more}"


def _shown(drawing: Drawing) -> _Shown:
    # What matplotlib writes of names is escaped there.
    wide, narrow = (Markup(svg(drawing, is_narrow=is_narrow)) for is_narrow in (False, True))
    return _Shown(drawing.name, drawing.title, drawing.lead, drawing.table, wide, narrow)


def _facts(run: Run) -> _RunFacts:
    facts = {
        "what": run.kind,
        "place": run.place,
        "removed": run.removed,
        "chosen by": run.chosen_by,
        "operator": run.operator,
        "trained": run.trained,
        "process": run.state,
        "fingerprint of the base": run.base_digest or "",
    }
    warnings = [str(text) for one in run.boundaries for text in one.diagnostics.get("warnings") or ()]
    recipe = without_secrets(json.dumps(run.recipe, indent=2, sort_keys=True)) if run.recipe else ""
    return _RunFacts(
        run.name,
        [(name, value) for name, value in facts.items() if value],
        warnings,
        run.command,
        _diagnostics(run),
        recipe,
    )


def _diagnostics(run: Run) -> Table | None:
    columns = [(str(one.span), {"kind": one.kind, **_plain(one.diagnostics)}) for one in run.boundaries]
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    rows = tuple(
        (name.replace("_", " "), *(_cell(column.get(name)) for _, column in columns)) for name in names
    )
    return Table(("", *(span for span, _ in columns)), rows) if columns else None


def _plain(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """Return diagnostics but for those that a figure or a line of the page shows."""
    return flatten({key: one for key, one in diagnostics.items() if key not in ("ridge_curve", "warnings")})


def _cell(value: Any) -> str:
    return figure(value, 5) if isinstance(value, float) else "-" if value is None else str(value)
