"""Every file that a command reads, damaged: exit 0, 2 or 3 with a line that says what to do, and no hang.

No damage of a file that ghoststream wrote changes a result: it is found, or the result is the sound file's.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from ghoststream.files import file_digest
from tests.helpers.command_bench import LENGTH, Bench, digests, succeed
from tests.helpers.forking import InProcess, Outcome, Server, fork_server
from tests.helpers.mutations import damaged, same_data

pytestmark = pytest.mark.integration
CASES = int(os.environ.get("GHOSTSTREAM_DAMAGED_INPUTS", "5000"))
SEED = int(os.environ.get("GHOSTSTREAM_SEED", "0"))
Result = tuple[int | None, str, str]
"""How a command ended, what it printed, and the digests of what it wrote."""
OURS = ("recovered/*", "store/*", "made/*", "plans/chosen.json", "reports/figures.json")
"""What ghoststream wrote for itself to read. The other files are the user's, who may change them."""


@dataclass(frozen=True)
class Reading:
    """A command that reads some files: a folder of the bench, those of its files, and the arguments."""

    folder: str
    files: str
    arguments: tuple[str, ...]


TEXT = ("--length", str(LENGTH), "--sequences", "2")
MORE_TEXT = ("--length", str(LENGTH), "--sequences", "8")
READINGS = (
    Reading("model", "*", ("evaluate", "{place}", "--text", "file:{bench}/text.txt", *TEXT)),
    Reading("model", "*.json", ("evaluate", "{place}", "--text", "file:{bench}/text.txt", *TEXT)),
    Reading("model", "*", ("estimate", "{place}", "--remove", "2", "--no-measure", *MORE_TEXT)),
    Reading("model", "*", ("inspect", "{place}")),
    Reading("model", "*", ("verify", "{place}")),
    Reading("model", "*", ("export", "{place}", "--operators", "{bench}/operators", "--out", "{out}")),
    Reading("recovered", "*", ("evaluate", "{place}", "--text", "ids:{bench}/texts/ids.npy", *TEXT)),
    Reading("recovered", "*", ("inspect", "{place}")),
    Reading("recovered", "*", ("verify", "{place}")),
    Reading("texts", "ids.npy", ("evaluate", "{bench}/model", "--text", "ids:{file}", *TEXT)),
    Reading("texts", "*.txt", ("evaluate", "{bench}/model", "--text", "file:{file}", *TEXT)),
    Reading("texts", "*.jsonl", ("evaluate", "{bench}/model", "--text", "file:{file}", *TEXT)),
    Reading("texts", "*.gz", ("evaluate", "{bench}/model", "--text", "file:{file}", *TEXT)),
    Reading("plans", "*.json", ("fit", "--store", "{bench}/store", "--plan", "{file}", "--out", "{out}")),
    Reading("plans", "*.json", ("inspect", "{file}")),
    Reading("plans", "*.json", ("verify", "{file}")),
    Reading("made", "*.safetensors", ("export", "{bench}/model", "--operators", "{file}", "--out", "{out}")),
    Reading("made", "*.safetensors", ("inspect", "{file}")),
    Reading("made", "*.safetensors", ("verify", "{file}")),
    Reading("reports", "*.json", ("inspect", "{file}")),
    Reading("reports", "*.json", ("verify", "{file}")),
    Reading("store", "*", ("fit", "--store", "{place}", "--plan", "1:3", "--out", "{out}")),
    Reading("store", "*", ("select", "--store", "{place}", "--remove", "2", "--out", "{out}")),
    Reading("store", "*", ("inspect", "{place}")),
    Reading("store", "*", ("verify", "{place}")),
    Reading("pipelines", "*.yaml", ("run", "{file}", "--out", "{out}")),
)


@pytest.fixture(scope="module")
def everything(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of all that commands read."""
    root = tmp_path_factory.mktemp("everything")
    for name in ("model", "recovered", "store"):
        shutil.copytree(bench.root / name, root / name)
    for name in ("texts", "plans", "made", "reports", "pipelines"):
        (root / name).mkdir()
    shutil.copy(bench.text.removeprefix("file:"), root / "text.txt")
    shutil.copy(bench.operators, root / "operators")
    shutil.copy(bench.operators, root / "made" / "operators.safetensors")
    shutil.copy(root / "text.txt", root / "texts" / "a.txt")
    rows = [{"text": "some words of a line " * 9}, {"text": "others " * 20, "id": 3}]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (root / "texts" / "a.jsonl").write_text(lines)

    (root / "texts" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    np.save(root / "texts" / "ids.npy", np.random.default_rng(0).integers(4, 100, (4, LENGTH)))
    (root / "plans" / "mine.json").write_text('{"n_layers": 6, "spans": [[1, 3]]}')
    succeed("select", "--store", root / "store", "--remove", 2, "--out", root / "plans" / "chosen.json")
    text = ("--text", f"ids:{root / 'texts' / 'ids.npy'}", "--length", LENGTH)
    succeed("evaluate", root / "model", *text, "--out", root / "reports" / "figures.json")
    estimated = succeed(
        "estimate", root / "model", "--remove", 2, "--no-measure", "--json", "--length", LENGTH
    )
    (root / "reports" / "estimate.json").write_text(estimated.stdout)
    (root / "pipelines" / "small.yaml").write_text(
        f"model: {root / 'model'}\nremove: 2\ncalibration:\n  spec: ids:{root / 'texts' / 'ids.npy'}\n"
        f"  sequences: 4\n  length: {LENGTH}\nsearch:\n  criterion: reverse\nmethod:\n  operator: diagonal\n"
        "compute:\n  micro_batch: 2\nstorage:\n  layers: 0:7\n"
    )
    return root


@pytest.fixture(scope="module")
def bed(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with fork_server() as server:
        yield Bed(everything, tmp_path_factory.mktemp("bed") / "case", server)


def copied(source: Path, target: Path) -> Path:
    """Copy a folder by hard links; what is damaged is replaced there and not written into."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def replace_by_another_kind(file: Path, rng: np.random.Generator) -> None:
    """Put in the place of a file what is none: a pipe, a folder, a device, a link to nothing or to itself."""
    match int(rng.integers(5)):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to("/dev/zero")
        case 3:
            file.symlink_to("nothing")
        case _:
            file.symlink_to(file.name)


@dataclass
class Bed:
    """Where files are damaged and commands read them.

    Attributes:
        everything: All that commands read, undamaged.
        place: A folder for one case.
        server: Runs commands.
        sound: What commands print and write where nothing is damaged, by reading and file.
    """

    everything: Path
    place: Path
    server: Server
    sound: dict[tuple[Reading, str], Result] = field(default_factory=dict)

    def try_one(self, case: int) -> str:
        """Damage a file as the number of a case says, run what reads it, and return what is wrong."""
        rng = np.random.default_rng((SEED, case))
        reading = READINGS[case % len(READINGS)]
        copy = self._copy(reading)
        files = [path for path in sorted(copy.rglob(reading.files)) if path.is_file()]
        file = files[int(rng.integers(len(files)))]
        sound = file.read_bytes()
        data = damaged(file, rng)
        file.unlink()
        if rng.random() < 0.1:
            replace_by_another_kind(file, rng)
        else:
            file.write_bytes(data)
        outcome = self._run(reading, file)
        complaint = outcome.complaint
        if outcome.exit_code == 0 and is_ours(reading, file, copy):
            unchanged = file.is_file() and same_data(file, sound)
            complaint = self._silence(reading, file, outcome, unchanged=unchanged)
        if not complaint:
            return ""
        if keep := os.environ.get("GHOSTSTREAM_KEEP"):
            (Path(keep) / f"{case}").write_bytes(data)
        arguments = " ".join(self._arguments(reading, file))
        where = file.relative_to(copy)
        return f"case {case}: {arguments} with {where}: {complaint}: {outcome.stderr[-1500:]}"

    def _silence(self, reading: Reading, file: Path, outcome: Outcome, *, unchanged: bool) -> str:
        """Say what is wrong with a command that went on with a damaged file of ours."""
        if reading.arguments[0] == "verify" and not unchanged:
            return "silent: called sound"
        found, key = self._result(outcome), (reading, file.name)
        if key not in self.sound:
            self._copy(reading)
            self.sound[key] = self._result(self._run(reading, file))
        if found == self.sound[key]:
            return ""
        other = [str(line) for line in set(found).symmetric_difference(self.sound[key])]
        return f"silent: another result, {' or '.join(other)[:6000]}"

    def _copy(self, reading: Reading) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        return copied(self.everything / reading.folder, self.place / "in")

    def _run(self, reading: Reading, file: Path) -> Outcome:
        return self.server.run(*self._arguments(reading, file))

    def _arguments(self, reading: Reading, file: Path) -> tuple[str, ...]:
        names = {"place": self.place / "in", "file": file, "bench": self.everything, "out": self._out}
        return tuple(argument.format(**names) for argument in reading.arguments)

    def _result(self, outcome: Outcome) -> Result:
        out = self._out
        written = json.dumps(digests(out)) if out.is_dir() else file_digest(out) if out.is_file() else ""
        return outcome.exit_code, outcome.stdout, written

    @property
    def _out(self) -> Path:
        return self.place / "out.json"


def is_ours(reading: Reading, file: Path, copy: Path) -> bool:
    """Whether ghoststream wrote a file for itself to read."""
    name = f"{reading.folder}/{file.relative_to(copy)}"
    return any(fnmatch(name, pattern) for pattern in OURS)


def test_a_sample_of_damaged_inputs(everything: Path, tmp_path: Path) -> None:
    bed = Bed(everything, tmp_path / "case", InProcess())
    found = [bed.try_one(case) for case in range(len(READINGS))]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_damaged_inputs(part: int, bed: Bed) -> None:
    found = [bed.try_one(case) for case in range(part, CASES, 10)]
    assert not any(found), "\n".join(filter(None, found))
