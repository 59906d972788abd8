"""Remove layers in rounds, each from the result of the one before, beside one round: MODEL TEXT HELDOUT OUT.

An operator right behind a removed span stays, and the next round is fitted to what the two do together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ghoststream

ROUNDS, EACH = 2, 1


def main(model: str, text: str, heldout: str, out: Path) -> None:
    calibration = ghoststream.Text(spec=text, sequences=32, length=64)
    one_span = ghoststream.Search(max_spans=1)

    def recover(base: str | Path, remove: int, name: str) -> Path:
        folder = out / name
        ghoststream.recover(base, remove=remove, calibration=calibration, search=one_span, out=folder)
        return folder

    folders = [recover(model, ROUNDS * EACH, "at-once")]
    base: str | Path = model
    for number in range(1, ROUNDS + 1):
        base = recover(base, EACH, f"round-{number}")
        folders.append(base)
    report = ghoststream.evaluate([model, *folders], text=ghoststream.Text(spec=heldout, length=64))
    for row in report.rows:
        print(f"{row.perplexity:10.3f}  {row.model}")


if __name__ == "__main__":
    specs = [text if ":" in text else f"file:{text}" for text in sys.argv[2:4]]
    main(sys.argv[1], *specs, Path(sys.argv[4]))
