"""Runs commands one after another, each in a fork of a process that has imported what they need.

A job is a line of JSON on standard input: arguments, seconds, and what a preloaded library shall make fail;
or code with its arguments and environment, which runs in the place of a command.
The answer is a line on standard output: the exit code, None for a command that had to be killed, what it
wrote, and how many calls of each kind were counted.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ghoststream.cli.main import COMMANDS, main

MODULES = (
    *(f"ghoststream.cli.{name}" for name in COMMANDS if name != "demo"),
    "ghoststream.stages.artifacts.inspect",
    "ghoststream.stages.artifacts.verify",
    "ghoststream.stages.capturing.run",
    "ghoststream.stages.choosing.search",
    "ghoststream.stages.estimation.estimate",
    "ghoststream.stages.export",
    "ghoststream.stages.fit",
    "ghoststream.stages.measuring.evaluate",
    "ghoststream.stages.pipeline",
    "ghoststream.stages.recover",
    "ghoststream.stages.select",
    "ghoststream.activations",
    "ghoststream.statistics",
    "dask.delayed",
    "distributed",
    "safetensors.torch",
    "tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
MEMORY = 8 * 2**30


def serve() -> None:
    """Answer jobs until the input ends."""
    if "--light" not in sys.argv:
        for name in MODULES:
            importlib.import_module(name)
        # Made once, of a thousand regular expressions; it would be most of the time of many a command.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as counts:
        pid = os.fork()
        if not pid:
            _child(job, out.fileno(), err.fileno(), counts.fileno())
        code = _wait(pid, job["seconds"])
        texts = []
        for file in (out, err, counts):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    calls = json.loads(texts[2] or "{}")
    out_ = texts[0] if "code" in job else texts[0][-100_000:]
    return {"exit_code": code, "stdout": out_, "stderr": texts[1][-8000:], "calls": calls}


def _child(job: dict[str, Any], out: int, err: int, counts: int) -> None:
    code, fail = 70, job.get("fail")
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if fail:
            ctypes.CDLL(None).fail_call(
                fail["call"].encode(), fail["number"], fail["nth"], fail["under"].encode()
            )
        try:
            if "code" in job:
                _run_code(job)
            else:
                main(job["arguments"], prog_name="ghoststream")
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1 if exit_.code else 0
    except BaseException:  # noqa: BLE001 - shown to whoever asked
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            if fail:
                made = {call: ctypes.CDLL(None).calls_made(call.encode()) for call in fail["counted"]}
                os.write(counts, json.dumps(made).encode())
        finally:
            os._exit(code)


def _run_code(job: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["-c", *job["arguments"]]
    exec(compile(job["code"], "-c", "exec"), {"__name__": "__main__"})


def _wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a child (minus the signal that ended it); None if it had to be killed."""
    child = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([child], [], [], seconds)
        if not ready:
            os.killpg(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        return os.waitstatus_to_exitcode(status) if ready else None
    finally:
        os.close(child)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    serve()
