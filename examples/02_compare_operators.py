"""One capture, three ways to repair, one table: MODEL TEXT HELDOUT_TEXT WORKDIR.

The model is run once; every plan and operator is fitted from the store. All variants are then measured in a single
pass over the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ghoststream

OPERATORS = ("none", "linear-patch-diagonal", "ghost")


def main(model: str, text: str, heldout: str, work: Path) -> None:
    store = work / "store"
    work.mkdir(parents=True, exist_ok=True)
    ghoststream.capture(model, calibration=text, sequences=32, length=64, store=store)
    plan = ghoststream.select(store, 2, criterion="streamline").plan
    folders = []
    for name in OPERATORS:
        operators = ghoststream.solve(store, plan, operator=name, out=work / f"{name}.safetensors")
        folders.append(work / name)
        ghoststream.export(model, operators, folders[-1])
    report = ghoststream.evaluate([model, *folders], text=heldout, length=64)
    print(f"removed {plan}")
    for row in report.rows:
        print(f"{row.perplexity:10.3f}  {row.model}")


if __name__ == "__main__":
    specs = [text if ":" in text else f"file:{text}" for text in sys.argv[2:4]]
    main(sys.argv[1], *specs, Path(sys.argv[4]))
