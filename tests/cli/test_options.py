"""One declaration of every option: command line, pipeline file and Python agree, and names in help are those
there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import yaml
from click.testing import CliRunner
from pydantic.fields import FieldInfo

from ghoststream.cli import main
from ghoststream.cli.main import COMMANDS
from ghoststream.cli.options import FieldOption
from ghoststream.operators import make_operator, operator_names
from ghoststream.option_types import Options, flag
from ghoststream.options import (
    AUTO,
    Compute,
    Exploration,
    Method,
    Recovery,
    Reduction,
    Search,
    Source,
    Storage,
    Text,
    Training,
)
from ghoststream.selection import criterion_names, make_criterion
from ghoststream.stages.choosing.criteria import make_search_criterion, search_criterion_names
from ghoststream.stages.pipeline import load_pipeline
from ghoststream.statistics import feature_names, get_feature, get_token_weight, token_weight_names

pytestmark = pytest.mark.unit

GROUPS: dict[str, type[Options]] = {
    "calibration": Text,
    "search": Search,
    "method": Method,
    "compute": Compute,
    "storage": Storage,
    "reduction": Reduction,
}
FIELDS = [(part, name) for part, group in GROUPS.items() for name in group.model_fields if name != "spec"]
ONLY_IN_FILES = {"name", "description", "evaluate"}
MOST_LINES, COLUMNS = 60, 80


def _command(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


def _options(command: str) -> dict[str, click.Option]:
    return {
        str(one.name): one
        for one in _command(command).params
        if isinstance(one, click.Option) and one.name is not None
    }


def _help(*arguments: str, width: int = COLUMNS) -> str:
    result = CliRunner().invoke(main, list(arguments), terminal_width=width)
    assert result.exit_code == 0, result.output
    return str(result.output)


def _words(text: str) -> str:
    """Return a text without what a line break makes of it."""
    return re.sub(r"\s+", "", text)


def _require_declared(option: click.Option, field: FieldInfo) -> None:
    assert option.help == field.description
    assert option.required == field.is_required()
    assert option.default == (None if field.is_required() else field.default)


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_recover_has_every_field_as_it_is_declared(part: str, name: str) -> None:
    option = _options("recover")[name]
    assert isinstance(option, FieldOption)
    assert flag(name) in option.opts
    assert option.section == GROUPS[part].title
    _require_declared(option, GROUPS[part].model_fields[name])


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_the_full_help_says_all_of_every_field(part: str, name: str) -> None:
    text = _words(_help("recover", "--help-all"))
    assert flag(name) in text
    assert _words(str(GROUPS[part].model_fields[name].description)) in text


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_a_pipeline_file_has_every_field_with_the_same_words(part: str, name: str) -> None:
    group = GROUPS[part]
    schema = Recovery.model_json_schema()["$defs"][group.__name__]["properties"][name]
    assert schema["description"] == group.model_fields[name].description
    assert type(getattr(_recovery(), part)) is group


def test_recover_has_the_fields_of_a_recovery_itself() -> None:
    options = {option.name for option in _command("recover").params}
    assert set(Recovery.model_fields) - set(GROUPS) - ONLY_IN_FILES <= options
    assert _options("recover")["store"].help == Recovery.model_fields["store"].description
    assert {"calibration", *options} >= {"remove", "model", "out"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_words_a_field_of_its_own(command: str) -> None:
    groups: list[type[Options]] = [*GROUPS.values(), Exploration, Training, Recovery]
    declared = [
        (name, field) for group in groups for name, field in group.model_fields.items() if name != "spec"
    ]
    specs = ("calibration", "text")
    for name, option in _options(command).items():
        if isinstance(option, FieldOption) and name not in specs:
            found = [one for key, one in declared if key == name and one.description == option.help]
            assert found, name
            _require_declared(option, found[0])


@pytest.mark.parametrize("name", Training.model_fields)
def test_distill_has_every_field_of_a_training(name: str) -> None:
    _require_declared(_options("distill")[name], Training.model_fields[name])


@pytest.mark.parametrize("command", ["recover", "estimate"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), None),
        (("--distill",), Training()),
        (("--distill", "40"), Training(steps=40)),
        (("--distill", "--sequences", "8"), Training()),
    ],
)
def test_a_training_may_have_a_number_of_steps(
    command: str, words: tuple[str, ...], expected: Training | None
) -> None:
    context = _command(command).make_context(command, ["MODEL", *words, "--remove", "2", "--out", "o"])
    assert context.params["model"] == "MODEL"
    assert context.params["distill"] == expected
    _require_declared(_options(command)["distill"], Recovery.model_fields["distill"])


@pytest.mark.parametrize("name", Exploration.model_fields)
def test_explore_has_every_field_of_an_exploration(name: str) -> None:
    _require_declared(_options("explore")[name], Exploration.model_fields[name])


@pytest.mark.parametrize("command", ["select", "fit"])
def test_sources_are_named_alike(command: str) -> None:
    assert set(Source.model_fields) <= set(_options(command))


def _recovery(**parts: Any) -> Recovery:
    return Recovery.make({"remove": 2, "model": "MODEL", "calibration": "ptb", **parts})


def _sample(field: FieldInfo) -> str:
    """Return a value that is not the default, as it is typed."""
    annotation: Any = field.annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind is not type(None)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return str(next(value for value in reversed(get_args(kind)) if value != field.default))
    names = " ".join(map(str, kinds))
    if "tuple" in names:
        return "1:3,5"
    if "_parse_bytes" in names or "_parse_bytes" in str(field.metadata):
        return "3GiB"
    if "int" in names or "float" in names:
        return "3"
    return "some-name"


def _typed(field: FieldInfo) -> tuple[list[str], Any]:
    """Return words of a command line, and the value of a pipeline file, that say the same."""
    if field.annotation is bool:
        return [], not field.default
    sample = _sample(field)
    return [sample], yaml.safe_load(sample)


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_a_field_means_the_same_everywhere(
    part: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = GROUPS[part].model_fields[name]
    words, value = _typed(field)
    given = [flag(name) if value is not False else f"--no-{name}", *words]
    seen: list[Recovery] = []

    def run(recovery: Recovery, out: Path, *, resume: str, measure: bool, progress: object) -> None:
        del out, resume, measure, progress
        seen.append(recovery)
        raise KeyboardInterrupt

    monkeypatch.setattr("ghoststream.stages.recover.run", run)
    command = ["recover", "MODEL", "--remove", "2", "--calibration", "ptb", "--out", str(tmp_path / "out")]
    CliRunner().invoke(main, [*command, *given])
    inside = {"spec": "ptb", name: value} if part == "calibration" else {name: value}
    path = tmp_path / "recovery.yaml"
    file = {"remove": "2", "model": "MODEL", "calibration": "ptb", part: inside}
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    seen.append(load_pipeline(path))
    seen.append(_recovery(**{part: GROUPS[part](**inside)}))
    for recovery in seen:
        found = getattr(recovery, part)
        assert found == getattr(seen[0], part)
        assert found.given() == (("spec", name) if part == "calibration" else (name,))
        assert getattr(found, name) != field.default
    assert len(seen) == 3


def _own(names: tuple[str, ...], make: Any) -> set[str]:
    """Return the names of what this package registers, whatever tests registered beside it."""
    made = {name: make(name) for name in names}
    return {
        name
        for name, one in made.items()
        if getattr(one, "__module__", type(one).__module__).startswith("ghoststream.")
    }


def _listed(text: str, lead: str = r":") -> set[str]:
    """Return the names in the lists of a text: what stands between a colon and the end of a sentence."""
    plain = re.sub(r" ?\([^)]*\)", "", text)
    lists = re.findall(rf"{lead} ([^:.]+)\.", plain)
    return {name for one in lists for name in re.split(r", | or ", one)}


def _text(group: type[Options], name: str) -> tuple[str, str]:
    first, _, rest = str(group.model_fields[name].description).partition("\n")
    return first, rest


def test_the_help_lists_the_operators_there_are() -> None:
    first, rest = _text(Method, "operator")
    examples = set(re.split(r", | or ", re.findall(r"e\.g\. ([^.]+)\.", first)[0]))
    there = _own(operator_names(), lambda name: make_operator(Method(operator=name)))
    assert _listed(rest) | examples == there | {AUTO}


def test_the_help_lists_the_criteria_there_are() -> None:
    _, rest = _text(Search, "criterion")
    there = _own(criterion_names(), make_criterion) | _own(search_criterion_names(), make_search_criterion)
    assert _listed(rest) == there


def test_the_help_lists_the_features_there_are() -> None:
    first, rest = _text(Method, "features")
    plain = re.sub(r" ?\([^)]*\)", "", rest)
    named = {
        name for one in re.split(r"[;,.]| or | which ", plain) if (name := one.strip()) and " " not in name
    }
    there = _own(feature_names(), get_feature)
    assert named == there
    assert set(re.split(r", | or ", re.findall(r"e\.g\. ([^.]+)\.", first)[0])) <= there


def test_the_help_lists_the_token_weights_there_are() -> None:
    first, rest = _text(Method, "token_weights")
    there = _own(token_weight_names(), get_token_weight)
    assert _listed(first) == there
    assert set(re.findall(r"(\w+):", rest)) <= there


@pytest.mark.parametrize("command", ["recover", "estimate"])
def test_a_short_help_fits_one_screen_and_shows_what_must_be_given(command: str) -> None:
    shown = _help(command, "--help")
    lines = shown.splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= COLUMNS
    required = [one for one in _command(command).params if one.required and isinstance(one, click.Option)]
    # Which of two has to be given is no matter of one option.
    either = {"recover": ["--calibration"], "estimate": ["--remove", "--explore"]}[command]
    for name in [*either, *(option.opts[0] for option in required)]:
        assert re.search(rf"^  {name} ", shown, flags=re.MULTILINE), name
    assert "--help-all" in shown


@pytest.mark.parametrize("command", ["recover", "estimate"])
def test_the_full_help_shows_every_option(command: str) -> None:
    shown = _help(command, "--help-all")
    for option in _command(command).params:
        if isinstance(option, click.Option):
            assert re.search(rf"^  {option.opts[0]}\b", shown, flags=re.MULTILINE), option.opts
    hidden = {str(one.name) for one in _unusual(command)}
    assert hidden
    short = _help(command, "--help")
    assert not [name for name in hidden if re.search(rf"^  {flag(name)}\b(?!-)", short, flags=re.MULTILINE)]


def _unusual(command: str) -> Iterator[FieldOption]:
    for option in _command(command).params:
        if isinstance(option, FieldOption) and not option.usual:
            yield option
