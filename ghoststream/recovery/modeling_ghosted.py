"""Recovered models: a pruned transformers model with linear operators at its pruning boundaries.

This file needs torch and transformers 5.1 or newer only; it is copied into every recovered checkpoint. It
serves every architecture: ``Ghosted<Name>`` is made on demand from the transformers class ``<Name>``, for
example ``GhostedLlamaConfig``, ``GhostedLlamaModel`` and ``GhostedLlamaForCausalLM``.

``config.ghost_operators`` lists the operators, one for each removed span::

    {"span": [13, 19], "layer": 13, "module": "layers.13", "form": "linear", "features": "hidden", "bias":
    false}

Operators on normed features have ``norm_epsilon`` beside these.

``span`` is 0-based and half-open in the numbering of the model that it was removed from. ``layer`` is the
decoder layer of this model whose input the operator changes; it equals the number of layers where the
operator changes the input of the final norm. ``module`` is the path of that layer or norm inside the base
model; its operator is the submodule ``ghost`` of it.

``config.ghost_base`` is that of an adapter: a folder with the weights that recovering has made or changed,
and without those of the base that stayed as they were. ``from_pretrained`` reads these from the base, which
has to be the very one that the adapter was made of.

A recovered model may be pruned again. Where layers right in front of an operator are removed then, the entry
of the later removal, which follows in the list, acts first: it is the submodule ``before`` of the operator.

``output_hidden_states``: entry ``i`` is what decoder layer ``i - 1`` returned (entry 0: the embeddings). At a
boundary that is the state *before* the operator: ``hidden_states[layer]`` is the operator's input, and
``base_model.get_submodule(module).ghost(hidden_states[layer])`` is what the layer computes with. The last
entry is, as in the original architectures, the output of the final norm; an operator in front of the final
norm has acted on it, and its own input is then not among the entries.
Mamba 2 leaves the embeddings out: its entry ``i`` is what layer ``i`` returned.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

_NEEDED = (5, 1)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _NEEDED:
    msg = f"this recovered checkpoint needs transformers 5.1 or newer, not {transformers.__version__}"
    raise ImportError(msg)

PREFIX = "Ghosted"
TYPE_PREFIX = "ghosted_"
KNOWN = (("linear", "hidden"), ("linear", "normed"), ("linear", "hidden+normed"), ("diagonal", "hidden"))
PROVENANCE_NAME = "ghoststream.json"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_SAMPLE_BYTES = 1024
# Ends of class names, the longer ones first, and the auto class that loads them.
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "Model": "AutoModel",
}


class GhostOperator(nn.Module):
    """The map at a boundary, of the form ``linear`` or ``diagonal``.

    They are ``y = x + phi(x) W^T (+ b)`` and ``y = x + x * w``. All parameters start at zero, which makes the
    map the identity. Input and output have shape ``(..., width)``.

    Args:
        width: Hidden size of the model.
        form: ``"linear"`` (``linear.weight`` of shape ``(width, p)``) or ``"diagonal"`` (``weight``,
            ``(width,)``).
        features: What a linear map reads: ``"hidden"``, the hidden state itself; ``"normed"``, the hidden
            state over its root mean square (computed in float32); ``"hidden+normed"``, both, which makes
            ``p = 2 * width``.
        bias: Whether a constant is added (``linear.bias`` or ``bias``, shape ``(width,)``).

        norm_epsilon: Added to the mean square by normed features.

    Raises:
        ValueError: If the form or the features are unknown to this file, or normed features have no epsilon.
    """

    def __init__(
        self,
        width: int,
        form: str = "linear",
        features: str = "hidden",
        bias: bool = False,
        norm_epsilon: float | None = None,
    ) -> None:
        super().__init__()
        if (form, features) not in KNOWN:
            msg = f"operator of form {form!r} with features {features!r} is unknown to this modelling file"
            raise ValueError(msg)
        if features != "hidden" and norm_epsilon is None:
            msg = f"an operator with features {features!r} needs norm_epsilon"
            raise ValueError(msg)
        self.form, self.features, self.norm_epsilon = form, features, norm_epsilon
        self.before: GhostOperator | None
        self.register_module("before", None)
        if form == "linear":
            # Exactly nn.Linear, as tools that adapt or quantise models look for it; marked for
            # _reset_if_ghost.
            linear: Any = nn.Linear(2 * width if features == "hidden+normed" else width, width, bias=bias)
            linear.is_ghost = True
            self.linear = linear
        else:
            self.weight = nn.Parameter(torch.empty(width))
            self.bias = nn.Parameter(torch.empty(width)) if bias else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the map, after the one before it if there is one."""
        if self.before is not None:
            hidden_states = self.before(hidden_states)
        if self.form == "linear":
            change: torch.Tensor = self.linear(self._read(hidden_states))
        else:
            change = hidden_states * self.weight
            change = change if self.bias is None else change + self.bias
        return hidden_states + change

    def _read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.features == "hidden" or self.norm_epsilon is None:
            return hidden_states
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm_epsilon)
        normed = (wide * scale).to(hidden_states.dtype)
        return normed if self.features == "normed" else torch.cat((hidden_states, normed), dim=-1)


@functools.cache
def _with_ghost(base: Any) -> Any:
    """Subclass a layer's or norm's class so that its ``ghost`` acts on its first argument.

    Serving engines take modules for what they are like and put their own in their places: SGLang every class
    whose name ends in ``RMSNorm``, vLLM those whose unwrapped ``forward`` computes one, kernels from the hub
    the ``forward`` of a class with a ``kernel_layer_name``. None of these may come upon a ghosted one.
    """

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, self.ghost(hidden_states), *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # Pickle looks classes up by name, and this one has none in any module; its base has.
        del protocol
        return _empty_with_ghost, (base,), self.__getstate__()

    # Not functools.wraps, by which a rewritten forward would be that of the base.
    signed: Any = forward
    signed.__signature__, signed.__doc__ = inspect.signature(base.forward), base.forward.__doc__
    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__}
    if hasattr(base, "kernel_layer_name"):
        members["kernel_layer_name"] = None
    return type(f"{base.__name__}{PREFIX}", (base,), members)


def _empty_with_ghost(base: Any) -> Any:
    made = _with_ghost(base)
    return made.__new__(made)


def base_model_name(model: Any) -> str:
    """Return the attribute that holds the base model.

    Llama 4's causal model names one that only the model with images has.
    """
    name = str(model.base_model_prefix)
    return name if hasattr(model, name) or not hasattr(model, "model") else "model"


class GhostedMixin(nn.Module):
    """What recovered models add to the transformers class of their architecture."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.base_model_prefix = base_model_name(self)
        operators = getattr(config, "ghost_operators", None) or ()
        switched = {self._insert(config, operator).__name__ for operator in operators}
        for module in self.modules():
            if isinstance(module, transformers.PreTrainedModel):
                self._adopt(module, switched)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say that what is not in the checkpoint is set as in the base, whose code does that.

        Of other classes transformers skips modules without weights of their own, such as the decoder, which
        in Falcon-H1 sets buffers of its layers.
        """
        return False

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, base: Any = None, **options: Any) -> Any:
        """Load a model; of an adapter the weights that are not in its folder come from its base.

        Args:
            name: Folder or hub id, as for every model of transformers.
            *args: Passed on.
            base: Folder or hub id of an adapter's base; the one that the adapter names if ``None``.
            **options: Passed on.

        Raises:
            ValueError: If nobody says where the base of an adapter is, or it is another one.
        """
        parent: Any = super()
        hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
        config = options.get("config")
        if not isinstance(config, transformers.PreTrainedConfig):
            made: Any = cls
            config = made.config_class.from_pretrained(name if config is None else config, **hub)
        if getattr(config, "ghost_base", None) is None:
            if base is not None:
                msg = f"{name} is no adapter and has all its weights; leave base out"
                raise ValueError(msg)
            return parent.from_pretrained(name, *args, **options)
        config = copy.deepcopy(config)
        options |= {"config": config, "state_dict": _joined_weights(name, config, base, hub)}
        del config.ghost_base, config.transformers_weights
        # Given weights, transformers takes no name, and looks for nothing that lies beside them.
        with contextlib.suppress(OSError):
            options.setdefault(
                "generation_config", transformers.GenerationConfig.from_pretrained(name, **hub)
            )
        loaded = parent.from_pretrained(None, *args, **options)
        (loaded[0] if isinstance(loaded, tuple) else loaded).config.name_or_path = str(name)
        return loaded

    def _insert(self, config: Any, operator: dict[str, Any]) -> Any:
        base: Any = self.base_model
        module: Any = base.get_submodule(operator["module"])
        # Under from_pretrained the model is built in the checkpoint's dtype and on the meta device; both
        # come from torch's defaults, as for every other parameter.
        made = GhostOperator(
            config.hidden_size,
            operator["form"],
            operator["features"],
            bias=operator["bias"],
            norm_epsilon=operator.get("norm_epsilon"),
        )
        ghost = getattr(module, "ghost", None)
        if ghost is not None:
            while ghost.before is not None:
                ghost = ghost.before
            ghost.before = made
            return module.__class__
        module.ghost = made
        # Not a wrapper around the module: its tensor names, its class for isinstance, and hooks stay as they
        # are.
        switched: Any = module.__class__
        module.__class__ = _with_ghost(switched)
        return module.__class__

    def _adopt(self, model: Any, switched: set[str]) -> None:
        # The submodel that owns the layers is of the original class: it must neither give an operator random
        # values nor let a device map split a switched layer.
        model._no_split_modules = {*(model._no_split_modules or ()), *switched}
        if model is not self:
            # Unlike a method, this can be pickled.
            model._init_weights = functools.partial(_init_inner_weights, model)

    def _init_weights(self, module: nn.Module) -> None:
        if not _reset_if_ghost(module):
            parent: Any = super()
            parent._init_weights(module)


def _init_inner_weights(model: Any, module: nn.Module) -> None:
    if not _reset_if_ghost(module):
        type(model)._init_weights(model, module)


def _reset_if_ghost(module: nn.Module) -> bool:
    """Zero an operator's own parameters.

    Transformers guards ``nn.init`` so that loaded ones are left alone.
    """
    is_ghost = isinstance(module, GhostOperator) or getattr(module, "is_ghost", False)
    if is_ghost:
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
    return is_ghost


def _joined_weights(name: Any, config: Any, base: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of an adapter and its base by their names in the model, mapped from the files."""
    provenance: Any = cached_file(name, PROVENANCE_NAME, **hub)
    own: Any = cached_file(name, config.transformers_weights, **hub)
    noted = json.loads(Path(provenance).read_text(encoding="utf-8"))
    place = base or config.ghost_base["name"]
    if not place:
        msg = f"the adapter {name} does not say where its base is; give base=FOLDER, or the base's hub id"
        raise ValueError(msg)
    root = Path(place)
    if not root.is_dir():
        revision = None if base else config.ghost_base["revision"]
        passed = {key: value for key, value in hub.items() if key != "revision"}
        patterns = ["*.json", "*.safetensors"]
        root = Path(snapshot_download(str(place), revision=revision, allow_patterns=patterns, **passed))
    _require_base(root, noted["base"], name)
    names = {entry["base"]: new for new, entry in noted["tensors"].items() if entry["base"] is not None}
    found = {}
    for shard in noted["base"]["shards"]:
        with safe_open(root / shard, "pt") as file:
            found.update({names[key]: file.get_tensor(key) for key in file.keys() if key in names})  # noqa: SIM118
    with safe_open(own, "pt") as file:
        found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found


def _require_base(root: Path, noted: dict[str, Any], name: Any) -> None:
    """Check configuration, headers and a sample of each tensor of a base.

    Raises:
        ValueError: If they are not those that were noted.
    """
    config = root / "config.json"
    same = config.is_file() and _digest(config.read_bytes()) == noted["config"]
    for shard, known in noted["shards"].items():
        same = same and (root / shard).is_file() and _shard_identity(root / shard) == known
    if not same:
        msg = f"{root} is not the model that the adapter {name} was made of; give that one as base"
        raise ValueError(msg)


def _shard_identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        begin, sample = 8 + len(header), hashlib.sha256()
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for first, last in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
            file.seek(begin + first + max(0, last - first - _SAMPLE_BYTES) // 2)
            sample.update(file.read(min(_SAMPLE_BYTES, last - first)))
    sampled = f"sha256:{sample.hexdigest()}"
    return {"header": _digest(header), "bytes": path.stat().st_size, "sample": sampled}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def __getattr__(name: str) -> Any:
    """Make ``Ghosted<Name>`` from the transformers class ``<Name>``."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    kinds = base.__mro__ if isinstance(base, type) else ()
    if transformers.PreTrainedConfig in kinds:
        made = _config_class(name, base)
    elif transformers.PreTrainedModel in kinds:
        made = _model_class(name, base)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return globals().setdefault(name, made)


def _config_class(name: str, base: Any) -> Any:
    members = {
        "model_type": f"{TYPE_PREFIX}{base.model_type}",
        "_auto_class": "AutoConfig",
        "__module__": __name__,
    }
    return type(name, (base,), members)


def _model_class(name: str, base: Any) -> Any:
    config_name = f"{PREFIX}{base.config_class.__name__}"
    config = globals().get(config_name) or __getattr__(config_name)
    auto_class = next((auto for suffix, auto in _AUTO_CLASSES.items() if name.endswith(suffix)), None)
    members = {"config_class": config, "_auto_class": auto_class, "__module__": __name__}
    # transformers answers these from the source of a class's module, which here is not that of the layers.
    # Experts would be computed in another way than in the base until a model of the base was made.
    for question in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(base, question):
            members[question] = staticmethod(getattr(base, question))
    _share_conversions(base.__name__, name)
    _share_conversions(base.config_class.model_type, config.model_type)
    # Named again among the bases because transformers looks for it there, and nowhere else, in custom code.
    generation = (transformers.GenerationMixin,) if base.can_generate() else ()
    return type(name, (GhostedMixin, base, *generation), members)


def _share_conversions(source: str, target: str) -> None:
    """Let a recovered checkpoint keep the tensor names of its base, which transformers renames on load."""
    try:
        from transformers import conversion_mapping as conversions

        mapping = conversions.get_checkpoint_conversion_mapping(source)
    except (ImportError, AttributeError):
        return
    if mapping is not None:
        conversions.register_checkpoint_conversion_mapping(target, mapping, overwrite=True)
