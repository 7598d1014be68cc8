"""Scores of images by pyiqa's metrics, batched where that does not change a value.

Every score is what pyiqa's `create_metric(name)` returns. What is shared is work that pyiqa repeats: what a metric
computes of the HR image alone is computed once for all candidates beside it (iqa/shared.py). A few functions that are
slow on the CPU are computed faster to the same numbers (iqa/kernels.py). Importing pyiqa takes seconds, so it happens
when a Scorer is made.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp2osr import pieces
from dp2osr.config_metrics import Vqr1Settings
from dp2osr.errors import UserError, in_one_line
from dp2osr.iqa import pretrained
from dp2osr.iqa.shared import SharedHr
from dp2osr.metrics import METRICS

LOG = logging.getLogger("iqa")
# Largest temporary tensor in bytes. On the CPU, the allocator returns blocks of 32 MiB and more to the system at once,
# and paging them in again costs several times the arithmetic.
SCRATCH = {"cpu": 30 * 2**20, "cuda": 2**30}
LARGEST_KEPT = 31 * 2**20  # bytes: a block that size still comes from memory that glibc may keep
# Bytes a pixel of one image by which the CPU's batch is measured, where not by the table's, under pyiqa's name: SSIM's
# window is not unfolded there (iqa/kernels.py); FSIM has many large tensors at once, which in sum are paged as above.
CPU_PIXEL = {"ssim": 128, "ms_ssim": 128, "fsim": 384}
OVERWRITING = ("afine_fr", "afine_nr")  # pyiqa's A-FINE normalises the images it is given in place

Reference = tuple[slice, torch.Tensor | None]  # neighbours in the batch, and the HR image (1, 3, H, W) beside them


class ScoringError(RuntimeError):
    """A metric failed on one image: `metric`, `index` of the image in the batch, `reason` in one line."""

    def __init__(self, metric: str, index: int, reason: str) -> None:
        super().__init__(f"metric '{metric}': image {index}: {reason}")
        self.metric, self.index, self.reason = metric, index, reason


class Scorer:
    """A set of metrics, loaded once.

    seconds: wall clock spent in each metric; counts: images it has scored (both since the Scorer was made).
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        device: torch.device,
        niqe: Path | None,
        niqe_block: int,
        batch_size: int,
        vqr1: Vqr1Settings | None = None,
    ) -> None:
        if unknown := [name for name in names if name not in METRICS]:
            raise UserError(f"metric '{unknown[0]}': unknown, wanted one of {', '.join(sorted(METRICS))}")
        self.names = list(names)
        self.device = device
        self.batch_size = batch_size
        self.counts = dict.fromkeys(self.names, 0)
        self.seconds = dict.fromkeys(self.names, 0.0)
        self._min_size = {name: METRICS[name].min_size for name in self.names}
        if "niqe" in self.names:
            self._min_size["niqe"] = max(self._min_size["niqe"], niqe_block)
        with _settings_kept():
            self._models = {name: _create(name, device, niqe, niqe_block, vqr1) for name in self.names}
        self._shared = {name: SharedHr(model) for name, model in self._models.items()}
        if device.type == "cpu":
            _keep_freed_memory()
        self._limits: dict[tuple[str, int, int], int] = {}  # batches that memory allowed, by metric and image size

    @property
    def needs_hr(self) -> bool:
        """Whether a metric compares with the HR image."""
        return any(METRICS[name].kind == "fr" for name in self.names)

    def too_small(self, name: str, height: int, width: int) -> bool:
        """Whether `name` is not defined for images of this size (pixels)."""
        return min(height, width) < self._min_size[name] or bool(METRICS[name].misfit(height, width))

    def score(
        self, candidates: torch.Tensor, hr: torch.Tensor | Sequence[torch.Tensor] | None = None
    ) -> dict[str, np.ndarray]:
        """Score images; returns metric name -> raw values (B,) float64.

        candidates: (B, 3, H, W) float32 RGB in [0, 1]; hr: the same shape, or B images (3, H, W), or (1, 3, H, W) for
        all, or None where no metric needs it. Equal neighbours in hr share their work. NaN where a metric gives none or
        the image is too small. Raises ScoringError where a metric fails on an image.
        """
        beside = self._beside(candidates, hr)
        height, width = candidates.shape[-2:]
        scores = {}
        with _settings_kept(), torch.inference_mode():
            for name in self.names:
                if self.too_small(name, height, width):
                    scores[name] = np.full(len(candidates), np.nan)
                    continue
                start = time.perf_counter()
                scores[name] = self._run(name, candidates, beside)
                self.seconds[name] += time.perf_counter() - start
                self.counts[name] += len(candidates)
        return scores

    def micro_batch(self, name: str, height: int, width: int) -> int:
        """Return how many images of this size (pixels) go through `name` at once."""
        metric = METRICS[name]
        if not metric.batch_safe:
            return 1
        pixel = CPU_PIXEL.get(getattr(self._models[name], "metric_name", "")) if self.device.type == "cpu" else None
        temporary = metric.temporary(height, width) if pixel is None else pixel * height * width
        fitting = SCRATCH[self.device.type] // temporary
        return max(1, min(self.batch_size, fitting, self._limits.get((name, height, width), self.batch_size)))

    def _beside(self, candidates: torch.Tensor, hr: torch.Tensor | Sequence[torch.Tensor] | None) -> list[Reference]:
        """Check the shapes; return the runs of candidates that have the same HR image."""
        if candidates.ndim != 4 or candidates.shape[1] != 3:
            raise ValueError(f"candidates: found shape {tuple(candidates.shape)}, wanted (B, 3, H, W)")
        if not self.needs_hr:
            return []
        if hr is None:
            raise ValueError(f"hr: found none, wanted HR images for {', '.join(self.names)}")
        images = list(hr) * (len(candidates) if len(hr) == 1 else 1)
        if len(images) != len(candidates) or any(image.shape != candidates.shape[1:] for image in images):
            found = (len(hr), *hr[0].shape) if len(hr) else (0,)
            raise ValueError(f"hr: found shape {found}, wanted {tuple(candidates.shape)}")
        starts = [at for at, image in enumerate(images) if at == 0 or not _equal(image, images[at - 1])]
        stops = [*starts[1:], len(images)]
        return [(slice(a, b), images[a][None].to(self.device)) for a, b in zip(starts, stops, strict=True)]

    def _run(self, name: str, images: torch.Tensor, beside: Sequence[Reference]) -> np.ndarray:
        """Score all images, as many at once as the metric takes."""
        runs = beside if METRICS[name].kind == "fr" else [(slice(0, len(images)), None)]
        parts = []
        for run, reference in runs:
            at = run.start
            while at < run.stop:
                size = min(self.micro_batch(name, *images.shape[-2:]), run.stop - at)
                values = self._attempt(name, images[at : at + size], reference, first=at)
                if values is not None:
                    parts.append(values)
                    at += size
        return np.concatenate(parts) if parts else np.empty(0)

    def _attempt(
        self, name: str, images: torch.Tensor, reference: torch.Tensor | None, *, first: int
    ) -> np.ndarray | None:
        """Score one batch; returns None where memory was short, and from then on half as many go at once.

        first: index of the first image. Where a batch fails, its images go one by one, so that the error names one.
        """
        try:
            return self._call(name, images, reference)
        except Exception as error:  # a metric may raise anything
            short, reason = pieces.out_of_memory(error), in_one_line(error)
            number_free = isinstance(error, torch.linalg.LinAlgError)
            if len(images) == 1 and number_free:
                return np.full(1, np.nan)  # its features hold no number: NIQE of a constant image
            if len(images) == 1:
                raise ScoringError(name, first, f"out of memory ({reason})" if short else reason) from error
        # The error is gone here, and with it what its frames hold.
        if short:
            self._halve(name, images, reason)
            return None
        if not number_free:
            LOG.warning("%s: %d images at once failed, now one by one (%s)", name, len(images), reason)
        ones = [self._attempt(name, one[None], reference, first=first + at) for at, one in enumerate(images)]
        return np.concatenate([one for one in ones if one is not None])

    def _halve(self, name: str, images: torch.Tensor, reason: str) -> None:
        size, (height, width) = len(images) // 2, images.shape[-2:]
        many = f"{len(images)} images of {width} x {height}"
        LOG.warning("%s: out of memory with %s, going on with %d (%s)", name, many, size, reason)
        self._limits[name, height, width] = size
        for shared in self._shared.values():
            shared.forget()
        pieces.release()

    def _call(self, name: str, images: torch.Tensor, reference: torch.Tensor | None) -> np.ndarray:
        """Let pyiqa score a batch (B, 3, H, W) beside one HR image (1, 3, H, W)."""
        images = images.to(self.device, non_blocking=True)
        given = [images] if reference is None else [images, reference.expand_as(images)]
        if name in OVERWRITING:
            given = [each.clone() for each in given]
        with self._shared[name].in_use():
            value = self._models[name](*given)
        if value.numel() != len(images):
            raise ValueError(f"found {value.numel()} scores of {len(images)} images")
        return value.detach().reshape(-1).double().cpu().numpy()


def statuses(values: np.ndarray, *, too_small: bool) -> list[str]:
    """Return the status of each raw score (B,): ok, nan, inf, or too_small for all."""
    if too_small:
        return ["too_small"] * len(values)
    return ["nan" if np.isnan(value) else "inf" if np.isinf(value) else "ok" for value in values]


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor.

    It returns what is free beyond twice the largest block that was ever freed, up to 32 MiB: at first 128 KiB, so that
    each batch's tensors are paged in again, which takes FSIM as long as the arithmetic. Other allocators are unmoved.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def _equal(image: torch.Tensor, other: torch.Tensor) -> bool:
    return image is other or torch.equal(image, other)


def _create(name: str, device: torch.device, niqe: Path | None, niqe_block: int, vqr1: Vqr1Settings | None) -> Any:
    """Return pyiqa's metric, its NIQE with our model and block size; or one of our own."""
    import pyiqa

    if name == "vqr1":
        from dp2osr.iqa.vqr1 import VisualQuality

        if vqr1 is None:
            raise UserError("metric 'vqr1': no model given, wanted the settings of iqa.vqr1")
        return VisualQuality(vqr1, device=device)

    if name == "niqe":
        from dp2osr.iqa import niqe as own

        if niqe is None:
            raise UserError("metric 'niqe': no model given, wanted the niqe.mat that the niqe stage fits")
        own.check(niqe, block_size=niqe_block)
        options = {"type": own.BlockNIQE.__name__, "block_size": niqe_block, "pretrained_model_path": str(niqe)}
        return pyiqa.create_metric(name, device=device, **options)
    make = pretrained.create if METRICS[name].needs_weights else pyiqa.create_metric
    return make(METRICS[name].of or name, device=device, **METRICS[name].options)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Restore what pyiqa changes for the whole process: cuDNN's flags and numpy's and torch's random states."""
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(state)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags
