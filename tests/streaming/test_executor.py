"""A streamed pass gives what the resident model gives, bit for bit, in fp32 on CPU with the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import (
    Batch,
    BoundaryMap,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    head_products,
    make_batches,
)
from ghoststream.testing.conformance import (
    StateRecorder,
    check_streamed_equals_resident,
    load_resident,
    resident_pass,
    skip_layers,
)
from ghoststream.testing.models import TINY_CONFIGS, save_tiny
from tests.helpers.families import families

pytestmark = pytest.mark.integration
N_LAYERS = 6
# In bfloat16 these stand for their kinds; in float32 every family is compared, bit for bit.
BFLOAT16 = {"bloom", "gemma2", "gpt2", "gpt_oss", "llama", "mixtral", "phi", "qwen3_next"}
# transformers has no SDPA for these.
EAGER_BY_DEFAULT = {"bloom", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mamba2"}


def _tokens(seed: int = 0, *, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 128, size=(5, 20))
    mask = np.ones((5, 20), dtype=bool)
    if padded:
        mask[1, 13:] = False
        mask[4, 7:] = False
        ids[~mask] = 0
    return ids, mask


def _stream(skeleton: Skeleton, batches: tuple[Batch, ...], lanes: list[Lane], options: PassOptions) -> None:
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, lanes, factory, options).run()


@pytest.mark.parametrize("family", families())
def test_hidden_states_and_logits_equal_the_resident_models(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Default attention (SDPA where the family has it) and eager; no padding, right, left; three
    micro-batches."""
    report = check_streamed_equals_resident(tiny_checkpoint(family), attention=(None, "eager"))
    assert report.not_finite == ()
    n_implementations = 1 if family in EAGER_BY_DEFAULT else 2
    assert len(report.compared) == 3 * n_implementations
    assert report.n_tensors == len(report.compared) * 3 * (N_LAYERS + 2)


def test_a_pass_shows_each_position_once_and_in_order(tiny_llama: Path) -> None:
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(N_LAYERS), observers=(recorder,))
    _stream(Skeleton(tiny_llama), make_batches(*_tokens(padded=False), micro_batch=2), [lane], PassOptions())
    assert recorder.finished_positions == list(range(N_LAYERS + 1))


class Linear(BoundaryMap):
    """An operator for tests: ``x + x A``."""

    def __init__(self, seed: int, width: int = 32) -> None:
        self.matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) * 0.1

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        return states + states @ self.matrix


def _resident_repaired(
    folder: Path, skeleton: Skeleton, plan: PruningPlan, maps: dict[Span, Linear], batch: Batch
) -> torch.Tensor:
    """Logits of the resident model with removed layers made identities and operators applied by hooks."""
    model = load_resident(folder)
    skip_layers(model, plan.removed)

    def repair(operator: Linear) -> object:
        def hook(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> object:
            if args:
                return (operator.apply(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": operator.apply(kwargs["hidden_states"])}

        return hook

    norm = model.get_submodule(skeleton.architecture.final_norm_path)
    for span, operator in maps.items():
        layer = f"{skeleton.architecture.layers_path}.{span.stop}"
        target = norm if span.stop == N_LAYERS else model.get_submodule(layer)
        target.register_forward_pre_hook(repair(operator), with_kwargs=True)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return logits.flatten(0, 1)


PLANS = ["2:4", "0:2", "4:6", "1:2 3:5", "0:1 2:3 5:6"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "falcon", "mixtral"])
def test_lanes_of_one_pass_equal_repaired_resident_models(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    skeleton = Skeleton(folder)
    batches = make_batches(*_tokens(padded=True), micro_batch=3)
    recorders, lanes, plans = [], [], []
    for seed, text in enumerate(["", *PLANS, *PLANS]):
        plan = PruningPlan.parse(N_LAYERS, text)
        maps = {span: Linear(10 * seed + span.start) for span in plan.spans} if seed <= len(PLANS) else {}
        recorder = StateRecorder()
        lanes.append(Lane(text, plan, maps, logits=recorder))
        recorders.append(recorder)
        plans.append((plan, maps))
    _stream(skeleton, batches, lanes, PassOptions(logit_tokens=None))
    for (plan, maps), recorder in zip(plans, recorders, strict=True):
        for batch in batches:
            expected = _resident_repaired(folder, skeleton, plan, maps, batch)
            assert torch.equal(recorder.logits[batch.index], expected), plan


def test_weights_are_read_once_whatever_the_number_of_lanes(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    batches = make_batches(*_tokens(padded=False), micro_batch=1)
    counts = []
    for n_lanes in (1, 4):
        skeleton = Skeleton(folder)
        lanes = [
            Lane(str(i), PruningPlan.parse(N_LAYERS, "2:4" if i else ""), logits=StateRecorder())
            for i in range(n_lanes)
        ]
        _stream(skeleton, batches, lanes, PassOptions(logit_tokens=None))
        counts.append(skeleton.reader.bytes_read)
    embedding = skeleton.index.tensors["model.embed_tokens.weight"].n_bytes
    gathered = torch.cat([batch.ids for batch in batches]).unique().numel() * 32 * 4
    assert counts[0] == counts[1] == skeleton.index.n_bytes - embedding + gathered


def test_layers_that_no_lane_runs_are_not_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    batches = make_batches(*_tokens(padded=False), micro_batch=5)
    skeleton = Skeleton(folder)
    _stream(skeleton, batches, [Lane("pruned", PruningPlan.parse(N_LAYERS, "1:4"))], PassOptions())
    without = skeleton.reader.bytes_read
    skeleton = Skeleton(folder)
    _stream(skeleton, batches, [Lane("dense", PruningPlan(N_LAYERS))], PassOptions())
    assert skeleton.reader.bytes_read - without == sum(skeleton.layer_bytes(layer) for layer in (1, 2, 3))


def test_states_in_scratch_files_change_no_bit(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "model", dtype=torch.bfloat16)
    batches = make_batches(*_tokens(padded=True), micro_batch=2)
    results = []
    for budget in (None, 0):
        skeleton = Skeleton(folder)
        recorder = StateRecorder()
        lanes = [
            Lane("dense", PruningPlan(N_LAYERS), observers=(recorder,)),
            Lane("cut", PruningPlan.parse(N_LAYERS, "2:4"), logits=recorder),
        ]
        factory = StatesFactory(
            batches,
            skeleton.hidden_size,
            skeleton.dtype,
            device=skeleton.device,
            host_bytes=budget,
            scratch=tmp_path,
        )
        StreamedPass(skeleton, batches, lanes, factory, PassOptions(logit_tokens=None)).run()
        results.append(recorder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    for key, value in results[0].states.items():
        assert torch.equal(results[1].states[key], value)
    for index, value in results[0].logits.items():
        assert torch.equal(results[1].logits[index], value)


def test_a_pass_started_from_stored_states_ends_with_the_same_bits(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    batches = make_batches(*_tokens(padded=False), micro_batch=2)
    whole, rest = StateRecorder(), StateRecorder()
    plan = PruningPlan(N_LAYERS)
    _stream(Skeleton(folder), batches, [Lane("a", plan, observers=(whole,))], PassOptions())
    options = PassOptions(first_layer=3, initial=lambda batch: whole.states[3, batch.index])
    _stream(Skeleton(folder), batches, [Lane("b", plan, observers=(rest,))], options)
    assert rest.finished_positions == [3, 4, 5, 6]
    for index in range(len(batches)):
        assert torch.equal(rest.states[6, index], whole.states[6, index])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in BFLOAT16 else pytest.mark.soak)
        for family in sorted(TINY_CONFIGS)
    ],
)
def test_bfloat16_pass_is_close_to_the_resident_model(family: str, tmp_path: Path) -> None:
    """The stated tolerance: relative Frobenius error of bf16 logits at most 2**-7 (one bf16 rounding)."""
    folder = save_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    skeleton = Skeleton(folder)
    assert skeleton.dtype == torch.bfloat16
    batches = make_batches(*_tokens(padded=False), micro_batch=2)
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(N_LAYERS), logits=recorder)
    _stream(skeleton, batches, [lane], PassOptions(logit_tokens=None))
    _, logits = resident_pass(load_resident(folder, dtype=torch.bfloat16), batches[0])
    expected = logits.flatten(0, 1).double()
    error = (recorder.logits[0].double() - expected).norm() / expected.norm()
    assert float(error) <= 2**-7


@pytest.mark.parametrize("family", ["gemma2", "llama", "phi"], ids=["tied", "untied", "bias"])
def test_logits_in_chunks_of_tokens_and_blocks_of_the_head_agree_with_whole_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        head_products, "_BLOCK_BYTES", 50 * 32 * 4
    )  # 50 of 128 rows: the last block is smaller
    folder = save_tiny(family, tmp_path / "model")
    batches = make_batches(*_tokens(padded=False), micro_batch=5)

    class Chunks(StateRecorder):
        def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
            assert logits.shape[0] <= 7
            assert first == sum(part.shape[0] for part in self.parts)
            self.parts.append(logits.clone())

        parts: list[torch.Tensor]

    chunked, whole = Chunks(), StateRecorder()
    chunked.parts = []
    _stream(
        Skeleton(folder),
        batches,
        [Lane("a", PruningPlan(N_LAYERS), logits=chunked)],
        PassOptions(logit_tokens=7),
    )
    _stream(
        Skeleton(folder),
        batches,
        [Lane("a", PruningPlan(N_LAYERS), logits=whole)],
        PassOptions(logit_tokens=None),
    )
    torch.testing.assert_close(torch.cat(chunked.parts), whole.logits[0], rtol=1e-5, atol=1e-5)
