"""``python -m ghoststream.cli.lm_eval``: lm-evaluation-harness with the model ``ghoststream``.

Releases of the harness after 0.4.13 find the model by the entry point ``lm_eval.models``, and need no other
command than their own.
"""

from __future__ import annotations

NAME, TARGET = "ghoststream", "ghoststream.stages.measuring.harness_model:StreamedLM"


def register() -> None:
    """Make the harness know the model."""
    import lm_eval.models  # noqa: F401 - registers the harness's own models, which come first
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def run() -> None:
    """Register the model and run the harness's own command."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    run()
