"""The console script; ``python -m ghoststream`` is the same."""

from __future__ import annotations

import signal
import sys


def run() -> None:
    """Run the command line; Ctrl-C while it is imported ends it as it does later."""
    try:
        from ghoststream.cli import main
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    try:
        main(prog_name="ghoststream")
    finally:
        # While threads are waited for, a further one ends the process without another word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
