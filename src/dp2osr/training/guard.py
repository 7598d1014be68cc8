"""The guard: validation rollouts during training, because DPO collapses without warning in its loss.

In a collapse the loss falls and the pair accuracy reads 97 % while the images turn to blur. What shows it is the
reward on held-back images and the diversity between the seeds of one image.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from dp2osr import seeds, shards
from dp2osr.config import GuardSettings, RewardSettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.models.backend import Backend, Embeddings, stack
from dp2osr.preference.reward import apply_scale
from dp2osr.sampling import restore
from dp2osr.training.checkpoint import Row

if TYPE_CHECKING:
    from dp2osr.iqa.metric import Scorer

LOG = logging.getLogger("guard")


@dataclass(frozen=True)
class Measurement:
    """Means over the validation images: reward and its parts on the reference's scale, diversity of [0, 1]."""

    reward: float
    fr: float
    nr: float
    diversity: float


def judge(history: Sequence[Row], step: int, found: Measurement, settings: GuardSettings) -> Row:
    """Return the row of tables.VALIDATION for `found`; history holds the rows before it, step 0 the reference's.

    verdict is ok, or why the training stops: collapse of diversity, drop of the reward, no new best for `patience`
    checks. `best` is true for a reward above all before it, never for a collapse.
    """
    verdict, best = "ok", not history
    if history:
        reference = history[0]
        best_step, best_reward = max((row["step"], row["reward"]) for row in history if row["best"])
        waited = sum(row["step"] > best_step for row in history) + 1
        floor = settings.min_diversity * reference["diversity"]
        least = reference["reward"] - settings.max_reward_drop
        if found.diversity < floor:
            verdict = f"diversity between seeds {found.diversity:.4f} fell under {floor:.4f}"
            verdict += f" ({settings.min_diversity:g} of the reference's)"
        elif not found.reward >= least:
            verdict = f"validation reward {found.reward:.4f} fell under {least:.4f}"
            verdict += f" (the reference's less {settings.max_reward_drop:g})"
        elif found.reward > best_reward:
            best = True
        elif waited >= settings.patience:
            verdict = f"no validation reward above {best_reward:.4f} (step {best_step}) in {waited} checks"
    parts = {"reward": found.reward, "fr": found.fr, "nr": found.nr, "diversity": found.diversity}
    return {"step": step, **parts, "best": best, "verdict": verdict}


@dataclass(frozen=True)
class ValidationImage:
    """One group to restore: lr (3, h, w) and hr (3, H, W) RGB in [0, 1], embeddings without batch dimension."""

    group_id: str
    lr: torch.Tensor
    hr: torch.Tensor
    embeddings: Mapping[str, torch.Tensor]


def read_images(paths: Sequence[Path], embeddings: Mapping[str, Mapping[str, torch.Tensor]]) -> list[ValidationImage]:
    """Read the LR shards of the validation dataset, sorted by group."""
    images = []
    for path in paths:
        for group_id, fields in shards.read_shard(path):
            if group_id not in embeddings:
                raise UserError(f"shard {path}: group {group_id} has no row in the validation embeddings")
            lr, hr = (shards.decode_image(fields[name]) for name in ("lr.png", "hr.png"))
            images.append(ValidationImage(group_id, lr, hr, embeddings[group_id]))
    if not images:
        raise UserError("guard: the validation dataset has no images; set train.guard.every to 0 to train without")
    return sorted(images, key=lambda image: image.group_id)


@dataclass(frozen=True)
class Guard:
    """Measures a control branch by rollouts on the validation images, shared out over the processes."""

    accelerator: Accelerator
    backend: Backend
    images: Sequence[ValidationImage]
    negative: Mapping[str, torch.Tensor]
    scorer: "Scorer"
    scales: pd.DataFrame
    reward: RewardSettings
    sampling: SamplingSettings
    settings: GuardSettings
    base_seed: int
    batch_size: int

    def measure(self, branch: nn.Module, *, pause: Callable[[], None]) -> Measurement:
        """Restore each image from the same seeds as the reference's rollouts.

        `pause` is called before each batch, equally often in all processes. A sharded backbone has to run equally
        often, too: as many times a batch, whatever its size, as sampling has steps and guidance. So a process that
        has no image left restores one for nothing.
        """
        count = self.accelerator.num_processes
        own = self.images[self.accelerator.process_index :: count]
        rows: list[Row] = []
        size = max(1, self.batch_size // self.settings.num_rollouts)
        for start in range(0, -(-len(self.images) // count), size):
            pause()
            if batch := own[start : start + size]:
                rows += self._rows(branch, batch)
            elif self.backend.sharded:
                self._restored(branch, [(self.images[0], 0)])
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        frame = pd.DataFrame(rows).sort_values(["group_id", "rollout"], ignore_index=True)
        rewards = apply_scale(frame, self.scales, self.reward)
        if lacking := int(rewards["reward"].isna().sum()):
            LOG.warning("validation: %d of %d images have no reward; its mean is of the others", lacking, len(rewards))
        means = {name: float(rewards[name].mean()) for name in ("reward", "fr", "nr")}  # over what is a number
        return Measurement(**means, diversity=float(frame["diversity"].mean()))

    def _rows(self, branch: nn.Module, images: Sequence[ValidationImage]) -> list[Row]:
        """Return group_id, rollout, raw scores and the group's diversity for each candidate of some images."""
        count = self.settings.num_rollouts
        keys = [(image, rollout) for image in images for rollout in range(count)]
        hr = torch.stack([image.hr for image, _ in keys]).to(self.backend.device)
        restored = self._restored(branch, keys)
        spread = restored.unflatten(0, (len(images), count)).std(1, correction=0).flatten(1).mean(1)
        diversity = spread.repeat_interleave(count).tolist()
        scores = self.scorer.score(restored, hr)
        columns = {name: values.tolist() for name, values in scores.items()}
        return [
            {"group_id": image.group_id, "rollout": rollout, "diversity": diversity[place]}
            | {name: values[place] for name, values in columns.items()}
            for place, (image, rollout) in enumerate(keys)
        ]

    def _restored(self, branch: nn.Module, keys: Sequence[tuple[ValidationImage, int]]) -> torch.Tensor:
        """Return the candidates (B, 3, H, W) of some images and rollouts."""
        lr = torch.stack([image.lr for image, _ in keys]).to(self.backend.device)
        return restore(
            self.backend,
            branch,
            lr,
            scale=keys[0][0].hr.shape[1] // lr.shape[2],
            embeddings=stack([image.embeddings for image, _ in keys], self.backend.device),
            negative=self._negative(len(keys)),
            seeds=[seeds.candidate(self.base_seed, image.group_id, rollout) for image, rollout in keys],
            sampling=self.sampling,
        )

    def _negative(self, count: int) -> Embeddings:
        return stack([self.negative] * count, self.backend.device)
