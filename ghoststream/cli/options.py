"""Command line options made of the fields of :mod:`ghoststream.options`, and those that every command has."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ghoststream.errors import RequestError
from ghoststream.option_types import Options, flag, problems
from ghoststream.options import Recovery, Resume, Text

_DEBUG_KEY = "ghoststream.debug"
ALL_KEY = "ghoststream.all"
"""Set in the context where a help shows all options."""


class SectionOption(click.Option):
    """An option that stands under a heading of the help, and not always in a short one.

    Args:
        *args: What ``click.Option`` takes.
        section: Heading in the help.
        usual: Whether a short help shows it.
        **kwargs: What ``click.Option`` takes.
    """

    def __init__(self, *args: Any, section: str, usual: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section, self.usual = section, usual

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the text of the help: its first line in a short one."""
        text = self.help or ""
        is_short = getattr(ctx.command, "is_short", False) and not ctx.meta.get(ALL_KEY)
        self.help = text.partition("\n")[0] if is_short else " ".join(text.split("\n"))
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = text


class FieldOption(SectionOption):
    """An option that stands for a field of a group of options: name and words are the field's."""


class FieldType(click.ParamType[Any]):
    """Values that pydantic checks as it does the field."""

    def __init__(self, field: FieldInfo, metavar: str) -> None:
        self.name = metavar
        annotation: Any = field.annotation
        constrained: Any = Annotated[annotation, *field.metadata] if field.metadata else annotation
        self._annotation = constrained

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of the field."""
        try:
            return TypeAdapter(self._annotation).validate_python(value)
        except ValidationError as error:
            found = problems(error)[0]
            self.fail(found if repr(value) in found else f"{value!r}: {found}", param, ctx)


class Part(NamedTuple):
    """Some fields of a group, under a title of their own."""

    group: type[Options]
    fields: tuple[str, ...]
    title: str


def grouped(**groups: type[Options] | Part) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of some groups, and hand it an object for each.

    Only what was given is set in the objects, so that a stage can refuse by name what it would not use. A
    group that is a :class:`~ghoststream.options.Text` gets its specification by an option of the parameter's
    name, which may be given more than once, and is None without it.

    Args:
        **groups: The group, or a part of it, for each parameter of the command.
    """
    parts = {name: _part(group) for name, group in groups.items()}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            context = click.get_current_context()
            given = {
                name: value
                for name, value in values.items()
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            }
            for name, (group, fields, _) in parts.items():
                own = {key: given[key] for key in fields if key in given}
                for key in fields:
                    del values[key]
                values[name] = _text(name, values.pop(name), own) if group is Text else group.make(own)
            return command(**values)

        update_wrapper(run, command)
        for name, (group, fields, title) in reversed(parts.items()):
            for key in reversed(fields):
                run = _option(key, group.model_fields[key], title)(run)
            if group is Text:
                run = _spec_option(name)(run)
        return run

    return decorate


def _part(group: type[Options] | Part) -> Part:
    if isinstance(group, Part):
        return group
    fields = tuple(name for name in group.model_fields if not (group is Text and name == "spec"))
    return Part(group, fields, group.title)


def field_option(group: type[Options], name: str, *, section: str = "") -> Callable[[Any], Any]:
    """Return the option of one field, for a command that takes a part of a group."""
    return _option(name, group.model_fields[name], section or group.title)


def _spec_option(name: str) -> Callable[[Any], Any]:
    role = "calibrate on" if name == "calibration" else "measure on"
    text = f"Text to {role}: {Text.model_fields['spec'].description!s}"
    return click.option(
        flag(name),
        metavar="SPEC",
        help=text,
        cls=FieldOption,
        section=Text.title,
        usual=True,
        multiple=True,
    )


def _text(name: str, specs: tuple[str, ...], given: dict[str, Any]) -> Text | None:
    if specs:
        return Text.make({**given, "spec": specs})
    if given:
        msg = f"{', '.join(map(flag, given))} would not be used without {flag(name)}; leave it out"
        raise RequestError(msg)
    return None


def _option(name: str, field: FieldInfo, section: str) -> Callable[[Any], Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    annotation = _without_none(field.annotation)
    names = [flag(name)]
    settings: dict[str, Any] = {}
    if annotation is bool:
        settings["is_flag"] = True
        if field.default:
            names = [f"{flag(name)}/--no-{name.replace('_', '-')}"]
    elif get_origin(annotation) is Literal:
        settings["type"] = click.Choice(get_args(annotation))
    else:
        settings["type"] = FieldType(field, str(extra.get("metavar", "VALUE")))
    shown = not field.is_required() and field.default is not None and field.default is not False
    settings = {"default": None if field.is_required() else field.default, "show_default": shown, **settings}
    settings |= {"help": field.description, "required": field.is_required()}
    if "bare" in extra:
        settings |= {"is_flag": False, "flag_value": extra["bare"]}
    usual = bool(extra.get("usual", False))
    return click.option(*names, name, cls=FieldOption, section=section, usual=usual, **settings)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [one for one in get_args(annotation) if one is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _set_debug(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    del param
    if value:
        ctx.meta[_DEBUG_KEY] = True


def is_debug(ctx: click.Context) -> bool:
    """Tell whether ``--debug`` was given, before or after the command's name."""
    return bool(ctx.meta.get(_DEBUG_KEY, False))


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show the traceback of an error.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)
log_option = click.option(
    "--log",
    metavar="FILE.jsonl|wandb|mlflow|trackio",
    help="Also log every figure: a line behind those of a file, or in a run of a tracker for each model.",
)
resume_option = click.option(
    "--resume",
    type=click.Choice(get_args(Resume)),
    default="auto",
    show_default=True,
    help="Go on with an earlier attempt: if there is one, in any case, or not at all.",
)
page_option = click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    cls=SectionOption,
    section="Result",
    usual=False,
    help="HTML page of the run to write at the end.\nThis machine is measured for two seconds first, for the "
    "times that it should take.",
)
model_argument = click.argument("model")
model_option = click.option("--model", metavar="MODEL", help="Checkpoint folder or hub id.")
store_option = click.option(
    "--store", metavar="STORE", help="Activation store to read, in the place of --calibration."
)
remove_option = click.option(
    "--remove",
    required=True,
    metavar="N|PLAN",
    help=Recovery.model_fields["remove"].description,
)


def out_option(metavar: str, help_text: str, *, required: bool = True) -> Callable[[Any], Any]:
    """Return ``--out`` for a command that writes ``metavar``."""
    return click.option(
        "--out", type=click.Path(path_type=Path), metavar=metavar, required=required, help=help_text
    )
