"""Shards are read a few at a time: a model may have more of them than a process may open."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import CheckpointIndex, TensorReader
from ghoststream.checkpoint.header import read_header
from ghoststream.checkpoint.open_files import OpenFiles
from ghoststream.errors import RequestError
from tests.helpers.command_bench import LENGTH, run

pytestmark = pytest.mark.unit
N_SHARDS = 40


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 40 shards of one tensor each, with an index."""
    folder = tmp_path_factory.mktemp("shards")
    names = {f"tensor.{number}": f"model-{number:05}.safetensors" for number in range(N_SHARDS)}
    for number, (name, shard) in enumerate(names.items()):
        save_file({name: torch.full((64, 33), number, dtype=torch.float32)}, folder / shard)
    pairs = ",".join(f'"{name}": "{shard}"' for name, shard in names.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{pairs}}}}}')
    return folder


def open_shards(folder: Path) -> int:
    """Return how many descriptors of this process are of files in a folder."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += entry.readlink().parent == folder
        except FileNotFoundError:
            continue
    return found


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Allow this process so many descriptors more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    # The limit is one of numbers, and tests before this one may have left gaps among them.
    free = (number for number in itertools.count() if number not in used)
    last = next(itertools.islice(free, more - 1, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_of_finished_layers_are_closed(many_shards: Path) -> None:
    with TensorReader(CheckpointIndex.open(many_shards)) as reader:
        for _ in range(2):
            for name in reader.index.tensors:
                expected = load_file(many_shards / reader.entry(name).shard)[name]
                assert torch.equal(reader.read(name), expected)
                assert open_shards(many_shards) <= 8
    assert open_shards(many_shards) == 0


def test_more_shards_than_descriptors_are_read_by_several_threads(many_shards: Path) -> None:
    with TensorReader(CheckpointIndex.open(many_shards)) as reader:
        names = [*reader.index.tensors] * 10
        np.random.default_rng(0).shuffle(names)
        with ThreadPoolExecutor(4) as threads, few_descriptors(6):
            for name, tensor in zip(names, threads.map(reader.read, names), strict=True):
                assert torch.equal(tensor, torch.full((64, 33), float(name.split(".")[1])))


def test_rows_outlive_the_descriptor_of_their_shard(many_shards: Path) -> None:
    with TensorReader(CheckpointIndex.open(many_shards)) as reader:
        first = reader.rows("tensor.0", torch.tensor([0, 5]))
        for name in reader.index.tensors:
            reader.read(name)
        again = reader.rows("tensor.0", torch.tensor([0, 5]))
    assert torch.equal(first, torch.zeros(2, 33))
    assert torch.equal(again, first)


def test_a_descriptor_in_use_is_not_closed(many_shards: Path) -> None:
    files = OpenFiles(most=1)
    shards = sorted(many_shards.glob("*.safetensors"))
    with files.opened(shards[0]) as descriptor:
        for shard in shards[1:4]:
            with files.opened(shard):
                pass
        files.close()
        assert os.fstat(descriptor).st_size == shards[0].stat().st_size
    files.close()
    assert open_shards(many_shards) == 0


@pytest.mark.integration
def test_a_model_of_more_shards_than_descriptors_is_evaluated(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "generation_config.json"):
        (model / name).write_bytes((tiny_llama / name).read_bytes())
    tensors = {k: v for shard in tiny_llama.glob("*.safetensors") for k, v in load_file(shard).items()}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, model / f"model-{number:05}.safetensors", metadata={"format": "pt"})
    pairs = ",".join(f'"{name}": "model-{number:05}.safetensors"' for number, name in enumerate(tensors))
    (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{pairs}}}}}')
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(4, 128, (4, LENGTH)))
    options = ("--text", f"ids:{tmp_path / 'ids.npy'}", "--length", LENGTH)
    with few_descriptors(30):
        assert len(tensors) > 40
        result = run("evaluate", model, *options)
    assert result.exit_code == 0, result.stderr
    whole = run("evaluate", tiny_llama, *options)
    assert result.stdout.split()[-4:] == whole.stdout.split()[-4:]


def test_a_shard_that_may_not_be_read_is_not_called_missing(
    many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, flags: int, *rest: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RequestError, match=r"cannot read .*model-00000.*\(Permission denied\)"):
        read_header(many_shards / "model-00000.safetensors")
