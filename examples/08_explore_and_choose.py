"""Explore how many layers can go, choose by the curve, recover that plan: MODEL TEXT OUT.

The folder `explored` of OUT has the report and a plan for each number of layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ghoststream


def main(model: str, text: str, out: Path) -> None:
    calibration = ghoststream.Text(spec=text, sequences=32, length=64)
    report = ghoststream.explore(model, calibration=calibration, out=out / "explored")
    print(report.to_text())
    # The most layers that still cost less than `cheap`; the fewest that were tried where none is cheap.
    cheap = [point for point in report.points if point.gap < report.cheap] or [report.points[0]]
    chosen = cheap[-1]
    plan = out / "explored" / chosen.plan
    ghoststream.recover(model, remove=str(plan), calibration=calibration, out=out / "recovered")
    print(f"{chosen.removed} layers removed, {report.plan_of(chosen)}: {out / 'recovered'}")


if __name__ == "__main__":
    spec = sys.argv[2] if ":" in sys.argv[2] else f"file:{sys.argv[2]}"
    main(sys.argv[1], spec, Path(sys.argv[3]))
