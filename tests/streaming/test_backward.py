"""The way back, layer by layer, against a resident model's autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ghoststream.errors import NumericsError, RequestError, UnsupportedModelError
from ghoststream.evaluation.objectives import NextTokenLoss
from ghoststream.progress import SilentProgress
from ghoststream.recovery.modeling_ghosted import GhostOperator
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
    ReplacedWeights,
    Skeleton,
    make_batches,
)
from ghoststream.streaming.backward import BackwardPass
from ghoststream.streaming.calls import ModelCalls
from ghoststream.testing.models import tiny_model
from ghoststream.text import TokenSet

pytestmark = pytest.mark.integration
S, T, C, L, MICRO = 5, 12, 32, 6, 2

# Both add the same products in float32, the resident model all sequences at once, the streamed one some at a
# time: sums of at most 60 tokens through six layers, a few hundred roundings of 6e-8 each.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def ids() -> npt.NDArray[np.int32]:
    return np.random.default_rng(7).integers(3, 128, size=(S, T)).astype(np.int32)


@pytest.fixture(scope="module")
def mask() -> npt.NDArray[np.bool_]:
    lengths = np.array([12, 12, 7, 12, 9])
    return np.arange(T) < lengths[:, None]


class Collected:
    """Keeps every gradient that it is shown."""

    def __init__(self, wanted: Callable[[int, str], bool] = lambda _layer, _name: True) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self._wanted = wanted

    def wants(self, layer: int, name: str, weight: torch.Tensor) -> bool:
        del weight
        return self._wanted(layer, name)

    def observe(self, layer: int, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        assert weight.shape == gradient.shape
        self.gradients[f"{layer}.{name}"] = gradient.clone()


def resident_loss(model: Any, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]) -> torch.Tensor:
    tokens, real = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask)
    labels = tokens.masked_fill(~real, -100)
    loss: torch.Tensor = model(input_ids=tokens, attention_mask=real, labels=labels, use_cache=False).loss
    return loss


def streamed(
    folder: Path,
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    *,
    budget: MemoryBudget | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> float:
    skeleton = Skeleton(folder, dtype=dtype)
    batches = make_batches(ids, mask, MICRO)
    loss = NextTokenLoss(sum(map(NextTokenLoss.count, batches)))
    factory = PassMemory(skeleton, budget or MemoryBudget(), T).states_factory(batches)
    options.setdefault("options", PassOptions(logit_tokens=7))
    return BackwardPass(skeleton, batches, loss, factory, **options).run()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1e-3, float(expected.abs().max()))


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "falcon", "mixtral", "qwen3_moe", "granite", "opt"]
)
def test_weight_gradients_are_those_of_the_resident_model(
    family: str,
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    model = tiny_model(family).requires_grad_(requires_grad=True)
    loss = resident_loss(model, ids, mask)
    loss.backward()
    collected = Collected()
    value = streamed(tiny_checkpoint(family), ids, mask, gradients=collected)
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


def make_maps(plan: PruningPlan, *, seed: int = 0) -> dict[Span, GhostOperator]:
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for number, span in enumerate(plan.spans):
        module = GhostOperator(
            C, "linear", ("hidden", "hidden+normed")[number % 2], bias=True, norm_epsilon=1e-6
        )
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        maps[span] = module
    return maps


def mapped(modules: dict[Span, GhostOperator]) -> dict[Span, ModuleMap]:
    return {span: ModuleMap(module) for span, module in modules.items()}


class Fitted(BoundaryMap):
    target = "dense"


class Tapped(BoundaryMap):
    """``y = (x + a A) (I + N)``: the tap ``a`` is read when it is entered, ``N`` acts when it is applied."""

    taps = ("mlp_intermediate",)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.early = nn.Parameter(torch.randn((C, 2 * C), generator=generator) * 0.05)
        self.late = nn.Parameter(torch.randn((C, C), generator=generator) * 0.05)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return states + taps["mlp_intermediate"] @ self.early.T

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        return states + states @ self.late.T

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.early, self.late


def repaired_resident(plan: PruningPlan, maps: dict[Span, GhostOperator]) -> Any:
    """A resident Llama without the layers of a plan, whose operators act in front of the layers behind."""
    model = tiny_model("llama").requires_grad_(requires_grad=False)
    stages = [*model.model.layers, model.model.norm]
    for span in plan.spans:
        for layer in range(span.start, span.stop):
            stages[layer].forward = lambda states, *_a, **_k: states
        if span in maps:

            def hook(_: object, args: Any, span: Span = span) -> Any:
                return (maps[span](args[0]), *args[1:])

            stages[span.stop].register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("spans", [((1, 2), (3, 5)), ((0, 2), (4, 6)), ((2, 4),)])
def test_operator_gradients_are_those_of_the_resident_model(
    spans: tuple[tuple[int, int], ...],
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    tiny_llama: Path,
) -> None:
    plan = PruningPlan(L, tuple(Span(*span) for span in spans))
    maps, same = make_maps(plan), make_maps(plan)
    loss = resident_loss(repaired_resident(plan, same), ids, mask)
    loss.backward()
    value = streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, mapped(maps)))
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for span in plan.spans:
        for found, expected in zip(maps[span].parameters(), same[span].parameters(), strict=True):
            assert found.grad is not None
            assert expected.grad is not None
            assert float(expected.grad.abs().max()) > 1e-4
            close(found.grad, expected.grad)


def test_gradients_of_maps_that_read_the_layer_before_are_those_of_the_resident_model(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path
) -> None:
    plan = PruningPlan(L, (Span(1, 2), Span(3, 5)))
    maps, same = ({span: Tapped(span.start) for span in plan.spans} for _ in range(2))
    model = repaired_resident(plan, {})
    for span, tapped in same.items():
        seen: list[torch.Tensor] = []
        before = model.model.layers[span.start - 1]
        before.mlp.down_proj.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))

        def repair(_: object, _args: Any, states: Any, tapped: Any = tapped, seen: Any = seen) -> Any:
            return tapped.apply(tapped.enter(states, {"mlp_intermediate": seen.pop()}))

        before.register_forward_hook(repair)
    # The weights of the layer that a map reads and of those below, and the final norm's, in one go.
    of_layer = ("input_layernorm.weight", "mlp.up_proj.weight")
    wanted = Collected(lambda layer, name: layer == L or (layer == 2 and name in of_layer))
    norms = {f"{L}.weight": model.model.norm.weight}
    norms |= {f"2.{name}": model.model.layers[2].get_parameter(name) for name in of_layer}
    for weight in norms.values():
        weight.requires_grad_()
    loss = resident_loss(model, ids, mask)
    loss.backward()
    value = streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, maps), gradients=wanted)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for span in plan.spans:
        for found, expected in zip(maps[span].parameters(), same[span].parameters(), strict=True):
            assert found.grad is not None
            assert expected.grad is not None
            assert float(expected.grad.abs().max()) > 1e-4
            close(found.grad, expected.grad)
    assert set(wanted.gradients) == set(norms)
    for name, weight in norms.items():
        assert weight.grad is not None
        close(wanted.gradients[name], weight.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_at_replaced_weights_are_those_of_a_model_that_has_them(
    family: str,
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    model = tiny_model(family).requires_grad_(requires_grad=True)
    skeleton = Skeleton(tiny_checkpoint(family))
    layers, norm = skeleton.architecture.layers_path, skeleton.architecture.final_norm_path
    names = [name for name, _ in model.named_parameters() if name.startswith((f"{layers}.2.", f"{norm}."))]
    generator = torch.Generator().manual_seed(1)
    replaced = {}
    for name in names:
        weight = model.get_parameter(name)
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        replaced[skeleton.keys.names[name]] = weight.detach()
    loss = resident_loss(model, ids, mask)
    loss.backward()
    collected = Collected(lambda layer, _name: layer in (1, 2, L))
    weights = ReplacedWeights(skeleton, replaced)
    lane = Lane("replaced", PruningPlan(L), weights=weights)
    value = streamed(tiny_checkpoint(family), ids, mask, lane=lane, gradients=collected)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for name in names:
        owner = (
            f"{L}.{name.removeprefix(f'{norm}.')}"
            if name.startswith(norm)
            else name.removeprefix(f"{layers}.")
        )
        expected = model.get_parameter(name).grad
        assert expected is not None
        close(collected.gradients[owner], expected)


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
    family: str, ids: npt.NDArray[np.int32], tiny_checkpoint: Callable[[str], Path]
) -> None:
    found = []
    for kind in (OfSome, OfAll):
        skeleton, collected = (
            Skeleton(tiny_checkpoint(family)),
            Collected(lambda layer, _name: layer >= L - 1),
        )
        batches = make_batches(ids, None, MICRO)
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


def test_a_span_without_a_map_is_cut_on_the_way_back_too(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path
) -> None:
    plan = PruningPlan(L, (Span(1, 2), Span(4, 5)))
    maps, same = ({span: made for span, made in make_maps(plan).items() if span.start == 1} for _ in range(2))
    resident_loss(repaired_resident(plan, same), ids, mask).backward()
    streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, mapped(maps)))
    for found, expected in zip(maps[Span(1, 2)].parameters(), same[Span(1, 2)].parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        close(found.grad, expected.grad)


def test_a_start_from_kept_states_and_scratch_change_no_bit(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path, tmp_path: Path
) -> None:
    whole, scratched, later = Collected(), Collected(), Collected()
    streamed(tiny_llama, ids, mask, gradients=whole)
    skeleton = Skeleton(tiny_llama)
    tight = 2 * skeleton.unit_bytes + 2 * MICRO * T * 4 * (4 * 64 + 8 * C)
    streamed(
        tiny_llama, ids, mask, gradients=scratched, budget=MemoryBudget(host_bytes=tight, scratch=tmp_path)
    )
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
        ids,
        mask,
        gradients=later,
        options=PassOptions(first_layer=3, initial=initial, logit_tokens=7),
    )
    assert set(whole.gradients) == set(scratched.gradients)
    assert {name for name in whole.gradients if int(name[0]) >= 3} == set(later.gradients)
    for name, gradient in whole.gradients.items():
        assert torch.equal(gradient, scratched.gradients[name])
        assert name not in later.gradients or torch.equal(gradient, later.gradients[name])
    assert not list(tmp_path.iterdir())


def test_weights_are_read_once_each_way_and_no_further_down_than_wanted(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Skeleton.read_layer

    def counted(self: Skeleton, layer: int) -> Any:
        read.append(layer)
        return original(self, layer)

    monkeypatch.setattr(Skeleton, "read_layer", counted)
    collected = Collected(lambda layer, name: layer == 2 and name.endswith("down_proj.weight"))
    streamed(tiny_llama, ids, mask, gradients=collected)
    assert read == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2]
    assert list(collected.gradients) == ["2.mlp.down_proj.weight"]


def test_bfloat16_gradients_are_near_the_float32_ones(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path
) -> None:
    exact, rounded = Collected(), Collected()
    streamed(tiny_llama, ids, mask, gradients=exact)
    streamed(tiny_llama, ids, mask, gradients=rounded, dtype=torch.bfloat16)
    for name, gradient in exact.gradients.items():
        assert rounded.gradients[name].dtype == torch.float32
        # Eight bits of mantissa, six layers: directions agree, digits do not.
        assert (
            torch.nn.functional.cosine_similarity(
                gradient.flatten(), rounded.gradients[name].flatten(), dim=0
            )
            > 0.97
        ), name


def test_what_cannot_be_done_is_refused(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path
) -> None:
    plan = PruningPlan(L, (Span(1, 2),))
    frozen = {span: made.requires_grad_(requires_grad=False) for span, made in make_maps(plan).items()}
    with pytest.raises(RequestError, match="nothing asks for a gradient"):
        streamed(tiny_llama, ids, mask)
    with pytest.raises(RequestError, match="nothing asks for a gradient"):
        streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, mapped(frozen)))
    with pytest.raises(RequestError, match="vanish in float16"):
        streamed(tiny_llama, ids, mask, gradients=Collected(), dtype=torch.float16)
    with pytest.raises(RequestError, match="ends before layer 3"):
        streamed(tiny_llama, ids, mask, gradients=Collected(), options=PassOptions(last_layer=3))
    bare: Any = {Span(1, 2): lambda states: states}
    with pytest.raises(
        RequestError, match=r"map at \[1,2\) of this pass is a function and no BoundaryMap; wrap"
    ):
        streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, bare))
    with pytest.raises(RequestError, match=r"map at \[1,2\) is fitted while a pass runs: it cannot be diff"):
        streamed(tiny_llama, ids, mask, lane=Lane("repaired", plan, {Span(1, 2): Fitted()}))
    detached = ModuleMap(lambda states: states.detach())
    with pytest.raises(RequestError, match=r"map at \[1,2\) returns states without a gradient"):
        streamed(
            tiny_llama, ids, mask, lane=Lane("repaired", plan, {Span(1, 2): detached}), gradients=Collected()
        )
    with pytest.raises(RequestError, match=r"not at a boundary of the plan"):
        streamed(
            tiny_llama, ids, mask, lane=Lane("repaired", PruningPlan(plan.n_layers), mapped(make_maps(plan)))
        )


@pytest.mark.parametrize(
    ("factor", "says"),
    [(10**37.5, r"loss of sequences \[0,2\) is inf"), (10**38.5, "gradient at position 6")],
)
def test_overflow_is_an_error(
    factor: float, says: str, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path
) -> None:
    class Steep(NextTokenLoss):
        def loss(self, batch: Any, first: int, logits: torch.Tensor) -> torch.Tensor:
            return factor * super().loss(batch, first, logits)

    skeleton = Skeleton(tiny_llama)
    batches = make_batches(ids, mask, MICRO)
    factory = PassMemory(skeleton, MemoryBudget(), T).states_factory(batches)
    wanted = Collected(lambda layer, _name: layer == L - 1)
    with pytest.raises(NumericsError, match=says):
        BackwardPass(skeleton, batches, Steep(1), factory, gradients=wanted).run()
    assert factory.live_bytes == 0


def test_a_layer_that_cannot_be_differentiated_is_refused(
    ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelCalls.layer
    monkeypatch.setattr(ModelCalls, "layer", lambda *args: original(*args).detach())
    with pytest.raises(
        UnsupportedModelError, match=r"layer 5 \(LlamaDecoderLayer\) returns states without a gradient"
    ):
        streamed(tiny_llama, ids, mask, gradients=Collected())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_taylor_scores_are_those_of_the_formula(
    family: str,
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    session = ModelSession(tiny_checkpoint(family))
    tokens = TokenSet(ids, mask.sum(axis=1, dtype=np.int32), mask)
    scores = taylor_scores(session, tokens, micro_batch=MICRO, progress=SilentProgress())
    model = tiny_model(family).requires_grad_(requires_grad=True)
    resident_loss(model, ids, mask).backward()
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
