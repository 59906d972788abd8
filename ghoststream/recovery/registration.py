"""Making transformers' auto classes know recovered models, without importing transformers.

Importing torch and transformers takes seconds, so nothing is imported here. If transformers' auto classes are
loaded already, small stand-ins are registered at once, otherwise right after somebody loads them. A stand-in
imports the modelling file when a recovered model is really met.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO_MODULE = "transformers.models.auto.configuration_auto"
_MODELING = "ghoststream.recovery.modeling_ghosted"
_PREFIX = "ghosted_"
_ARCHITECTURES = "ghoststream.checkpoint.architecture"


def register_auto_classes() -> None:
    """Let ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` load recovered models by themselves.

    Calling it again changes nothing. The modelling file of this installation is then used instead of the one
    in the checkpoint's folder.
    """
    module = sys.modules.get(_AUTO_MODULE)
    if module is not None and hasattr(module, "AutoConfig"):
        _register_stand_ins(module)
    elif not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())


class _AutoModuleFinder(MetaPathFinder):
    """Steps aside after it saw the auto classes' module being imported once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers the stand-ins with it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_stand_ins(module)


def _register_stand_ins(auto: ModuleType) -> None:
    architectures = importlib.import_module(_ARCHITECTURES).ARCHITECTURES
    for base in architectures:
        base_class = auto.CONFIG_MAPPING_NAMES.get(base)
        if base_class is not None:
            stand_in = _stand_in(f"{_PREFIX}{base}", f"Ghosted{base_class}")
            auto.AutoConfig.register(stand_in.model_type, stand_in, exist_ok=True)


def _stand_in(model_type: str, class_name: str) -> Any:
    """Make a class that stands for a configuration class until that is needed."""

    def create(_: type, *args: Any, **kwargs: Any) -> Any:
        return _load(model_type, class_name)(*args, **kwargs)

    def from_dict(_: type, *args: Any, **kwargs: Any) -> Any:
        return _load(model_type, class_name).from_dict(*args, **kwargs)

    members = {
        "__module__": _MODELING,
        "__new__": create,
        "from_dict": classmethod(from_dict),
        "model_type": model_type,
    }
    return type(class_name, (), members)


def _load(model_type: str, class_name: str) -> Any:
    """Put the real classes in the stand-in's place and return the configuration class."""
    import transformers

    modeling = importlib.import_module(_MODELING)
    config = getattr(modeling, class_name)
    base = next(parent for parent in config.__mro__[1:] if parent.__module__.startswith("transformers."))
    transformers.AutoConfig.register(model_type, config, exist_ok=True)
    for auto, mapping in (
        (transformers.AutoModel, transformers.MODEL_MAPPING),
        (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        auto.register(config, getattr(modeling, f"Ghosted{mapping[base].__name__}"), exist_ok=True)
    return config
