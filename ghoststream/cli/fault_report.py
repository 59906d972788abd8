"""What a user can send when the program is at fault: versions, command and last frames, without secrets."""

from __future__ import annotations

import platform
import re
import shlex
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ghoststream.redaction import without_secrets

_MOST_FRAMES = 8
_OWN_FRAMES = 4
_MOST_CHARACTERS = 600
# Those that an error may come out of; none is imported for the report.
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "zarr", "dask", "numpy")
_NAMES = r"passw(?:or)?d|secret|api[_-]?key|access[_-]?key|(?:auth|access)[_-]?token|signature|credential"
_TOKENS = "hf_|ghp_|gho_|github_pat_|sk-|AKIA|ASIA|glpat-|xox[abp]-"
_SECRETS = (
    # Tokens that say what they are: of the Hugging Face hub, of Amazon, of GitHub, of other services.
    (re.compile(rf"\b({_TOKENS})[A-Za-z0-9_-]{{8,}}"), r"\1***"),
    (re.compile(r"\bBearer\s+[^\s'\"]+", re.IGNORECASE), "Bearer ***"),
    # What is called a secret: password=..., "api_key": "...", --api-key ..., token=...
    (
        re.compile(
            rf"\b([\w-]*(?:{_NAMES})s?[\w-]*)(['\"]?\s*[=:]\s*['\"]?|\s+)([^\s'\",;&]+)", re.IGNORECASE
        ),
        r"\1\2***",
    ),
    (
        re.compile(r"\b((?:hf[_-]?)?token)(['\"]?\s*[=:]\s*['\"]?)([^\s'\",;&]{8,})", re.IGNORECASE),
        r"\1\2***",
    ),
)
_ROOTS = sorted({str(Path(folder).resolve()) for folder in sys.path if folder}, key=len, reverse=True)


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown (not installed)"


def fault_report(error: BaseException, arguments: list[str]) -> str:
    """Describe an error that nobody foresaw.

    Args:
        error: What was raised.
        arguments: The command line behind the name of the program.

    Returns:
        A few lines: versions of ghoststream, Python and the libraries that are loaded; the command; the
        error; the last frames, with paths as their packages have them. Passwords, tokens and signatures are
        hidden, and nothing of the environment is in it.
    """
    loaded = [f"{name} {installed_version(name)}" for name in _LIBRARIES if name in sys.modules]
    system = f"{platform.system()} {platform.machine()}"
    versions = [f"ghoststream {installed_version('ghoststream')}", f"Python {platform.python_version()}"]
    lines = [
        "----- report of a fault in ghoststream -----",
        f"versions: {', '.join([*versions, *loaded, system])}",
        f"command:  {_cut(shlex.join(['ghoststream', *arguments]))}",
        f"error:    {type(error).__name__}: {_cut(' '.join(str(error).split()))}",
        *(f"  {line}" for line in _frames(error)),
        "----- end of the report -----",
    ]
    return _hidden("\n".join(lines))


def _hidden(text: str) -> str:
    """Hide what may be secret in a command line, not in addresses alone, and where the user's home is."""
    text = without_secrets(text)
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _frames(error: BaseException) -> list[str]:
    """Return the last frames, and before them the last ones of our own where they are farther up."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames[:-_MOST_FRAMES] if "/ghoststream/" in frame.filename]
    return [
        f"{_place(frame.filename)}:{frame.lineno} in {frame.name}"
        for frame in (*ours[-_OWN_FRAMES:], *frames[-_MOST_FRAMES:])
    ]


def _place(filename: str) -> str:
    root = next((root for root in _ROOTS if filename.startswith(f"{root}/")), None)
    return filename if root is None else filename[len(root) + 1 :]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
