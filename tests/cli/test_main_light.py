"""Commands that look at headers and small files wait for no numerical library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.testing.operators import random_operators
from ghoststream.testing.stores import small_store
from tests.helpers.command_bench import REPOSITORY

pytestmark = pytest.mark.unit

_TORCH = ("torch", "transformers", "zarr", "dask", "distributed")
_ANY = (*_TORCH, "numpy", "scipy", "safetensors")
# The safetensors library checks headers, and brings numpy along.
_HEADERS = (*_TORCH, "scipy")
_REFUSING = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refusing())
from ghoststream.cli import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def places(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("light")
    plan = PruningPlan.parse(6, "1:3")
    row = {"spans": [[1, 3]], "score": 0.5, "chosen": True}
    Selection(plan, "streamline", candidates=(row,)).save(folder / "plan.json")
    random_operators(plan, 32).save(folder / "operators.safetensors")
    (folder / "figures.json").write_text('[{"model": "dense", "perplexity": 40.0}]')
    small_store(folder / "store")
    files = {name: folder / name for name in ("plan.json", "operators.safetensors", "figures.json")}
    return {"model": tiny_llama, "store": folder / "store", **files}


@pytest.mark.parametrize(
    ("command", "refused", "says"),
    [
        ("inspect model", _HEADERS, "checkpoint"),
        ("verify model", _HEADERS, "sound"),
        ("inspect operators.safetensors", _HEADERS, "operators file"),
        ("verify operators.safetensors", _TORCH, "sound"),
        ("inspect store", _TORCH, "4 of h[0..3], 4 complete"),
        ("inspect figures.json", _ANY, "evaluation"),
        ("verify figures.json", _ANY, "sound"),
        ("inspect plan.json", _TORCH, "pruning plan"),
        ("verify plan.json", _TORCH, "sound"),
        ("estimate model --remove 2 --no-measure --device cpu", _TORCH, "it fits"),
        ("estimate model --explore --no-measure --device cpu", _TORCH, "it fits"),
        ("estimate model --remove plan.json --operator ghost --no-measure --device cpu", _TORCH, "it fits"),
        (
            "estimate model --remove 2 --criterion residual --operator ghost --no-measure --device cpu",
            _TORCH,
            "it fits",
        ),
    ],
)
def test_no_library_is_waited_for(
    command: str, refused: tuple[str, ...], says: str, places: dict[str, Path]
) -> None:
    words = [str(places.get(word, word)) for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", _REFUSING, ",".join(refused), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
