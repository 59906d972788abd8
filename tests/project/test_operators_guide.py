"""What docs/operators.md says can be done, done."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ghoststream.operators import operator_names
from ghoststream.options import Method, Source
from ghoststream.stages.fit import fit
from ghoststream.statistics import feature_names, token_weight_names
from ghoststream.testing.states import random_states, store_of

pytestmark = pytest.mark.integration
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"


def test_the_guide_names_what_there_is() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z_+-]+)` \|", text, flags=re.MULTILINE))
    kinds = {name for name in operator_names() if not name.endswith("-for-a-test")}
    features = {"hidden", "normed", "hidden+normed", "mlp", "mlp_output", "hidden+mlp"}
    weights = {"uniform", "drop_sinks", "relative"}
    assert features <= set(feature_names())
    assert weights <= set(token_weight_names())
    assert named - features - weights == kinds - {"mean-gap"}
    assert named >= features | weights


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    names = {"__name__": "guide"}
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(GUIDE), "exec"), names)
    states = random_states(3, (8, 6, 5))
    source = Source(store=store_of(tmp_path / "store", states))
    mean = Method(operator="mean-gap", token_weights="second-half")
    made = fit("1:2", source, method=mean, out=tmp_path / "mean.safetensors")
    x, y = (states[layer][:, 3:].reshape(-1, 5).astype(np.float64) for layer in (1, 2))
    np.testing.assert_allclose(made.boundaries[0].apply(x), x + (y - x).mean(0), rtol=1e-5)
    magnitudes = Method(operator="least-squares", features="magnitudes", ridge=0.0)
    fitted = fit("1:2", source, method=magnitudes, out=tmp_path / "o.safetensors")
    x, y = (states[layer].reshape(-1, 5).astype(np.float64) for layer in (1, 2))
    best = np.linalg.lstsq(np.abs(x), y - x)[0]
    np.testing.assert_allclose(fitted.boundaries[0].apply(x), x + np.abs(x) @ best, rtol=1e-4, atol=1e-5)
