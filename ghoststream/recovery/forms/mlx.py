"""The form that mlx-lm loads, on Apple's processors and others."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.options import Method
from ghoststream.recovery.forms.custom import Custom
from ghoststream.recovery.forms.form import WriteRequest

if TYPE_CHECKING:
    from ghoststream.operators import OperatorSet
    from ghoststream.recovery.export import ExportReport
    from ghoststream.streaming import Skeleton

MODEL_TYPES = (
    "cohere",
    "ernie4_5",
    "gemma2",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "stablelm",
)
"""Types of models that mlx-lm computes as transformers does; each was compared, logit by logit."""
_WITH_WINDOWS = ("gemma2", "olmo3")
"""Those among them whose sliding windows it computes."""
_ROPES = ("default", "linear", "llama3", "yarn")
_MODEL_FILE = Path(__file__).parents[1] / "ghosted_mlx.py"
_ADVICE = "write the form custom, and run it with transformers"


class Mlx(Custom):
    """The form ``custom``, with a module beside it that makes mlx-lm's own model with the operators in it.

    The configuration names the module (``model_file``), and says what transformers leaves out because it is
    its default. mlx-lm has other defaults.
    """

    name = "mlx"
    meaning = "the form custom with a modelling file for mlx-lm; holds every operator exactly"
    loads = "mlx-lm with trust_remote_code, and what loads the form custom"
    cost = Custom.cost

    def runs(self, out: Path) -> str:
        """Return the command of mlx-lm."""
        return shlex.join(
            ["mlx_lm.generate", "--model", str(out), "--trust-remote-code", "--prompt", "Hello"]
        )

    def check_model(self, skeleton: Skeleton, methods: Sequence[Method]) -> None:
        """Check that mlx-lm computes models of this type as transformers does.

        Raises:
            UnsupportedModelError: If it does not, or that is not known.
        """
        del methods
        _require_equal(skeleton.config)

    def check(self, operators: OperatorSet, skeleton: Skeleton) -> None:
        """Check what :meth:`check_model` checks; every operator has a place."""
        del operators
        _require_equal(skeleton.config)

    def _write(self, request: WriteRequest) -> ExportReport:
        from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES
        from ghoststream.recovery.config_spelling import finite_form
        from ghoststream.recovery.export import export_job
        from ghoststream.recovery.job import plain_config, prepare_export

        job = prepare_export(
            request.skeleton,
            request.operators,
            max_shard_bytes=request.max_shard_bytes or DEFAULT_SHARD_BYTES,
            operator_dtype=request.operator_dtype,
            fingerprint=request.fingerprint,
        )
        config = {**finite_form(plain_config(job.config).to_dict()), **job.config}
        beside: Mapping[str, bytes] = {}
        if job.stands:
            config["model_file"] = _MODEL_FILE.name
            beside = {_MODEL_FILE.name: _MODEL_FILE.read_bytes()}
        job = replace(job, config=config, beside=beside, notes=request.notes)
        return export_job(job, request.out, lock=request.lock, progress=request.progress)


def _require_equal(config: Any) -> None:
    from transformers import CONFIG_MAPPING

    from ghoststream.checkpoint.configuration import plain_type

    model_type = plain_type(config)
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        msg = f"models of type {model_type} are not written for mlx-lm ({known} are); {_ADVICE}"
        raise UnsupportedModelError(msg)
    rope = getattr(config, "rope_parameters", None) or {}
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    usual = CONFIG_MAPPING[model_type]()
    refused = {
        "quantization_config": getattr(config, "quantization_config", None) is not None,
        "hidden_act": getattr(config, "hidden_act", None) != getattr(usual, "hidden_act", None),
        "rope_parameters": model_type not in _WITH_WINDOWS and rope.get("rope_type", "default") not in _ROPES,
        "sliding_window": bool(getattr(config, "sliding_window", None))
        and slides
        and model_type not in _WITH_WINDOWS,
    }
    for field, is_refused in refused.items():
        if is_refused:
            msg = (
                f"mlx-lm computes {field} of this {model_type} ({getattr(config, field, None)}) in another "
                f"way than transformers, or it is not known whether it does; {_ADVICE}"
            )
            raise UnsupportedModelError(msg)
