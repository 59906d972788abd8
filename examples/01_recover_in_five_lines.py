"""Remove a quarter of the layers, repair the gap, load the result: MODEL TEXT OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ghoststream


def main(model: str, text: str, out: str) -> None:
    n_layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    calibration = ghoststream.Text(spec=text, sequences=32, length=64)
    report = ghoststream.recover(model, remove=n_layers // 4, calibration=calibration, out=out)
    print(report.to_text())

    # Importing ghoststream made transformers know recovered checkpoints.
    from transformers import AutoModelForCausalLM

    recovered = AutoModelForCausalLM.from_pretrained(out)
    print(f"{type(recovered).__name__}: {recovered.num_parameters():,} parameters")


if __name__ == "__main__":
    spec = sys.argv[2] if ":" in sys.argv[2] else f"file:{sys.argv[2]}"
    main(sys.argv[1], spec, sys.argv[3])
