"""The command line: one file a command; each parses, calls a stage function and prints."""

from __future__ import annotations

from ghoststream.cli.main import main

__all__ = ["main"]
