"""Files that are written whole or not at all: a temporary neighbour, fsync, rename."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType


class StagedFile:
    """Write to `.path`, then `commit()` puts it in the place of `target`. Left without commit, it is removed.

    with StagedFile(target) as staged:
        staged.path.write_bytes(...)
        staged.commit()
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # same folder: rename must not cross devices

    def __enter__(self) -> StagedFile:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        return self

    def commit(self) -> None:
        """Flush to the disk and rename. Close every handle on `.path` first."""
        _fsync(self.path)
        self.path.replace(self.target)
        _fsync(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
