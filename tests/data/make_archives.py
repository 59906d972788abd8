"""Write the archived stores that later versions must go on reading; run once for each version of the format.

``python tests/data/make_archives.py`` from the root of the repository. An archive that exists is left alone:
it is what a released version wrote.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from ghoststream.testing.stores import small_layout, small_store

ARCHIVES = Path(__file__).parent / "archives"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    """Write the archives that are missing."""
    target = ARCHIVES / "store-1.1.zip"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        small_store(root, small_layout(layers=(0, 1, 3)), seed=1)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    main()
