"""Names of files in a recovered folder, for those who must not wait for torch."""

from __future__ import annotations

PROVENANCE_NAME = "ghoststream.json"
"""Where a recovered checkpoint says what it was made of."""
