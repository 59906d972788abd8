"""The console script; ``python -m ghoststream`` is the same."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line; Ctrl-C while it is imported ends it as it does later."""
    try:
        from ghoststream.cli import main
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    main(prog_name="ghoststream")


if __name__ == "__main__":
    run()
