"""``python -m ghoststream``: the same as the console script."""

from __future__ import annotations

from ghoststream.cli import main

if __name__ == "__main__":
    main(prog_name="ghoststream")
