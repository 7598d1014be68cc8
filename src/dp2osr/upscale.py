"""Restoration of photographs of any size, by overlapping tiles where they are larger than the model's own size.

Every denoising step predicts tile by tile, blends the predictions with a feathered window and steps the whole image at
once (MultiDiffusion), so that neighbouring tiles never disagree about what they share; decoding blends likewise.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dp2osr import config, images, resume, sampling, seeds, shards
from dp2osr.config import PolicySettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.models.backend import Backend, Embeddings, load_backend
from dp2osr.strict import parse

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000  # of an input file; larger ones are refused before decoding


@dataclass(frozen=True)
class Upscaler:
    """A policy ready to restore images; `tile` is in output pixels, 0 for its model's own size."""

    backend: Backend
    branch: torch.nn.Module
    settings: SamplingSettings
    prompt: Embeddings
    negative: Embeddings
    scale: int
    tile: int

    def restore(self, lr: torch.Tensor, seed: int) -> torch.Tensor:
        """Return one restoration (3, h·scale, w·scale) of (3, h, w) RGB in [0, 1]."""
        restored = sampling.restore_whole(
            self.backend,
            self.branch,
            lr[None].to(self.backend.device),
            scale=self.scale,
            embeddings=self.prompt,
            negative=self.negative,
            seeds=[seed],
            sampling=self.settings,
            tile=self.tile,
        )
        return restored[0].cpu()


def load(policy: PolicySettings, *, device: torch.device, prompt: str, scale: int, tile: int) -> Upscaler:
    """Load a policy and embed its prompts."""
    backend = load_backend(policy, device=device)
    branch = backend.load_control(policy.control)
    wanted, negative = (backend.embed_prompts([text]) for text in (prompt, policy.sampling.negative_prompt))
    return Upscaler(backend, branch, policy.sampling, wanted, negative, scale=scale, tile=tile)


def find_policy(policy: str, *, model: str, config_path: Path) -> PolicySettings:
    """Return the settings of a policy, its control branch among them.

    policy: a finished run's folder (its policy.json says model and sampling), a run or policy of the config, `builtin`
    (the first policy of the config), or any control branch, which is then sampled like the config's first policy.
    model: a folder in diffusers' layout that replaces the recorded one; empty for none.
    """
    control = policy
    if not (Path(policy) / "policy.json").is_file():
        known = config.read(config_path)
        if policy in known.runs:
            return find_policy(f"{known.results}/runs/{policy}/policy", model=model, config_path=config_path)
        names = [name for name, given in known.policies.items() if not given.derive]
        name = policy if policy in names else names[0]
        settings = known.policies[name]
        control = settings.control if policy in (name, "builtin") else policy
    else:
        try:
            record = json.loads((Path(policy) / "policy.json").read_text())["config"]["policy"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"policy {policy}: policy.json does not say how it is sampled ({error!r})") from None
        settings = parse(PolicySettings, record)
    return settings.model_copy(update={"control": control, "model": model or settings.model})


def expand(inputs: Sequence[Path]) -> list[Path]:
    """Return the files, with the images directly in folders in place of the folders."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            members = sorted(file for file in path.iterdir() if file.suffix.lower() in images.SUFFIXES)
            if not members:
                raise UserError(f"{path}: no images in this folder, wanted {', '.join(sorted(images.SUFFIXES))}")
            found += members
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: not found")
    return found


def plan_outputs(inputs: Sequence[Path], out: Path, *, num_files: int) -> list[list[Path]]:
    """Return the output files of each input, `num_files` each; refuses to overwrite an input or to write one twice.

    `out` ending in .png is the one file wanted of one input; else it is a folder that gets NAME.png, or NAME-0000.png,
    NAME-0001.png … for several candidates.
    """
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(inputs) * num_files > 1:
            raise UserError(f"{out}: {len(inputs) * num_files} images do not fit one file, wanted a folder")
        planned = [[out]]
    elif out.suffix.lower() in images.SUFFIXES and not out.is_dir():
        raise UserError(f"{out}: restored images are written as .png, found '{out.suffix}'")
    else:
        ends = [f"-{number:04d}" for number in range(num_files)] if num_files > 1 else [""]
        planned = [[out / f"{path.stem}{end}.png" for end in ends] for path in inputs]
    taken: set[Path] = {path.resolve() for path in inputs}
    for target in (target.resolve() for targets in planned for target in targets):
        if target in taken:
            raise UserError(f"{target}: is an input or the output of another input; choose another folder")
        taken.add(target)
    return planned


def read_image(path: Path) -> tuple[torch.Tensor, str]:
    """Return a photograph as (3, h, w) RGB in [0, 1] and the first 16 hex digits of its sha256."""
    data = path.read_bytes()
    try:
        array = images.decode(data, max_pixels=MAX_PIXELS)
    except images.BadImage as error:
        raise UserError(f"{path}: {error}") from None
    image = torch.from_numpy(array.copy()).permute(2, 0, 1).float().div(255)
    return image, hashlib.sha256(data).hexdigest()[:16]


def check_judge(metric: str) -> None:
    """Raise UserError where `metric` cannot judge images that have no original."""
    judges = [name for name, known in METRICS.items() if known.kind == "nr"]
    if metric not in judges:
        why = ", which compares with an original that does not exist here" if metric in METRICS else ""
        raise UserError(f"--best-of: found '{metric}'{why}, wanted a no-reference metric: {', '.join(judges)}")


def pick(candidates: Sequence[torch.Tensor], metric: str, scorer: Any) -> int:
    """Return which of the candidates (3, H, W) the metric finds best; the first of equals."""
    direction = -1.0 if METRICS[metric].lower_better else 1.0
    values = []
    for candidate in candidates:
        image = shards.decode_image(shards.encode_image(candidate))[None]  # what the file will hold
        values.append(direction * float(scorer.score(image)[metric][0]))
    ranked = [value if math.isfinite(value) else -math.inf for value in values]
    logger.info("%s: %s", metric, ", ".join(f"{direction * value:.4f}" for value in values))
    if max(ranked) == -math.inf:
        logger.warning("%s gives no number for images of this size; the first candidate is taken", metric)
    return ranked.index(max(ranked))


def run(
    upscaler: Upscaler, inputs: Sequence[Path], out: Path, *, candidates: int, best_of: str, seed: int, scorer: Any
) -> list[Path]:
    """Restore photographs; with `best_of` only the best of the candidates is written. Returns the written files."""
    planned = plan_outputs(inputs, out, num_files=1 if best_of else candidates)
    written: list[Path] = []
    for path, targets in zip(inputs, planned, strict=True):
        lr, name = read_image(path)
        restored = [upscaler.restore(lr, seeds.candidate(seed, name, number)) for number in range(candidates)]
        if best_of:
            restored = [restored[pick(restored, best_of, scorer)]]
        for image, target in zip(restored, targets, strict=True):
            resume.write_bytes(target, shards.encode_image(image))
            logger.info("%s -> %s (%d x %d)", path, target, image.shape[2], image.shape[1])
        written += targets
    return written
