"""Checkpoints: complete or absent, the last two and the best kept, other settings never read."""

from pathlib import Path

import pytest
import torch

from dp2osr.errors import UserError
from dp2osr.training.checkpoint import Progress, Snapshot, Store, atomic_folder


def snapshot(step: int, *, best: int = 0, ema: bool = False) -> Snapshot:
    weights = {"w": torch.full((2, 2), float(step))}
    averaged = {"w": torch.full((2, 2), -float(step))} if ema else None
    row = {"step": step, "loss": 0.1 + step, "grad_norm": float("inf")}
    return Snapshot(weights, averaged, {"state": {0: torch.ones(2)}}, {}, Progress(step, best, [row]))


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path, "mark", record={"commit": "abc"})
    assert store.load() is None
    store.save(snapshot(3, ema=True))
    found = Store(tmp_path, "mark", record={}).load()
    assert found is not None and found.progress == snapshot(3).progress
    assert found.policy["w"].tolist() == [[3, 3], [3, 3]] and found.optimizer["state"][0].tolist() == [1, 1]
    assert store.weights(3)["w"][0, 0] == -3


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, "mark", record={})
    for step in range(1, 7):
        store.save(snapshot(step, best=min(step, 2)))
    assert store.steps() == [2, 5, 6]
    store.save(snapshot(6, best=6))
    assert store.steps() == [5, 6]


def test_other_settings_are_not_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Store(tmp_path, "old", record={}).save(snapshot(1))
    caplog.set_level("INFO")
    store = Store(tmp_path, "new", record={})
    assert store.load() is None and "not used: old" in caplog.text
    store.save(snapshot(2))
    store.clear_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_smaller_micro_batch_is_left_to_the_next_try(tmp_path: Path) -> None:
    store = Store(tmp_path, "mark", record={})
    assert store.micro_batch(16) == 16
    store.halve_micro_batch(16)
    store.halve_micro_batch(16)  # another process of the same try
    assert [Store(tmp_path, mark, record={}).micro_batch(16) for mark in ("mark", "other")] == [8, 16]
    assert store.steps() == [] and store.load() is None
    store.micro_batch_file.write_text("many")
    with pytest.raises(UserError, match=r"mark/micro_batch: found 'many', wanted a number of images"):
        store.micro_batch(16)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(text)
    assert (target / "file").read_text() == "two" and list(tmp_path.iterdir()) == [target]
