"""Commands run in this process, and a bench of models, stores, plans and results to give them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
LENGTH = 16
BAD_REQUEST, BROKEN_DATA = 2, 3


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def digests(folder: Path) -> dict[str, str]:
    """Digest every file under a folder, locks and temporary names left out."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", ".partial"))
    }


@dataclass(frozen=True)
class Bench:
    """What commands are given: made once, and never changed by a command that fails."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        root: Path = object.__getattribute__(self, "root")
        return root / name

    @property
    def text(self) -> str:
        return f"file:{self.root / 'text.txt'}"

    @property
    def capture(self) -> tuple[object, ...]:
        """Options of the capture that made the store."""
        return ("--calibration", self.text, "--sequences", 8, "--length", LENGTH)


def text_of(n_characters: int) -> str:
    letters = np.random.default_rng(0).integers(97, 123, size=n_characters)
    return "".join(map(chr, letters))


def save_model(folder: Path, **options: Any) -> Path:
    save_tiny("llama", folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_bench(root: Path) -> Bench:
    """Make what the commands are given, in an empty folder."""
    bench = Bench(root)
    (root / "text.txt").write_text(text_of(40 * LENGTH))
    (root / "short.txt").write_text("too short")
    save_model(bench.model)
    save_model(bench.other, seed=1, intermediate_size=48)
    save_model(bench.wider, hidden_size=64)
    save_model(bench.deeper, num_hidden_layers=8)
    succeed("capture", bench.model, *bench.capture, "--store", bench.store)
    succeed("capture", bench.model, *bench.capture, "--store", bench.some_store, "--layers", "1,3")
    succeed("fit", "--store", bench.store, "--plan", "1:3", "--out", bench.operators)
    succeed("export", bench.model, "--operators", bench.operators, "--out", bench.recovered)
    (root / "full_folder").mkdir()
    (root / "full_folder" / "mine.txt").write_text("do not lose me")
    (root / "mine.json").write_text('{"mine": true}')
    plans = {
        "past_the_end": {"n_layers": 6, "spans": [[4, 9]]},
        "of_another": {"n_layers": 8, "spans": [[1, 3]]},
        "of_all": {"n_layers": 6, "spans": [[0, 6]]},
        "of_none": {"n_layers": 6, "spans": []},
        "malformed": {"n_layers": 6, "spans": [["a", 2]]},
    }
    for name, plan in plans.items():
        (root / f"plan_{name}").write_text(json.dumps(plan))
    return bench


def last_line(stderr: str) -> str:
    """Return the one line of the error; before it only progress may stand."""
    *progress, line = stderr.splitlines()
    assert line.startswith("error: "), stderr
    assert not line.startswith("error: unexpected "), line
    assert "Traceback" not in stderr, stderr
    assert not any(text.startswith("error") for text in progress), stderr
    if path := os.environ.get("GHOSTSTREAM_TEST_MESSAGES"):
        with Path(path).open("a") as file:
            print(
                os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0], line, sep="\n    ", file=file
            )
    return line


def copy_of(bench: Bench, tmp_path: Path) -> Path:
    shutil.copytree(bench.model, tmp_path / "model")
    return tmp_path / "model"


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
