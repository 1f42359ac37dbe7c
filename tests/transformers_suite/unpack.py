"""Unpack transformers' tests from its sdist into a package that can be imported.

    python tests/transformers_suite/unpack.py SDIST.tar.gz FOLDER

The sdist holds the files tests/test_*.py alone. What they import from folders beside stands here
as empty classes.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

PACKAGE = "transformers_tests"
# Mixins that ModelTesterMixin's file imports and the sdist leaves out.
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def unpack(sdist: str, folder: str) -> None:
    """Write the package `transformers_tests` into `folder`."""
    package = Path(folder) / PACKAGE
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                _write(package / parts[2], content.read())
    for name, text in ABSENT.items():
        _write(package / name, text.encode())
        _write((package / name).parent / "__init__.py", b"")
    _write(package / "__init__.py", b"")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    unpack(*sys.argv[1:])
