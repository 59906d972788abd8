"""The way back, layer by layer, against a resident model's autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import BudgetError, NumericsError, RequestError, UnsupportedModelError
from ghoststream.evaluation.objectives import NextTokenLoss
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.taylor import taylor_scores
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import (
    BoundaryMap,
    Lane,
    MemoryBudget,
    ModuleMap,
    PassMemory,
    PassOptions,
    Skeleton,
    make_batches,
)
from ghoststream.streaming.backward import BackwardPass
from ghoststream.streaming.budget import layer_work_bytes
from ghoststream.streaming.calls import ModelCalls
from ghoststream.testing.models import tiny_model
from ghoststream.text import TokenSet
from tests.helpers.backward import (
    IDS,
    MASK,
    MICRO,
    TOLERANCE,
    C,
    Collected,
    L,
    S,
    T,
    close,
    make_maps,
    mapped,
    resident_loss,
    streamed,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def layers_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose weights are read, in order, while a test runs."""
    read: list[int] = []
    original = Skeleton.read_layer

    def noted(self: Skeleton, layer: int) -> Any:
        read.append(layer)
        return original(self, layer)

    monkeypatch.setattr(Skeleton, "read_layer", noted)
    return read


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "falcon", "mixtral", "qwen3_moe", "granite", "opt"]
)
def test_weight_gradients_are_those_of_the_resident_model(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    model = tiny_model(family).requires_grad_(requires_grad=True)
    loss = resident_loss(model)
    loss.backward()
    collected = Collected()
    value = streamed(tiny_checkpoint(family), gradients=collected)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    skeleton = Skeleton(tiny_checkpoint(family))
    layers = model.get_submodule(skeleton.architecture.layers_path)
    expected = {
        f"{number}.{name}": parameter.grad
        for number, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    }
    norm = model.get_submodule(skeleton.architecture.final_norm_path)
    expected |= {f"{L}.{name}": parameter.grad for name, parameter in norm.named_parameters()}
    assert set(collected.gradients) == set(expected)
    assert sum(float(gradient.abs().max()) > 1e-4 for gradient in expected.values()) > L
    for name, gradient in expected.items():
        close(collected.gradients[name], gradient)


class Fitted(BoundaryMap):
    target = "dense"


class OfSome(NextTokenLoss):
    """Wants the logits of some entries only: of the next token and a few others."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__(n_tokens)
        self.shapes: set[tuple[int, ...]] = set()

    def entries(self, batch: Any, first: int, count: int) -> Any:
        generator = torch.Generator().manual_seed(first)
        return torch.randint(0, 128, (count, 5), generator=generator)

    def loss(self, batch: Any, first: int, logits: torch.Tensor) -> torch.Tensor:
        self.shapes.add(tuple(logits.shape))
        return logits.log_softmax(-1)[:, 0].sum()


class OfAll(OfSome):
    """The same loss, from logits of the whole vocabulary."""

    def entries(self, batch: Any, first: int, count: int) -> None:
        return None

    def loss(self, batch: Any, first: int, logits: torch.Tensor) -> torch.Tensor:
        chosen = OfSome.entries(self, batch, first, int(logits.shape[0]))
        return super().loss(batch, first, logits.gather(-1, chosen))


# Caps and scales behind the head, a bias of the head.
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_logits_of_some_entries_have_the_gradients_that_all_would_have(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    found = []
    for kind in (OfSome, OfAll):
        skeleton, collected = (
            Skeleton(tiny_checkpoint(family)),
            Collected(lambda layer, _name: layer >= L - 1),
        )
        batches = make_batches(IDS, None, MICRO)
        factory = PassMemory(skeleton, MemoryBudget(), T).states_factory(batches)
        options = PassOptions(logit_tokens=7)
        loss = kind(1)
        value = BackwardPass(skeleton, batches, loss, factory, gradients=collected, options=options).run()
        assert {shape[1] for shape in loss.shapes} == {5}
        found.append((value, collected.gradients))
    (some, of_some), (all_, of_all) = found
    assert some == pytest.approx(all_, rel=1e-6)
    for name, gradient in of_all.items():
        close(of_some[name], gradient)


def test_a_start_from_kept_states_and_scratch_change_no_bit(tiny_llama: Path, tmp_path: Path) -> None:
    whole, scratched, later = Collected(), Collected(), Collected()
    streamed(tiny_llama, gradients=whole)
    skeleton = Skeleton(tiny_llama)
    tight = 2 * skeleton.unit_bytes + 2 * MICRO * T * 4 * (4 * 64 + 8 * C)
    streamed(tiny_llama, gradients=scratched, budget=MemoryBudget(host_bytes=tight, scratch=tmp_path))
    model = tiny_model("llama")
    seen: dict[int, torch.Tensor] = {}

    def initial(batch: Any) -> torch.Tensor:
        with torch.inference_mode():
            model.model.layers[3].register_forward_pre_hook(
                lambda _m, args: seen.update({batch.start: args[0]})
            )
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        return seen[batch.start]

    streamed(
        tiny_llama,
        gradients=later,
        options=PassOptions(first_layer=3, initial=initial, logit_tokens=7),
    )
    assert set(whole.gradients) == set(scratched.gradients)
    assert {name for name in whole.gradients if int(name[0]) >= 3} == set(later.gradients)
    for name, gradient in whole.gradients.items():
        assert torch.equal(gradient, scratched.gradients[name])
        assert name not in later.gradients or torch.equal(gradient, later.gradients[name])
    assert not list(tmp_path.iterdir())


def test_a_way_back_whose_states_find_no_disk_is_refused_before_it_reads(
    layers_read: list[int], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States go forward in one place, and one is kept for each layer and for the end: none fits memory."""
    skeleton = Skeleton(tiny_llama)
    work = MICRO * T * layer_work_bytes(skeleton, T)
    least = 2 * skeleton.unit_bytes + max(skeleton.unit_bytes // 2, work)
    tight = MemoryBudget(host_bytes=least, scratch=tmp_path)
    needed = (1 + L + 1) * S * T * C * 4
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: needed - 1)
    with pytest.raises(BudgetError, match="hidden states between layers"):
        streamed(tiny_llama, gradients=Collected(), budget=tight)
    assert not layers_read
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: needed)
    streamed(tiny_llama, gradients=Collected(), budget=tight)


def test_weights_are_read_once_each_way_and_no_further_down_than_wanted(
    layers_read: list[int], tiny_llama: Path
) -> None:
    collected = Collected(lambda layer, name: layer == 2 and name.endswith("down_proj.weight"))
    streamed(tiny_llama, gradients=collected)
    assert layers_read == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2]
    assert list(collected.gradients) == ["2.mlp.down_proj.weight"]


def test_bfloat16_gradients_are_near_the_float32_ones(tiny_llama: Path) -> None:
    exact, rounded = Collected(), Collected()
    streamed(tiny_llama, gradients=exact)
    streamed(tiny_llama, gradients=rounded, dtype=torch.bfloat16)
    for name, gradient in exact.gradients.items():
        assert rounded.gradients[name].dtype == torch.float32
        # Eight bits of mantissa, six layers: directions agree, digits do not.
        assert (
            torch.nn.functional.cosine_similarity(
                gradient.flatten(), rounded.gradients[name].flatten(), dim=0
            )
            > 0.97
        ), name


def test_what_cannot_be_done_is_refused(tiny_llama: Path) -> None:
    plan = PruningPlan(L, (Span(1, 2),))
    frozen = {span: made.requires_grad_(requires_grad=False) for span, made in make_maps(plan).items()}
    with pytest.raises(RequestError, match="nothing asks for a gradient"):
        streamed(tiny_llama)
    with pytest.raises(RequestError, match="nothing asks for a gradient"):
        streamed(tiny_llama, lane=Lane("repaired", plan, mapped(frozen)))
    with pytest.raises(RequestError, match="vanish in float16"):
        streamed(tiny_llama, gradients=Collected(), dtype=torch.float16)
    with pytest.raises(RequestError, match="ends before layer 3"):
        streamed(tiny_llama, gradients=Collected(), options=PassOptions(last_layer=3))
    bare: Any = {Span(1, 2): lambda states: states}
    with pytest.raises(
        RequestError, match=r"map at \[1,2\) of this pass is a function and no BoundaryMap; wrap"
    ):
        streamed(tiny_llama, lane=Lane("repaired", plan, bare))
    with pytest.raises(RequestError, match=r"map at \[1,2\) is fitted while a pass runs: it cannot be diff"):
        streamed(tiny_llama, lane=Lane("repaired", plan, {Span(1, 2): Fitted()}))
    detached = ModuleMap(lambda states: states.detach())
    with pytest.raises(RequestError, match=r"map at \[1,2\) returns states without a gradient"):
        streamed(tiny_llama, lane=Lane("repaired", plan, {Span(1, 2): detached}), gradients=Collected())
    with pytest.raises(RequestError, match=r"not at a boundary of the plan"):
        streamed(tiny_llama, lane=Lane("repaired", PruningPlan(plan.n_layers), mapped(make_maps(plan))))


@pytest.mark.parametrize(
    ("factor", "says"),
    [(10**37.5, r"loss of sequences \[0,2\) is inf"), (10**38.5, "gradient at position 6")],
)
def test_overflow_is_an_error(factor: float, says: str, tiny_llama: Path) -> None:
    class Steep(NextTokenLoss):
        def loss(self, batch: Any, first: int, logits: torch.Tensor) -> torch.Tensor:
            return factor * super().loss(batch, first, logits)

    skeleton = Skeleton(tiny_llama)
    batches = make_batches(IDS, MASK, MICRO)
    factory = PassMemory(skeleton, MemoryBudget(), T).states_factory(batches)
    wanted = Collected(lambda layer, _name: layer == L - 1)
    with pytest.raises(NumericsError, match=says):
        BackwardPass(skeleton, batches, Steep(1), factory, gradients=wanted).run()
    assert factory.live_bytes == 0


def test_a_layer_that_cannot_be_differentiated_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelCalls.layer
    monkeypatch.setattr(ModelCalls, "layer", lambda *args: original(*args).detach())
    with pytest.raises(
        UnsupportedModelError, match=r"layer 5 \(LlamaDecoderLayer\) returns states without a gradient"
    ):
        streamed(tiny_llama, gradients=Collected())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_taylor_scores_are_those_of_the_formula(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    session = ModelSession(tiny_checkpoint(family))
    tokens = TokenSet(IDS, MASK.sum(axis=1, dtype=np.int32), MASK)
    scores = taylor_scores(session, tokens, micro_batch=MICRO, progress=SilentProgress())
    model = tiny_model(family).requires_grad_(requires_grad=True)
    resident_loss(model).backward()
    layers = model.get_submodule(session.skeleton.architecture.layers_path)
    expected = [
        sum(
            float((weight.grad * weight).detach().double().abs().sum())
            for weight in layer.parameters()
            if weight.ndim >= 2
        )
        for layer in layers
    ]
    assert scores == pytest.approx(expected, rel=TOLERANCE)
    assert len(set(scores)) == L
