"""The training loop: batch, loss, backward, step, log, validate, save; it goes on from the newest checkpoint."""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dp2osr.config import TrainSettings
from dp2osr.errors import UserError
from dp2osr.stopping import STOP, TERMINATED, StopRequest
from dp2osr.training.batches import Schedule
from dp2osr.training.checkpoint import Progress, Row, Snapshot, Store, Weights
from dp2osr.training.guard import Guard, judge
from dp2osr.training.step import Feed, Gradient

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


class Stopping(Exception):
    """SIGTERM came to a process of this training, and all of them know."""


def make_optimizer(branch: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW, or bitsandbytes' 8-bit AdamW; raises UserError where that is not installed."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    parameters = [parameter for parameter in branch.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("config: train.optimizer: adamw8bit needs bitsandbytes; install it or take adamw") from None
    return AdamW8bit(parameters, **options)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the rate of optimizer step `step` (from 1): a linear warm-up, then constant."""
    return settings.learning_rate * min(1.0, step / max(settings.warmup_steps, 1))


@dataclass
class Trainer:
    """Tunes `policy`, a control branch, against `reference`, the branch that it starts from."""

    accelerator: Accelerator
    feed: Feed
    schedule: Schedule
    policy: nn.Module
    reference: nn.Module
    settings: TrainSettings
    guard: Guard | None
    store: Store
    sample_dtype: torch.dtype = torch.float32
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = STOP

    def __post_init__(self) -> None:
        self.policy.requires_grad_(True).train()
        self.reference.requires_grad_(False).eval()
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.policy, self.settings))
        self.ema = copy.deepcopy(self.policy.state_dict()) if self.settings.ema_decay else None
        self.gradient = Gradient(self.accelerator, self.feed, self.policy, self.reference, self.settings)
        self._kept_step = 0  # of the newest checkpoint, known to every process
        self._logged = time.monotonic()
        self._began: tuple[float, int] | None = None  # when this process's first step began, and the steps before it

    def run(self) -> Progress:
        """Train to the end, or until the guard stops it; return what was done. On SIGTERM save and end the process."""
        self._resume()
        with self.stop.in_hand():
            try:
                self._train()
            except Stopping:
                if self.progress.step > self._kept_step:
                    self._save()
                logger.info("step %d: stopped by SIGTERM; the same command goes on from here", self.progress.step)
                raise SystemExit(TERMINATED) from None
        return self.progress

    def _train(self) -> None:
        while True:
            best = self._validate() if self._validation_due() else False
            if best or self._checkpoint_due():
                self._save()
            if self._finished():
                return
            self.step()
            self._pause()

    def final_weights(self) -> Weights:
        """Return the policy to keep: of the best validated step; without a guard that of the last step."""
        if self.guard is None:
            return self.ema if self.ema is not None else self.policy.state_dict()
        if self.progress.best_step == 0:
            logger.warning("no step had a better validation reward than the reference: the policy is the reference")
            return self.reference.state_dict()
        return self.store.weights(self.progress.best_step)

    def _finished(self) -> bool:
        return self.progress.step >= self.settings.steps or self.progress.verdict != "ok"

    def _validation_due(self) -> bool:
        if self.guard is None or any(row["step"] == self.progress.step for row in self.progress.validation):
            return False
        every, last = self.settings.guard.every, self.settings.steps
        return self.progress.step % every == 0 or self.progress.step == last

    def _checkpoint_due(self) -> bool:
        step = self.progress.step
        due = step % self.settings.checkpoint_every == 0 or step == self.settings.steps or self._finished()
        return due and step > self._kept_step

    def step(self) -> None:
        """One optimizer step: nothing changes where loss or gradient is not finite."""
        started = time.perf_counter()
        self._began = self._began or (time.monotonic(), self.progress.step)
        step = self.progress.step + 1
        units = self.schedule.step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        stats = {name: value.item() for name, value in self.gradient.step(units).items()}
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm))
        self._require_finite(step, stats["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        pairs = sum(unit.num_pairs for unit in units)
        rates = {"num_pairs": pairs, "pairs_per_second": pairs / (time.perf_counter() - started)}
        row = {"step": step, **stats, "grad_norm": norm, "lr": learning_rate(step, self.settings), **rates}
        self.progress.step = step
        self.progress.log.append(row)
        self._report(row)

    def _require_finite(self, step: int, loss: float, norm: float) -> None:
        """fp16's loss scaler skips a step whose gradient overflows and halves its scale; else that is the end."""
        scaler = self.accelerator.scaler
        overflow = scaler is not None and scaler.get_scale() > 1
        if torch.tensor(loss).isfinite() and (torch.tensor(norm).isfinite() or overflow):
            return
        if step > 1:
            self._save()
        raise UserError(
            f"train: step {step}: loss {loss}, gradient norm {norm}, wanted finite numbers; stopped before the "
            f"optimizer step. The weights of step {step - 1} are in {self.store.folder}. Lower train.learning_rate or "
            "train.beta, or take train.precision bf16 or no"
        )

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        for name, value in self.policy.state_dict().items():
            self.ema[name].lerp_(value, 1 - self.settings.ema_decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the moving average into the policy for a while."""
        if self.ema is None:
            yield
            return
        before = copy.deepcopy(self.policy.state_dict())
        self.policy.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.policy.load_state_dict(before)

    def _validate(self) -> bool:
        """Let the guard measure the policy (at step 0 the reference); return whether it is the best so far."""
        assert self.guard is not None
        self.policy.eval()
        with self._averaged():
            branch = self.policy
            if self.sample_dtype != torch.float32:
                branch = nn.Module.to(copy.deepcopy(branch), self.sample_dtype)  # what a rollout of this policy loads
            found = self.guard.measure(branch, pause=self._pause)
        self.policy.train()
        row = judge(self.progress.validation, self.progress.step, found, self.settings.guard)
        self.progress.validation.append(row)
        self.progress.best_step = row["step"] if row["best"] else self.progress.best_step
        values = {name: row[name] for name in ("reward", "fr", "nr", "diversity")}
        self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=row["step"])
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        logger.info("step %d: validation %s%s, %s", row["step"], text, " (best)" if row["best"] else "", row["verdict"])
        return row["best"] and row["step"] > 0

    def _report(self, row: Row) -> None:
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        now = time.monotonic()
        if now - self._logged < LOG_EVERY_S and row["step"] not in (1, self.settings.steps):
            return
        self._logged = now
        assert self._began is not None
        rate = (row["step"] - self._began[1]) / max(now - self._began[0], 1e-9)  # validations and checkpoints included
        logger.info(
            "step %d of %d: loss %.4f, accuracy %.3f, |z| %.3f, winner error %+.2e, loser error %+.2e, %.0f pairs/s, "
            "%.3g steps/s, %.0f s left",
            row["step"],
            self.settings.steps,
            *(row[name] for name in ("loss", "implicit_accuracy", "abs_logit", "error_chosen", "error_rejected")),
            row["pairs_per_second"],
            rate,
            (self.settings.steps - row["step"]) / rate,
        )

    def _pause(self) -> None:
        """Stop here if SIGTERM came to any process: all ask, at the same places, and so agree on the step."""
        flag = torch.tensor(float(self.stop.requested), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag, reduction="sum")
        if flag:
            raise Stopping

    def _save(self) -> None:
        """Let the main process write a checkpoint; the others wait for it, for whoever ends first ends all."""
        if self.accelerator.is_main_process:
            self.store.save(self._snapshot())
        self._kept_step = self.progress.step
        self.accelerator.wait_for_everyone()

    def _snapshot(self) -> Snapshot:
        scaler = self.accelerator.scaler
        return Snapshot(
            policy=self.policy.state_dict(),
            ema=self.ema,
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else {},
            progress=self.progress,
        )

    def _resume(self) -> None:
        snapshot = self.store.load()
        if snapshot is None:
            return
        self.policy.load_state_dict(snapshot.policy)
        if snapshot.ema is not None:
            self.ema = {name: value.to(self.accelerator.device) for name, value in snapshot.ema.items()}
        self.optimizer.load_state_dict(snapshot.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(snapshot.scaler)
        self.progress = snapshot.progress
        self._kept_step = self.progress.step
        logger.info("going on from step %d of %s", self.progress.step, self.store.folder)
