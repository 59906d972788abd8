"""Commands in a process of their own that gets a signal while it reads a layer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tests.helpers.command_bench import REPOSITORY

_AT_A_LAYER = """
import os, signal, sys
# A shell without job control has what it starts in the background ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ghoststream.streaming.skeleton import Skeleton
read = Skeleton.read_layer

def stopped(self, layer):
    if layer == {layer}:
        os.kill(os.getpid(), signal.{name})
    return read(self, layer)

Skeleton.read_layer = stopped
from ghoststream.__main__ import run
run()
"""


def signalled(name: str, layer: int) -> str:
    """Return the code of a command line that sends itself a signal when that layer is read."""
    return _AT_A_LAYER.format(name=name, layer=layer)


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; standard error is kept."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )
