"""What docs/selection.md says can be done, done."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ghoststream.options import Search, Source
from ghoststream.selection import criterion_names
from ghoststream.stages.choosing.criteria import search_criterion_names
from ghoststream.stages.select import select
from ghoststream.testing.states import random_states, store_of

pytestmark = pytest.mark.integration
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "selection.md"


def test_the_guide_names_every_criterion_with_its_source() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    first, costs = text.split("## What they cost")
    known = {name for name in criterion_names() if "for-a-test" not in name}
    running = {name for name in search_criterion_names() if "for-a-test" not in name}
    row = re.compile(r"^\| `([a-z][a-z0-9-]*)` \|", flags=re.MULTILINE)
    assert sorted(row.findall(first)) == sorted(known)
    assert running <= set(row.findall(costs))
    in_costs = set(re.findall(r"`([a-z0-9-]+)`", " ".join(re.findall(r"^\|.*", costs, flags=re.MULTILINE))))
    assert known - in_costs <= {"magnitude-plus", "magnitude-l2", "reverse", "reverse-last"}


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = random_states(8, (4, 6, 5))
    store_of(tmp_path / "llama.store", states)
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})
    result = select(2, Source(store="llama.store"), search=Search(criterion="middle-influence"))
    influence = []
    for layer in range(2, 6):
        x, y = states[layer].astype(np.float64), states[layer + 1].astype(np.float64)
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        influence.append(1 - cosines.mean())
    np.testing.assert_allclose([score for _, score in result.scores], influence, atol=1e-13)
    assert set(result.plan.removed) == {2 + int(place) for place in np.argsort(influence)[:2]}
