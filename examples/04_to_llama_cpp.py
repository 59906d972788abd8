"""Remove two layers, repair the gap so that llama.cpp computes it, write one file for it: MODEL TEXT OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import ghoststream
from ghoststream import Method, Recovery, Text


def main(model: str, text: str, out: str) -> None:
    # llama.cpp multiplies nothing but normed states, so the operators read these.
    method = Method(operator="least-squares", features="normed", token_weights="drop_sinks")
    report = ghoststream.run(
        Recovery(
            model=model,
            remove=2,
            calibration=Text(spec=text, sequences=32, length=64),
            method=method,
            form="gguf",
            gguf_type="q8_0",
        ),
        out,
    )
    print(report.to_text())
    size = (Path(out) / "model.gguf").stat().st_size
    print(f"llama-cli -m {out}/model.gguf    ({size:,} bytes)")


if __name__ == "__main__":
    spec = sys.argv[2] if ":" in sys.argv[2] else f"file:{sys.argv[2]}"
    main(sys.argv[1], spec, sys.argv[3])
