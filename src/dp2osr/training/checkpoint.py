"""Checkpoints: complete folders or none, of one setting only, without pickle.

`checkpoints/{fingerprint}/step-000020/` holds policy.safetensors, ema.safetensors (where EMA is on), optimizer.pt
(read with weights_only) and state.json; `micro_batch` beside it is there only where memory was short. Snakemake does
not know the folder, so a failed job keeps it.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dp2osr.errors import UserError
from dp2osr.resume import temporary_beside, write_bytes

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Weights = dict[str, torch.Tensor]


@dataclass
class Progress:
    """How far a training is: steps done, rows of both tables so far, best validated step (0: the reference)."""

    step: int = 0
    best_step: int = 0
    log: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The guard's last word; ok where there was none."""
        return str(self.validation[-1]["verdict"]) if self.validation else "ok"


@dataclass(frozen=True)
class Snapshot:
    """All that a training needs to go on; the batch of a step is a function of the step, so no RNG state."""

    policy: Weights
    ema: Weights | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    progress: Progress


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place(temporary: Path, folder: Path, old: Path) -> None:
    """Rename to the final name. Another job that writes the same folder may come between; the last one stands."""
    for attempt in range(10):
        with suppress(FileNotFoundError):
            folder.rename(old)
        try:
            temporary.rename(folder)
            break
        except OSError:
            shutil.rmtree(old, ignore_errors=True)
            if attempt == 9:
                raise
    _sync(folder.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it is synced and takes its place, on error removed."""
    temporary, old = temporary_beside(folder), temporary_beside(folder, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _sync(file)
        _place(temporary, folder, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def plain(weights: Weights) -> Weights:
    """Return detached contiguous CPU copies, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


class Store:
    """The checkpoints of one job; those of other settings beside it are never read."""

    def __init__(self, root: Path, mark: str, *, record: Row) -> None:
        """mark: fingerprint of settings and inputs; record: config, versions and commit, kept with each checkpoint."""
        self.root, self.folder, self._record = root, root / mark, record
        if others := self._others():
            logger.info("checkpoints of other settings in %s are not used: %s", root, ", ".join(others))

    def _others(self) -> list[str]:
        found = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path.name for path in found if path.is_dir() and path != self.folder)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*"))

    def save(self, snapshot: Snapshot, *, keep: int = 2) -> None:
        """Write a checkpoint; then remove all but the last `keep` and the best."""
        progress = snapshot.progress
        with atomic_folder(self.path(progress.step)) as folder:
            save_file(plain(snapshot.policy), folder / "policy.safetensors")
            if snapshot.ema is not None:
                save_file(plain(snapshot.ema), folder / "ema.safetensors")
            torch.save({"optimizer": snapshot.optimizer, "scaler": snapshot.scaler}, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps({"progress": asdict(progress), **self._record}))
        for step in self.steps()[:-keep]:
            if step != progress.best_step:
                shutil.rmtree(self.path(step), ignore_errors=True)
        logger.info("step %d: checkpoint %s", progress.step, self.path(progress.step))

    def load(self) -> Snapshot | None:
        """Return the newest checkpoint on the CPU, or None."""
        steps = self.steps()
        if not steps:
            return None
        folder = self.path(steps[-1])
        averaged = folder / "ema.safetensors"
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return Snapshot(
            policy=load_file(folder / "policy.safetensors"),
            ema=load_file(averaged) if averaged.exists() else None,
            optimizer=state["optimizer"],
            scaler=state["scaler"],
            progress=Progress(**json.loads((folder / "state.json").read_text())["progress"]),
        )

    def weights(self, step: int) -> Weights:
        """Return the weights to use of a step: the moving average where there is one."""
        averaged = self.path(step) / "ema.safetensors"
        return load_file(averaged if averaged.exists() else self.path(step) / "policy.safetensors")

    @property
    def micro_batch_file(self) -> Path:
        """How many images go at once where memory was short for as many as the settings say."""
        return self.folder / "micro_batch"

    def micro_batch(self, wanted: int) -> int:
        """Return how many images to take at once: `wanted`, or what a try before this one had left for it.

        Raises UserError where that file holds no number.
        """
        try:
            text = self.micro_batch_file.read_text().strip()
        except FileNotFoundError:
            return wanted
        if not text.isdecimal() or int(text) < 1:
            raise UserError(
                f"{self.micro_batch_file}: found {text!r}, wanted a number of images; remove it for {wanted}"
            )
        return min(int(text), wanted)

    def halve_micro_batch(self, size: int) -> None:
        """Leave half of `size` to the next try; processes that do so at the same time write the same."""
        write_bytes(self.micro_batch_file, f"{size // 2}\n".encode())

    def clear_leftovers(self) -> None:
        """Remove checkpoints of other settings and half-written ones, once this job's outputs stand."""
        for path in (*(self.root / name for name in self._others()), *self.folder.glob(".step-*")):
            shutil.rmtree(path, ignore_errors=True)
