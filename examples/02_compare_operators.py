"""One capture, three ways to repair, one table: MODEL TEXT HELDOUT_TEXT WORKDIR.

The model is run once; every plan and operator is fitted from the store. All variants are then measured in a
single pass over the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ghoststream

OPERATORS = ("none", "linear-patch-diagonal", "ghost")


def main(model: str, text: str, heldout: str, work: Path) -> None:
    store = work / "store"
    work.mkdir(parents=True, exist_ok=True)
    calibration = ghoststream.Text(spec=text, sequences=32, length=64)
    ghoststream.capture(model, calibration=calibration, store=store)
    source = ghoststream.Source(store=store)
    plan = ghoststream.select(2, source).plan
    folders = []
    for name in OPERATORS:
        method = ghoststream.Method(operator=name)
        operators = ghoststream.fit(plan, source, method=method, out=work / f"{name}.safetensors")
        folders.append(work / name)
        ghoststream.export(model, operators, folders[-1])
    report = ghoststream.evaluate([model, *folders], text=ghoststream.Text(spec=heldout, length=64))
    print(f"removed {plan}")
    for row in report.rows:
        print(f"{row.perplexity:10.3f}  {row.model}")


if __name__ == "__main__":
    specs = [text if ":" in text else f"file:{text}" for text in sys.argv[2:4]]
    main(sys.argv[1], *specs, Path(sys.argv[4]))
