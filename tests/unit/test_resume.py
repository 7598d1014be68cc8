"""Atomic files and finished parts: whatever happens, a name holds all of its content or nothing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dp2osr import resume


def test_the_file_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with resume.atomic(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(RuntimeError), resume.atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), resume.atomic(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        resume.write_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), resume.atomic(tmp_path / "file") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from dp2osr import resume\n"
        "with resume.atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "file").exists()
    resume.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_parts_are_found_again_under_the_same_mark(tmp_path: Path) -> None:
    parts = resume.Parts(tmp_path / "out.tar", "mark")
    assert parts.get("0") is None
    parts.put("0", b"zero")
    assert resume.Parts(tmp_path / "out.tar", "mark").get("0") == b"zero"
    assert resume.Parts(tmp_path / "out.tar", "other").get("0") is None
    assert resume.Parts(tmp_path / "out2.tar", "mark").get("0") is None


def test_parts_are_listed_by_name(tmp_path: Path) -> None:
    parts = resume.Parts(tmp_path / "out.tar", "mark")
    assert parts.names() == []
    for name in ("b", "a"):
        parts.put(name, b"")
    (parts.folder / ".c.host-1.tmp").touch()
    assert parts.names() == ["a", "b"]


def test_parts_lie_beside_the_output_and_go_with_it(tmp_path: Path) -> None:
    for mark in ("old", "new"):
        resume.Parts(tmp_path / "out.tar", mark).put("0", b"")
    resume.write_bytes(tmp_path / "out.tar", b"done")
    resume.Parts(tmp_path / "out.tar", "new").clear()
    assert list(tmp_path.iterdir()) == [tmp_path / "out.tar"]
    resume.Parts(tmp_path / "out.tar", "new").clear()


def test_a_part_that_was_not_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = resume.Parts(tmp_path / "out.tar", "mark")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            parts.put("0", b"zero")
    assert parts.get("0") is None


def test_the_fingerprint_follows_settings_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    resume.write_bytes(file, b"one")
    before = resume.fingerprint("settings", file)
    assert before == resume.fingerprint("settings", file)
    assert len(before) == 16
    assert before != resume.fingerprint("setting", file)
    assert resume.fingerprint("ab", "c") != resume.fingerprint("a", "bc")
    folder = resume.fingerprint(file.parent)
    file.write_bytes(b"two")
    assert before != resume.fingerprint("settings", file)
    assert folder != resume.fingerprint(file.parent)


def test_the_fingerprint_does_not_depend_on_where_a_file_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        resume.write_bytes(tmp_path / name / "file", b"same")
    assert resume.fingerprint(tmp_path / "a") == resume.fingerprint(tmp_path / "b")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = "import os, sys; from dp2osr import resume; print(resume.temporary_beside(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    left = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    left.write_bytes(b"half")
    folder = left.with_suffix(".old")
    (folder / "inner").mkdir(parents=True)
    elsewhere = tmp_path / f".file.another-node-{os.getpid()}.tmp"
    ours, living = resume.temporary_beside(tmp_path / "other"), tmp_path / f".file.{resume.HOST}-{os.getppid()}.tmp"
    for path in (elsewhere, ours, living):
        path.write_bytes(b"being written")
    resume._clear_leftovers.cache_clear()
    resume.write_bytes(tmp_path / "file", b"content")
    assert {path.name for path in tmp_path.iterdir()} == {"file", elsewhere.name, ours.name, living.name}
    day_ago = elsewhere.stat().st_mtime - resume.STALE_S - 60
    os.utime(elsewhere, (day_ago, day_ago))
    resume._clear_leftovers.cache_clear()
    resume.write_bytes(tmp_path / "file", b"content")
    assert not elsewhere.exists() and living.exists()
