"""Commands of the pages: each can be given, and each is run here, by another test, or marked by its needs.

A comment ``<!-- card hub -->`` in front of a block of commands says that it needs more than this machine.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

from ghoststream.cli import main
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers.command_bench import run

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *(ROOT / "docs").rglob("*.md")])
#: An accelerator; models or data of the hub; other machines; data or a model that is not in this repository.
NEEDS = {"card", "hub", "cluster", "data"}
PROGRAMS = ("ghoststream", "lm_eval", "make", "pip", "python")
_BLOCK = re.compile(r"(?:<!-- ([a-z ]+) -->\n\n)?((?:^    .*\n)+)", re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _commands(page: Path, program: str) -> Iterator[tuple[set[str], list[str]]]:
    """Give each command of a page with what its block is marked by."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8") + "\n", flags=re.DOTALL)
    for needs, block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith(f"    {program} ") else []
            if words:
                yield set(needs.split()), words


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_can_be_given_and_marks_are_known(page: Path) -> None:
    for program in PROGRAMS:
        for needs, words in _commands(page, program):
            assert needs <= NEEDS, words
            if program == "ghoststream":
                command = main.get_command(click.Context(main), words[1])
                assert command is not None
                given = [re.sub(r"^N$", "4", word) for word in words[2:]]
                command.make_context(words[1], given)
            elif program == "python" and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), words
            elif program == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), words


@pytest.mark.unit
def test_commands_that_ask_the_hub_say_so() -> None:
    for page in PAGES:
        for needs, words in [*_commands(page, "ghoststream"), *_commands(page, "lm_eval")]:
            line = " ".join(words)
            named = re.search(r"--calibration c4|org/name|meta-llama|--tasks (?!local)", line)
            assert not named or "hub" in needs, f"{_name(page)}: {line}"
            # What is estimated for another machine needs nothing of this one.
            on_card = "--device cuda" in line and "--machine" not in line
            assert not on_card or "card" in needs, f"{_name(page)}: {line}"
            assert not re.search(r"s3://|tcp://", line) or "cluster" in needs, f"{_name(page)}: {line}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "MODEL"
    save_tiny("llama", folder, num_hidden_layers=24, max_position_embeddings=1024)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _small(words: list[str]) -> list[str]:
    """Return a command with fewer and shorter windows, and a file for the text."""
    words = [re.sub(r"^SPEC$", "file:text.txt", re.sub(r"^N$", "4", word)) for word in words]
    takes_text = {"--calibration", "--text"} & set(words)
    return [*words, "--sequences", "24", "--length", "32"] if takes_text else words


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=_name)
def test_commands_that_need_nothing_run(
    page: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [words[1:] for needs, words in _commands(page, "ghoststream") if not needs]
    if not commands:
        pytest.skip("no command of this page is run here")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "MODEL")
    shutil.copytree(ROOT / "pipelines", "pipelines")
    letters = np.random.default_rng(0).integers(97, 123, size=24 * 64)
    for name in {*re.findall(r"file:(\S+)", str(commands)), "text.txt"}:
        Path(name.strip("',]")).write_text("".join(map(chr, letters)))
    for words in map(_small, commands):
        if "--out" in words:  # pages give one name to results of several commands
            out = Path(words[words.index("--out") + 1])
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        result = run(*words)
        assert result.exit_code == 0, (words, result.stderr)
