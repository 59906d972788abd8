"""What serving engines do to a model of transformers, in little: after the transformers backends of vLLM and
SGLang, which need an accelerator."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import fx, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "engine_of_tests"


@dataclass
class AttentionInstance:
    """The attention of one layer, with what an engine knows of the flattened batch."""

    window: int | None
    lengths: tuple[int, ...] = ()


class EngineLinear(nn.Module):
    """No ``nn.Linear``: engines have classes of their own."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(linear.weight.shape, torch.nan))
        self.bias = None if linear.bias is None else nn.Parameter(torch.full(linear.bias.shape, torch.nan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class EngineNorm(nn.Module):
    """A root mean square norm, or Gemma's, whose weights are around zero."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        made: Any = type(norm)
        self.is_gemma = bool((made(1).weight == 0).all())
        self.epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
        self.weight = nn.Parameter(torch.full(norm.weight.shape, torch.nan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return x * (1.0 + self.weight) if self.is_gemma else self.weight * x


class EngineEmbedding(nn.Module):
    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(embedding.weight.shape, torch.nan))
        self.scale = getattr(embedding, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = functional.embedding(ids, self.weight)
        return found if self.scale is None else found * self.scale


class Missing(nn.Module):
    """Stands for what another stage of a pipeline holds; hands its input on."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    attention_instances: dict[int, AttentionInstance] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over sequences that lie one behind the other, by the formula of transformers' ``eager``."""
    assert attention_instances is not None, "keyword arguments were not passed on"
    assert attention_mask is None
    assert scaling is not None
    instance, start, results = attention_instances[module.layer_idx], 0, []
    groups = query.shape[1] // key.shape[1]
    for length in instance.lengths:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at = torch.arange(length)
        seen = at[None, :] <= at[:, None]
        if instance.window is not None:
            seen &= at[None, :] > at[:, None] - instance.window
        scores = scores + torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32)
        results.append(torch.matmul(weights, v).transpose(1, 2).reshape(length, -1))
        start += length
    return torch.cat(results), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have no memory, and whose buffers have."""
    register = nn.Module.register_parameter

    def without_memory(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"))

    patched: Any = nn.Module
    try:
        patched.register_parameter = without_memory
        yield
    finally:
        patched.register_parameter = register


def is_norm_by_name(module: nn.Module) -> bool:
    """SGLang's rule, and that of vLLM before it looked at the computation."""
    return type(module).__name__.endswith("RMSNorm")


def is_norm_by_dataflow(module: nn.Module) -> bool:
    """The rule of vLLM: a leaf whose forward takes one tensor through ``rsqrt(mean(x ** 2) + epsilon)``."""
    if next(module.children(), None) is not None or not list(module.parameters()):
        return False
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001 - what cannot be traced is left alone, as by the engine
        return False
    return any(node.target is torch.rsqrt for node in graph.nodes)


class Engine:
    """A checkpoint served: built without weights, its modules replaced, its weights loaded by name.

    Args:
        folder: The recovered checkpoint.
        is_norm: Which modules are replaced by :class:`EngineNorm`.
        stages: Layers at which pipeline stages end, but the last one.
    """

    def __init__(self, folder: Path, is_norm: Any, stages: tuple[int, ...] = ()) -> None:
        self.folder, self.is_norm, self.replaced = folder, is_norm, [0, 0]
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.config._attn_implementation = ATTENTION
        self.instances = {
            layer: AttentionInstance(self._window(layer)) for layer in range(self.config.num_hidden_layers)
        }
        ends = (0, *stages, self.config.num_hidden_layers)
        self.stages = [self._stage(*span) for span in itertools.pairwise(ends)]

    def logits(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """Return the logits of all tokens of some sequences, ``(tokens, V)``."""
        for instance in self.instances.values():
            instance.lengths = tuple(map(len, sequences))
        positions = torch.cat([torch.arange(len(one)) for one in sequences])[None]
        inputs: dict[str, torch.Tensor] = {"input_ids": torch.cat(sequences)[None]}
        with torch.no_grad():
            for stage in self.stages:
                states = stage(
                    **inputs,
                    position_ids=positions,
                    use_cache=False,
                    return_dict=False,
                    attention_instances=self.instances,
                )[0]
                inputs = {"inputs_embeds": states}
            found = functional.linear(states[0], self.head)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap

    def _window(self, layer: int) -> int | None:
        kinds, window = (
            getattr(self.config, "layer_types", None),
            getattr(self.config, "sliding_window", None),
        )
        return window if kinds is None or kinds[layer] == "sliding_attention" else None

    def _stage(self, first: int, last: int) -> Any:
        with parameters_on_meta():
            model = AutoModel.from_config(self.config, dtype=torch.float32, trust_remote_code=True)
        assert model.is_backend_compatible()
        names = list(model._pp_plan)
        assert names[-2:] == ["layers", "norm"], "the plan for pipelines is lost"
        for layer in set(range(self.config.num_hidden_layers)) - set(range(first, last)):
            model.layers[layer] = Missing()
        if last < self.config.num_hidden_layers:
            model.norm = Missing()
        self._replace(model, "model", {f"model.{pattern}" for pattern in model.tp_plan})
        model.set_input_embeddings(EngineEmbedding(model.get_input_embeddings()))
        self._load(model)
        return model.eval()

    def _replace(self, module: nn.Module, prefix: str, sharded: set[str]) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}"
            if isinstance(child, nn.Linear):
                assert ".ghost." not in path or not any(re.match(one, path) for one in sharded)
                setattr(module, name, EngineLinear(child))
                self.replaced[0] += 1
            elif self.is_norm(child):
                setattr(module, name, EngineNorm(child))
                self.replaced[1] += 1
            else:
                self._replace(child, path, sharded)

    def _load(self, model: Any) -> None:
        tensors = {k: v for path in self.folder.glob("*.safetensors") for k, v in load_file(path).items()}
        self.head = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            tensor = tensors.pop(f"model.{name}")
            assert tensor.shape == parameter.shape
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        if len(self.instances) == sum(not isinstance(layer, Missing) for layer in model.layers):
            assert not tensors, f"not used: {sorted(tensors)}"
