"""Whatever can be refused is refused before any work, and an estimate refuses it in the same words."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ghoststream as gs
from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.errors import GhoststreamError, RequestError, UnsupportedModelError
from ghoststream.options import Recovery
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import Span
from ghoststream.stages.choosing.division import divided
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Skeleton, StreamedPass
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import BAD_REQUEST, LENGTH, Bench, run
from tests.helpers.families import families
from tests.stages.test_one_orchestrator import RECOVER, UNUSED

pytestmark = pytest.mark.integration

_BEGUN = "work was begun"


class _Begun(Exception):
    pass


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass end before it begins."""

    def begin(*_: object) -> None:
        raise _Begun(_BEGUN)

    monkeypatch.setattr(StreamedPass, "run", begin)


_RECOVER: dict[str, Any] = {"model": "m", "remove": 1, "calibration": "c4", "out": "o"}
_CAPTURE: dict[str, Any] = {"calibration": "c4", "store": "s"}


@pytest.mark.parametrize(
    ("call", "given", "said"),
    [
        (gs.recover, _RECOVER | {"model": object()}, "save_pretrained first.* type object"),
        (gs.recover, _RECOVER | {"model": None}, "hub id .* and not by None"),
        (gs.evaluate, {"models": [object()], "text": "c4"}, "save_pretrained first.* type object"),
        (gs.capture, _CAPTURE | {"model": object()}, "save_pretrained first.* type object"),
        (gs.recover, _RECOVER | {"calibration": None}, "'file:PATH', .* and not by None"),
        (gs.recover, _RECOVER | {"calibration": Path("c.txt")}, "and not by PosixPath"),
        (gs.recover, _RECOVER | {"calibration": {"spec": "c4"}}, "and not by dict"),
        (gs.recover, _RECOVER | {"out": None}, r"result \(out\) .* and not by None"),
        (gs.recover, _RECOVER | {"remove": 2.0}, "2.0 says neither how many"),
        (gs.recover, _RECOVER | {"method": "ghost"}, "instance of Method"),
        (gs.export, {"model": "m", "operators": 3, "out": "o"}, "the file of the operators .* type int"),
    ],
)
def test_values_of_the_wrong_type_are_named(
    call: Callable[..., object], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        call(**given)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    return f"ids:{path}"


def _asked(function: Callable[[], Any]) -> str:
    """What a function says: its refusal, or that it began to work."""
    try:
        function()
    except GhoststreamError as error:
        return f"{error.exit_code}: {error}"
    except _Begun:
        pass
    return _BEGUN


def _both(request: dict[str, Any], out: Path, *, measure: bool = False) -> tuple[str, str]:
    """What `recover` and `estimate` say of one request."""
    recovery = Recovery.make(request)
    recovering = _asked(lambda: gs.run(recovery, out))
    return recovering, _asked(lambda: estimate(recovery, out=out, measure=measure))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", [case[len(RECOVER) :] for case in UNUSED if case[0] == "recover"])
def test_an_estimate_refuses_the_options_that_a_recovery_refuses(
    case: tuple[object, ...], bench: Bench, tmp_path: Path
) -> None:
    words = [str(word).format(out=tmp_path / "out") for word in case]
    place = ("--length", LENGTH, "--out", tmp_path / "out")
    recovering = run("recover", bench.model, *words, "--calibration", bench.text, *place)
    pricing = run("estimate", bench.model, *words, *place, "--no-measure", "--device", "cpu")
    assert recovering.exit_code == pricing.exit_code == BAD_REQUEST
    assert pricing.stderr == recovering.stderr
    assert "fits" not in pricing.stdout


#: Values of options, good ones and bad ones, that a random request takes some of.
_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "search": {
        "criterion": ("measured", "sleb", "taylor-plus", "perplexity", "streamline", "residual", "luck"),
        "max_spans": (1, 3),
        "held_out": (2, 12, 40),
        "beam": (2,),
        "lanes": (3,),
        "folds": (0, 3),
    },
    "method": {
        "operator": ("auto", "ghost", "least-squares", "linear-patch-diagonal", "replace-me-ls", "magic"),
        "features": ("normed", "mlp", "hidden+mlp", "wavelets"),
        "ridge": (1e-3, "gcv"),
        "intercept": (True,),
        "rank": (3,),
        "solver": ("svd", "sketch-features"),
        "per_layer": (True,),
        "inputs": ("dense",),
        "token_weights": ("drop_sinks", "heavy"),
    },
    "storage": {"layers": ((0, 1), (0, 9), tuple(range(7))), "store_dtype": ("bfloat16",)},
    "reduction": {"workers": (2,)},
    "compute": {"micro_batch": (3, 16), "device": ("cpu",)},
}
_REMOVE = (1, 2, 3, 4, 5, 6, 9, "1:3", "0:2", "2:4 5:6", "4:9", "0:6")


def _requests(seed: int, count: int, model: Path, text: str) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        request: dict[str, Any] = {
            "model": str(model),
            "remove": draw.choice(_REMOVE),
            "calibration": {"spec": text, "sequences": 12, "length": LENGTH},
        }
        for _ in range(draw.randrange(4)):
            group = draw.choice([*_VALUES])
            name = draw.choice([*_VALUES[group]])
            request.setdefault(group, {})[name] = draw.choice(_VALUES[group][name])
        found.append(request)
    return found


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("seed", "count"), [(0, 60), *(pytest.param(seed, 400, marks=pytest.mark.soak) for seed in (1, 2, 3))]
)
def test_a_recovery_begins_exactly_where_an_estimate_is_given(
    seed: int, count: int, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    said = []
    for number, request in enumerate(_requests(seed, count, tiny_llama, ids)):
        recovering, pricing = _both(request, tmp_path / str(number))
        assert pricing == recovering, request
        said.append(recovering)
    assert 0.1 < said.count(_BEGUN) / count < 0.9


@pytest.mark.usefixtures("no_work")
def test_a_family_that_cannot_be_written_is_refused_at_once(ids: str, tmp_path: Path) -> None:
    gpt2 = save_tiny("gpt2", tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    text = {"spec": ids, "sequences": 12, "length": LENGTH}
    for remove in (1, "2:4"):
        request = {"model": str(gpt2), "remove": remove, "calibration": text}
        recovering, pricing = _both(request, tmp_path / "out")
        assert pricing == recovering
        assert "gpt2 with scale_attn_by_inverse_layer_idx=True cannot be pruned" in recovering
    source = gs.Source(model=gpt2, calibration=gs.Text(spec=ids, length=LENGTH))
    for work in (
        lambda: gs.select(1, source, out=tmp_path / "plan.json"),
        lambda: gs.fit("2:4", source, out=tmp_path / "operators.safetensors"),
    ):
        with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx=True"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_what_only_building_the_model_shows_is_refused_with_a_measured_estimate(
    tiny_llama: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        msg = "layer 3 would become layer 1"
        raise UnsupportedModelError(msg)

    monkeypatch.setattr("ghoststream.recovery.job.check_pruned_model", cannot)
    request = {
        "model": str(tiny_llama),
        "remove": "1:3",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
    }
    recovering, pricing = _both(request, tmp_path / "out", measure=True)
    assert pricing == recovering == "2: layer 3 would become layer 1"


@pytest.mark.usefixtures("no_work")
def test_a_place_that_is_taken_is_refused_by_both(bench: Bench, ids: str, tmp_path: Path) -> None:
    request = {
        "model": str(bench.model),
        "remove": "2:4",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
    }
    file = tmp_path / "file"
    file.write_text("mine")
    for place, says in (
        (file, "is a file"),
        (file / "below", "is a file"),
        (bench.full_folder, "is not empty"),
        (bench.model, "is not empty"),
        (bench.recovered, "recovered checkpoint of another request"),
    ):
        recovering, pricing = _both(request, place)
        assert pricing == recovering
        assert says in recovering


@pytest.mark.usefixtures("no_work")
def test_texts_are_read_before_the_first_pass(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    text = {"spec": ids, "sequences": 12, "length": LENGTH}
    request = {"model": str(tiny_llama), "remove": 1, "calibration": text}
    for evaluate, says in (
        ({"spec": f"ids:{tmp_path / 'nothing.npy'}"}, "nothing.npy"),
        ({"spec": f"file:{tmp_path / 'nothing.txt'}"}, "nothing.txt|tokenizer"),
        ({"spec": ids, "sequences": 13, "length": LENGTH}, "13 were asked for"),
    ):
        with pytest.raises(GhoststreamError, match=says):
            gs.run(Recovery.make({**request, "evaluate": evaluate}), tmp_path / "out")
    # Layers are chosen from a store, and then repairs are measured: there is nothing to hold out.
    few = {"criterion": "streamline", "held_out": 12}
    with pytest.raises(RequestError, match="cannot be parted"):
        gs.run(Recovery.make({**request, "search": few}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_would_lack_states_is_refused(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    request = {
        "model": str(tiny_llama),
        "remove": "2:4",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
        "method": {"operator": "ghost"},
        "storage": {"layers": (0, 2, 3)},
    }
    recovering, pricing = _both(request, tmp_path / "out")
    assert pricing == recovering
    assert recovering == "2: --layers leaves h[4] out, and the fit reads it; give --layers 2,4"
    by_criterion = {**request, "remove": 2, "search": {"criterion": "streamline"}}
    assert "leave --layers out" in _both(by_criterion, tmp_path / "out")[0]


@pytest.mark.parametrize("model_type", families())
def test_headers_say_what_the_model_says(model_type: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    root = tiny_checkpoint(model_type)
    sizes, skeleton = read_sizes(root), Skeleton(root)
    for constant in (False, True):
        for layer, end in enumerate(sizes.mlp_ends):
            refused = bool(end.refusal) or (constant and not end.has_bias)
            asked = functools.partial(
                require_absorbable, skeleton, Span(layer + 1, layer + 2), "mlp", constant=constant
            )
            assert refused == _refuses(asked)
    assert sizes.norm_names_epsilon == (ModelSession(root).norm_epsilon is not None)


def _refuses(function: Callable[[], Any]) -> bool:
    try:
        function()
    except UnsupportedModelError:
        return True
    return False


@pytest.mark.usefixtures("no_work")
def test_normed_features_need_a_norm_that_names_its_epsilon(
    tiny_checkpoint: Callable[[str], Path], ids: str, tmp_path: Path
) -> None:
    request = {
        "model": str(tiny_checkpoint("olmo")),
        "remove": "2:4",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
        "method": {"operator": "least-squares", "features": "normed"},
    }
    recovering, pricing = _both(request, tmp_path / "out")
    assert pricing == recovering
    assert "does not say which epsilon" in recovering


@pytest.mark.usefixtures("no_work")
def test_code_of_its_own_is_refused_where_it_would_run(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps(config))
    request = {
        "model": str(model),
        "remove": "2:4",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
    }
    assert _both(request, tmp_path / "out") == (_BEGUN, _BEGUN)
    trusted = {**request, "compute": {"trust_remote_code": True}}
    recovering, pricing = _both(trusted, tmp_path / "other")
    assert pricing == recovering
    assert "runs code of its own" in recovering


@pytest.mark.parametrize(
    ("sequences", "held_out", "micro_batch", "says", "cure"),
    [
        (16, 16, None, "16 sequences cannot .* and 16 to measure on; give a smaller --h", (16, 8, None)),
        (16, 1, 16, "16 sequences in .* of 16 cannot .* give a smaller --micro-batch, or more", (16, 1, 8)),
        (16, 12, 8, "give a smaller --held-out, or a smaller --micro-batch, or more --seq", (16, 8, 8)),
        (8, None, 8, "8 sequences in .* of 8 cannot .* give a smaller --micro-batch, or more", (11, None, 8)),
        (3, None, None, "3 sequences cannot .* a quarter to measure on; give at least 4 --seq", (4, None, 1)),
        (1, None, None, "1 sequence cannot be parted", (4, None, None)),
        (1, 1, None, "1 sequence cannot .* and 1 to measure on; give more --sequences$", (2, 1, None)),
    ],
)
def test_what_cannot_be_parted_is_told_what_can(
    sequences: int,
    held_out: int | None,
    micro_batch: int | None,
    says: str,
    cure: tuple[int, int | None, int | None],
) -> None:
    with pytest.raises(RequestError, match=says):
        divided(sequences, held_out, micro_batch, lambda: 64)
    _, n_fit = divided(*cure, lambda: 64)
    assert 0 < n_fit < cure[0]
