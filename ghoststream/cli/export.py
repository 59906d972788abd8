"""``ghoststream export``."""

from __future__ import annotations

from pathlib import Path

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, field_option, json_option, model_argument, out_option
from ghoststream.cli.output import human_bytes, next_command, print_facts, print_json, print_next
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Form, GgufType, Recovery


@click.command(
    "export",
    cls=Command,
    short_help="Write the recovered checkpoint.",
    example="ghoststream export models/llama --operators operators.safetensors --out recovered/",
)
@model_argument
@click.option(
    "--operators",
    type=click.Path(path_type=Path),
    metavar="OPERATORS",
    help="File from `ghoststream fit`; it also says which layers go. Without it MODEL is written as it is.",
)
@out_option(
    "DIR", "Folder of the recovered checkpoint; must be empty, absent, or the result of this command."
)
@field_option(Recovery, "form", section="Result")
@field_option(Recovery, "gguf_type", section="Result")
@field_option(Compute, "revision")
@json_option
@debug_option
def command(
    model: str,
    *,
    operators: Path | None,
    out: Path,
    form: Form,
    gguf_type: GgufType,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write MODEL without the removed layers and with the operators in their place, as a checkpoint folder.

    Weights are copied from shard to shard, one tensor in memory at a time. The folder loads in any
    transformers with from_pretrained(DIR, trust_remote_code=True), or without that after `import
    ghoststream`.
    """
    from ghoststream.stages.export import export

    with show_progress() as progress:
        report = export(
            model, operators, out, form=form, gguf_type=gguf_type, revision=revision, progress=progress
        )
    if as_json:
        print_json(report.to_json())
        return
    print_facts(
        {
            "folder": report.out,
            "model type": report.model_type,
            "layers": f"{report.layers_before} -> {report.layers_after}",
            "parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}",
            "bytes": f"{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}",
            "shards": report.shards,
        },
        title="exported",
    )
    print_next(form, out, next_command("evaluate", model, out, "--text", "wikitext2:test"))
