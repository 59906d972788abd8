"""Capture: the store holds the resident model's hidden states, whatever was killed or resumed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.activations import ActivationStore, verify_store, writing_threads
from ghoststream.errors import (
    BudgetError,
    InputNotFoundError,
    MismatchError,
    NumericsError,
    RequestError,
    TextError,
    UnsupportedModelError,
)
from ghoststream.options import Text
from ghoststream.stages.capturing.capture import capture
from ghoststream.streaming import Batch, HiddenStates, Skeleton, StatesFactory, StreamedPass
from ghoststream.testing.models import save_tiny, tiny_model
from tests.helpers.groups import capture_arguments

pytestmark = pytest.mark.integration
S, T, L = 7, 16, 6


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return path


def _capture(model: Path, ids: Path, store: Path, **options: Any) -> ActivationStore:
    settings = {"sequences": S, "length": T, "micro_batch": 2, **options}
    return capture(model, store=store, **capture_arguments(f"ids:{ids}", settings))


def _resident_states(folder: Path, ids: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """``h[0..L]`` of an ordinary forward with the same micro-batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    seen: list[list[torch.Tensor]] = [[] for _ in range(L + 1)]
    modules = [*model.model.layers, model.model.norm]
    for place, module in zip(seen, modules, strict=True):
        module.register_forward_pre_hook(lambda _m, args, place=place: place.append(args[0].clone()))
    tokens = torch.from_numpy(np.load(ids))
    with torch.inference_mode():
        for start in range(0, S, 2):
            model(input_ids=tokens[start : start + 2], use_cache=False)
    return [torch.cat(parts) for parts in seen]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"run.json", ".lock"}
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_store_holds_the_resident_models_states(dtype: torch.dtype, tmp_path: Path, ids_file: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", dtype=dtype)
    store = _capture(folder, ids_file, tmp_path / "store")
    assert store.complete
    assert store.dtype == dtype
    for layer, expected in enumerate(_resident_states(folder, ids_file, dtype)):
        assert torch.equal(store.read(layer, 0, S), expected), layer
    assert np.array_equal(store.tokens().ids, np.load(ids_file))
    assert verify_store(str(tmp_path / "store")) == []


def test_states_in_scratch_files_give_the_same_store(
    tmp_path: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _capture(folder, ids_file, tmp_path / "a")
    # Two layers, the work on a micro-batch of 2, a shard that is filled and one for each thread that writes:
    # no room for states. A chunk has one sequence and a checksum; the index is of all and has one too.
    unit, width = Skeleton(folder).unit_bytes, 32 * 4
    work = max(unit // 2, 2 * T * (4 * 64 + 8 * 32) * 4)
    shard = S * (T * width + 4) + S * 16 + 4
    least = 2 * unit + work + (1 + writing_threads()) * shard
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(BudgetError, match=r"two layers .*; use a smaller micro-batch"):
        _capture(folder, ids_file, tmp_path / "b", host_memory=least - 1, scratch=scratch)
    in_memory: list[bool] = []
    made = StatesFactory.make

    def make(factory: StatesFactory, batches: Sequence[Batch] | None = None) -> HiddenStates:
        place = made(factory, batches)
        in_memory.append(place.is_on(torch.device("cpu")))
        return place

    monkeypatch.setattr(StatesFactory, "make", make)
    _capture(folder, ids_file, tmp_path / "b", host_memory=least, scratch=scratch)
    assert in_memory
    assert not any(in_memory)
    assert not list(scratch.iterdir())
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


@pytest.mark.parametrize(
    "options",
    [{}, {"store_dtype": "bfloat16"}, {"layers": (1, 5)}, {"layers": (2, 5), "store_dtype": "int8"}],
    ids=["all", "narrower", "some", "some-narrower"],
)
@pytest.mark.parametrize("broken_at", [3, *(pytest.param(layer, marks=pytest.mark.soak) for layer in (1, 4))])
def test_interrupted_capture_continues_to_identical_files(
    broken_at: int, options: dict[str, Any], tmp_path: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _capture(folder, ids_file, tmp_path / "whole", **options)
    original = StreamedPass._through_layer
    run: list[int] = []

    def failing(self: StreamedPass, layer: int, *args: Any) -> None:
        run.append(layer)
        if layer == broken_at and not failed:
            failed.append(layer)
            raise KeyboardInterrupt
        original(self, layer, *args)

    failed: list[int] = []
    monkeypatch.setattr(StreamedPass, "_through_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        _capture(folder, ids_file, tmp_path / "resumed", **options)
    run.clear()
    store = _capture(folder, ids_file, tmp_path / "resumed", **options)
    assert run[0] == broken_at, "only the layer that was interrupted is repeated"
    assert store.complete
    assert _files(tmp_path / "whole") == _files(tmp_path / "resumed")


def test_a_complete_store_is_not_captured_again(
    tmp_path: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _capture(folder, ids_file, tmp_path / "store")
    monkeypatch.delattr(StreamedPass, "run")
    assert _capture(folder, ids_file, tmp_path / "store").complete


def test_a_store_of_another_model_is_refused(tmp_path: Path, ids_file: Path) -> None:
    _capture(save_tiny("llama", tmp_path / "a"), ids_file, tmp_path / "store")
    before = _files(tmp_path / "store")
    other = save_tiny("llama", tmp_path / "b", intermediate_size=48)
    with pytest.raises(MismatchError, match="model_digest"):
        _capture(other, ids_file, tmp_path / "store")
    assert _files(tmp_path / "store") == before


def test_a_store_of_other_tokens_is_refused(tmp_path: Path, ids_file: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _capture(folder, ids_file, tmp_path / "store")
    np.save(ids_file, (np.load(ids_file) + 1) % 128)
    with pytest.raises(MismatchError, match="tokens_digest"):
        _capture(folder, ids_file, tmp_path / "store")


def test_states_that_are_not_finite_end_the_capture(tmp_path: Path, ids_file: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)  # finite, and the product is not
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"position 3 of sequences \[0,2\)"):
        _capture(tmp_path / "model", ids_file, tmp_path / "store")
    assert ActivationStore.open(str(tmp_path / "store")).completed_layers() == (0, 1, 2)


def test_bad_requests_are_refused_before_any_work(tmp_path: Path, ids_file: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for error, match, options in (
        (RequestError, r"h\[0\] to h\[6\]", {"layers": (7,)}),
        (RequestError, "dtype: Input should be", {"dtype": "int8"}),
        (RequestError, "unknown device", {"device": "abacus"}),
        (TextError, "7 sequences", {"sequences": S + 1}),
        (TextError, "1000", {"length": 1000}),
    ):
        with pytest.raises(error, match=match):
            _capture(folder, ids_file, tmp_path / "store", **options)
        assert not (tmp_path / "store").exists()
    with pytest.raises(InputNotFoundError, match="no model folder"):
        _capture(tmp_path / "nowhere" / "else" / "x", ids_file, tmp_path / "store")
    text = Text(spec="python-docs", sequences=1, length=8)
    with pytest.raises(InputNotFoundError, match="has no tokenizer"):
        capture(folder, calibration=text, store=tmp_path / "store")


def test_unknown_architectures_are_refused_by_name(tmp_path: Path, ids_file: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=128, hidden_size=16, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        _capture(tmp_path / "model", ids_file, tmp_path / "store")
