"""Weights that an operator file has in the places of the base's: in lanes, in exports and told again from
them, against resident models whose weights are overwritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint import architecture_of, checkpoint_fingerprint
from ghoststream.errors import MismatchError, NumericsError, RequestError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Text
from ghoststream.recovery import load_recovered
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.export import export
from ghoststream.stages.lanes import operator_lane
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.streaming import Lane, Skeleton, StatesFactory, StreamedPass, make_batches
from ghoststream.testing.conformance import random_tokens, skip_layers
from ghoststream.testing.models import save_tiny
from tests.recovery.test_absorbing import lane_logits

pytestmark = pytest.mark.integration
L, C, T = 6, 32, 20
PLAN = PruningPlan.parse(L, "2:4")
# A norm before and behind the gap, a matrix, the final norm; where weights lie the other way round.
NAMES = {
    "llama": (
        "model.layers.1.input_layernorm.weight",
        "model.layers.4.mlp.down_proj.weight",
        "model.norm.weight",
    ),
    "gpt2": (
        "transformer.h.0.ln_1.bias",
        "transformer.h.5.mlp.c_proj.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ),
}


def draw(root: Path, names: tuple[str, ...], plan: PruningPlan = PLAN) -> OperatorSet:
    """An operator a span on the hidden state, and weights near those of the base."""
    generator = np.random.default_rng(4)
    skeleton = Skeleton(root)
    replaced: dict[str, npt.NDArray[np.float32]] = {}
    for name in names:
        own = skeleton.reader.read(name, torch.float32).numpy()
        replaced[name] = own + 0.1 * generator.standard_normal(own.shape).astype(np.float32)
    boundaries = tuple(
        BoundaryOperator(span, "linear", weight=(0.05 * generator.standard_normal((C, C))).astype(np.float32))
        for span in plan.spans
    )
    return OperatorSet(plan, "random", boundaries, C, replaced=replaced)


def checkpoint_names(root: Path, family: str) -> tuple[str, ...]:
    """The names as this checkpoint has them, which may lack a prefix."""
    known = Skeleton(root).index.tensors
    ends = [wanted.removeprefix("transformer.") for wanted in NAMES[family]]
    return tuple(name for end in ends for name in known if name.endswith(end))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lane_export_and_resident_model_are_one(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = tiny_checkpoint(family), tmp_path / "out"
    names = checkpoint_names(root, family)
    operators = draw(root, names)
    assert len(names) == len(NAMES[family])
    export(root, operators, out)
    assert verify_path(out).sound
    skeleton = Skeleton(root)
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    ids = torch.cat([batch.ids for batch in batches])
    found = lane_logits(skeleton, operators, batches)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        expected = resident(root, operators)(ids).logits
        without = resident(root, replace(operators, replaced={}))(ids).logits
        exported = loaded.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)
    assert (without - expected).abs().max() > 1e-2
    # A lane leaves the model as it was.
    plain = lane_logits(skeleton, replace(operators, replaced={}), batches)
    torch.testing.assert_close(plain, without, rtol=1e-5, atol=1e-5)

    recovered = load_recovered(out)
    assert recovered is not None
    told = recovered.operators
    assert told.replaced.keys() == operators.replaced.keys()
    for name, array in operators.replaced.items():
        np.testing.assert_array_equal(told.replaced[name], array)


def resident(root: Path, operators: OperatorSet) -> Any:
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    names = Skeleton(root).keys.names
    with torch.no_grad():
        for name, source in names.items():
            if source in operators.replaced:
                model.get_parameter(name).copy_(torch.from_numpy(operators.replaced[source]))
    layers = model.get_submodule(architecture_of(model.config).layers_path)
    skip_layers(model, operators.plan.removed)
    for operator in operators.operators:
        weight = torch.from_numpy(np.array(operator.weight))
        layers[operator.span.stop].register_forward_pre_hook(
            lambda _module, args, weight=weight: (args[0] + args[0] @ weight.T, *args[1:])
        )
    return model


def test_parts_of_one_parameter_are_replaced_one_by_one(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = tiny_checkpoint("mixtral"), tmp_path / "out"
    skeleton = Skeleton(root)
    fused = next(pieces for pieces in skeleton.keys.pieces.values() if len(pieces) > 1)
    layer = f".{L - 1}."
    names = [
        piece.source
        for pieces in skeleton.keys.pieces.values()
        for piece in pieces[:2]
        if len(pieces) == len(fused) and layer in piece.source
    ]
    assert names
    operators = draw(root, tuple(names))
    export(root, operators, out)
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    ids = torch.cat([batch.ids for batch in batches])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        exported = loaded.eval()(ids).logits
    torch.testing.assert_close(lane_logits(skeleton, operators, batches), exported, rtol=1e-5, atol=1e-5)
    plain = lane_logits(skeleton, replace(operators, replaced={}), batches)
    assert (plain - exported).abs().max() > 1e-2


def test_in_bf16_a_lane_rounds_as_the_checkpoint_does(tmp_path: Path) -> None:
    root, out = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16), tmp_path / "out"
    operators = draw(root, NAMES["llama"])
    # No operator: it would be rounded in the checkpoint, and in float32 in the lane.
    bare = tuple(BoundaryOperator(one.span, "identity") for one in operators.boundaries)
    operators = replace(operators, boundaries=bare)
    export(root, operators, out)
    skeleton = Skeleton(root, dtype=torch.float32)
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        exported = loaded(torch.cat([batch.ids for batch in batches])).logits
    torch.testing.assert_close(lane_logits(skeleton, operators, batches), exported, rtol=1e-6, atol=1e-6)


def test_lanes_with_other_weights_part_where_they_differ(tiny_llama: Path) -> None:
    skeleton = Skeleton(tiny_llama)
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    one = draw(tiny_llama, NAMES["llama"])
    kinds = [one, replace(one, replaced={}), replace(one, replaced=dict(list(one.replaced.items())[-1:]))]
    seen: list[list[torch.Tensor]] = [[] for _ in kinds]

    class Keeping:
        def __init__(self, place: list[torch.Tensor]) -> None:
            self.place = place

        def observe_logits(self, batch: Any, first: int, logits: torch.Tensor) -> None:
            del batch, first
            self.place.append(logits.clone())

    lanes = [
        operator_lane(f"lane {number}", kind, skeleton, Keeping(seen[number]))
        for number, kind in enumerate(kinds)
    ]
    factory = StatesFactory(batches, C, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, [*lanes, Lane("dense", PruningPlan(L))], factory).run()
    for kind, logits in zip(kinds, seen, strict=True):
        torch.testing.assert_close(torch.cat(logits), lane_logits(skeleton, kind, batches).flatten(0, 1))


def test_evaluate_measures_the_file_as_it_does_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 128, size=(4, T))
    np.save(tmp_path / "ids.npy", ids)
    base = Skeleton(tiny_llama)
    operators = draw(tiny_llama, NAMES["llama"])
    operators = replace(operators, metadata={"base": checkpoint_fingerprint(base.root, base.index)})
    operators.save(tmp_path / "operators.safetensors")
    assert OperatorSet.load(tmp_path / "operators.safetensors").replaced.keys() == operators.replaced.keys()
    export(tiny_llama, tmp_path / "operators.safetensors", tmp_path / "out")
    text = Text(spec=f"ids:{tmp_path / 'ids.npy'}", length=T)
    lanes = evaluate([tiny_llama, tmp_path / "operators.safetensors", tmp_path / "out"], text=text)
    alone = evaluate([tmp_path / "out"], text=text)
    for row in lanes.rows[1:]:
        assert row.losses.loss == pytest.approx(alone.rows[0].losses.loss, rel=1e-6)
    assert lanes.rows[0].losses.loss != pytest.approx(alone.rows[0].losses.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "error", "says"),
    [
        ("model.layers.4.input_layernorm.scale", (C,), MismatchError, "has no tensor .*scale"),
        ("model.layers.4.input_layernorm.weight", (C + 1,), MismatchError, r"has shape \(33,\)"),
        ("model.layers.3.input_layernorm.weight", (C,), RequestError, r"its layer is removed by \[2,4\)"),
        ("model.embed_tokens.weight", (128, C), UnsupportedModelError, "no weight of a decoder layer"),
    ],
)
def test_what_cannot_be_replaced_is_refused(
    name: str, shape: tuple[int, ...], error: type[Exception], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = replace(draw(tiny_llama, ()), replaced={name: np.ones(shape, np.float32)})
    with pytest.raises(error, match=says):
        export(tiny_llama, operators, tmp_path / "out")
    with pytest.raises(error, match=says):
        operator_lane("lane", operators, Skeleton(tiny_llama), None)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_takes_an_operator_up_is_not_replaced_too(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    operators = draw(tiny_llama, (name,))
    absorbed = BoundaryOperator(PLAN.spans[0], "linear", "mlp_output", np.zeros((C, C), np.float32))
    with pytest.raises(RequestError, match=r"down_proj.weight is replaced, and the operator of \[2,4\)"):
        export(tiny_llama, replace(operators, boundaries=(absorbed,)), tmp_path / "out")


def test_weights_that_are_no_numbers_are_refused(tiny_llama: Path) -> None:
    operators = draw(tiny_llama, ())
    with pytest.raises(NumericsError, match=r"the weight for model\.norm\.weight is not finite"):
        replace(operators, replaced={"model.norm.weight": np.full(C, np.nan, np.float32)})
