"""Atomic files, and finished parts of a job that survive its death.

Snakemake deletes a declared output when its job fails, but not an undeclared folder beside it: a job keeps its
finished batches in `<output>.parts/<fingerprint>/` and goes on from there. The fingerprint covers the settings and
the inputs, so parts of another setting are never mixed in. Two writers of one output are harmless: both write the
same bytes, each through its own temporary file.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

STALE_S = 24 * 3600  # no writer leaves its file untouched for so long
HOST = socket.gethostname().partition(".")[0]


def temporary_beside(path: Path | str, suffix: str = "tmp") -> Path:
    """Return a name beside `path` that is this process's own; what killed processes left there is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path.parent.resolve())
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.{suffix}")


@functools.cache
def _clear_leftovers(folder: Path) -> None:
    """Remove temporary files and folders whose process died on this host, or that are a day old; once a process."""
    for path in folder.iterdir():
        named = re.fullmatch(r"\..+\.([^.]+)-(\d+)\.(?:tmp|old)", path.name)
        with contextlib.suppress(OSError):  # another job clears, too, and another user's may stay
            if named and (_died(named[1], int(named[2])) or time.time() - path.stat().st_mtime > STALE_S):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _died(host: str, process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return host == HOST
    except PermissionError:
        pass  # it lives, as another user's
    return False


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed, on error removed."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` under its final name at once."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def fingerprint(*parts: str | bytes | Path) -> str:
    """Return 16 hex digits that change with any text or, for a Path, with the content of the file or folder."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(part.rglob("*")) if part.is_dir() else [part]
            for file in filter(Path.is_file, files):
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        else:
            digest.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return digest.hexdigest()[:16]


class Parts:
    """Finished pieces of a job, kept beside its output until the output stands."""

    def __init__(self, output: Path | str, mark: str) -> None:
        output = Path(output)
        self.root = output.with_name(output.name + ".parts")
        self.folder = self.root / mark

    def get(self, name: str) -> bytes | None:
        """Return the part's bytes, or None where it is not finished."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Return the names of the finished parts."""
        try:
            return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def put(self, name: str, data: bytes) -> None:
        """Keep a finished part."""
        write_bytes(self.folder / name, data)

    def clear(self) -> None:
        """Remove all parts, of other settings too, once the output stands."""
        shutil.rmtree(self.root, ignore_errors=True)
