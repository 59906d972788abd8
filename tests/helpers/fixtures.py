"""Fixtures of several rooms that are expensive to make. Each is made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ghoststream.stages.export import export
from tests.helpers.command_bench import Bench, digests, last_line, make_bench, run
from tests.helpers.families import families_of
from tests.helpers.forking import ForkServer, fork_server
from tests.helpers.recovered_models import examine, make_operators


@pytest.fixture(scope="session")
def warm() -> Iterator[ForkServer]:
    """A process that has imported everything and forks: what a process of its own would take seconds for."""
    with fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """What commands are given: models, stores, operators, plans. Do not write into it."""
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def refused(bench: Bench, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run a command that must fail as it should, and hold everything that exists against it."""
    before = digests(bench.root)

    def check(*arguments: object, code: int, says: str | tuple[str, ...]) -> str:
        there = digests(tmp_path)
        result = run(*arguments)
        line = last_line(result.stderr)
        assert result.exit_code == code, result.stderr
        for part in (says,) if isinstance(says, str) else says:
            assert part in line
        after = digests(tmp_path)
        assert {path: after.get(path) for path in there} == there, "something that existed was changed"
        return line

    yield check
    assert digests(bench.root) == before


@pytest.fixture(scope="session")
def exported_family(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Folder of a recovered model of a family, exported when first asked for. Do not write into it."""
    root = tmp_path_factory.mktemp("recovered")

    def make(model_type: str) -> Path:
        folder = root / model_type
        if not folder.exists():
            export(tiny_checkpoint(model_type), make_operators(), folder, max_shard_bytes=40_000)
        return folder

    return make


@pytest.fixture(scope="session")
def exported(request: pytest.FixtureRequest, exported_family: Callable[[str], Path]) -> dict[str, Path]:
    """Every family exported with the same operators: ``{model_type: folder}``."""
    return {model_type: exported_family(model_type) for model_type in families_of(request.session.items)}


@pytest.fixture(scope="session")
def examined(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a clean process found out about every folder; tensors are in ``FOLDER.out.safetensors``."""
    return examine(list(exported.values()), tmp_path_factory.mktemp("home"))
