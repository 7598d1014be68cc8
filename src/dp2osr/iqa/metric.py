"""Scores of images by pyiqa's metrics, batched where that does not change a value.

Every score is what pyiqa's `create_metric(name)` returns. What is shared is work that pyiqa repeats: the features of
an HR image that stands beside many candidates are computed once a batch. Importing pyiqa takes seconds, so it
happens when a Scorer is made.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp2osr.config_metrics import Vqr1Settings
from dp2osr.errors import UserError
from dp2osr.iqa import pretrained
from dp2osr.iqa.pretrained import replaced
from dp2osr.metrics import METRICS
from dp2osr.repeats import once_an_image

LOG = logging.getLogger("iqa")
# Largest temporary tensor in bytes. On the CPU, the allocator returns blocks of 32 MiB and more to the system at once,
# and paging them in again costs several times the arithmetic.
SCRATCH = {"cpu": 30 * 2**20, "cuda": 2**30}


class Scorer:
    """A set of metrics, loaded once.

    seconds: wall clock spent in each metric; num_scored: images scored (both since the Scorer was made).
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
        self.num_scored = 0
        self.seconds = dict.fromkeys(self.names, 0.0)
        self._min_size = {name: METRICS[name].min_size for name in self.names}
        if "niqe" in self.names:
            self._min_size["niqe"] = max(self._min_size["niqe"], niqe_block)
        with _settings_kept():
            self._models = {name: _create(name, device, niqe, niqe_block, vqr1) for name in self.names}

    @property
    def needs_hr(self) -> bool:
        """Whether a metric compares with the HR image."""
        return any(METRICS[name].kind == "fr" for name in self.names)

    def too_small(self, name: str, height: int, width: int) -> bool:
        """Whether `name` is not defined for images of this size (pixels)."""
        return min(height, width) < self._min_size[name] or bool(METRICS[name].misfit(height, width))

    def score(self, candidates: torch.Tensor, hr: torch.Tensor | None = None) -> dict[str, np.ndarray]:
        """Score images; returns metric name -> raw values (B,) float64.

        candidates: (B, 3, H, W) float32 RGB in [0, 1]; hr: the same shape, or (1, 3, H, W) for all, or None where no
        metric needs it. NaN where a metric gives none or the image is too small.
        """
        hr = self._check(candidates, hr)
        height, width = candidates.shape[-2:]
        scores = {}
        with _settings_kept(), torch.inference_mode():
            for name in self.names:
                start = time.perf_counter()
                if self.too_small(name, height, width):
                    scores[name] = np.full(len(candidates), np.nan)
                else:
                    scores[name] = self._run(name, candidates, hr)
                self.seconds[name] += time.perf_counter() - start
        self.num_scored += len(candidates)
        return scores

    def micro_batch(self, name: str, height: int, width: int) -> int:
        """Return how many images of this size (pixels) go through `name` at once."""
        metric = METRICS[name]
        if not metric.batch_safe:
            return 1
        fitting = SCRATCH[self.device.type] // metric.temporary(height, width)
        return max(1, min(self.batch_size, fitting))

    def _check(self, candidates: torch.Tensor, hr: torch.Tensor | None) -> torch.Tensor | None:
        if candidates.ndim != 4 or candidates.shape[1] != 3:
            raise ValueError(f"candidates: found shape {tuple(candidates.shape)}, wanted (B, 3, H, W)")
        if not self.needs_hr:
            return None
        if hr is None:
            raise ValueError(f"hr: found none, wanted HR images for {', '.join(self.names)}")
        if len(hr) not in (1, len(candidates)) or hr.shape[1:] != candidates.shape[1:]:
            raise ValueError(f"hr: found shape {tuple(hr.shape)}, wanted {tuple(candidates.shape)}")
        return hr.expand_as(candidates)

    def _run(self, name: str, candidates: torch.Tensor, hr: torch.Tensor | None) -> np.ndarray:
        size = self.micro_batch(name, *candidates.shape[-2:])
        parts = []
        for start in range(0, len(candidates), size):
            image = candidates[start : start + size].to(self.device)
            reference = hr[start : start + size].to(self.device) if hr is not None else None
            parts.append(self._call(name, image, reference))
        return np.concatenate(parts) if parts else np.empty(0)

    def _call(self, name: str, image: torch.Tensor, reference: torch.Tensor | None) -> np.ndarray:
        """Call the model; an image whose features hold no number (NIQE of a constant) is NaN and spoils no other."""
        model = self._models[name]
        try:
            with _shared_hr(name):
                value = model(image, reference) if METRICS[name].kind == "fr" else model(image)
        except torch.linalg.LinAlgError:
            if len(image) == 1:
                return np.full(1, np.nan)
            return np.concatenate([self._call(name, one[None], _pick(reference, i)) for i, one in enumerate(image)])
        return value.detach().reshape(-1).double().cpu().numpy()


def statuses(values: np.ndarray, *, too_small: bool) -> list[str]:
    """Return the status of each raw score (B,): ok, nan, inf, or too_small for all."""
    if too_small:
        return ["too_small"] * len(values)
    return ["nan" if np.isnan(value) else "inf" if np.isinf(value) else "ok" for value in values]


def _pick(images: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if images is None else images[index : index + 1]


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
    model = make(METRICS[name].of or name, device=device, **METRICS[name].options)
    if name == "nlpd":
        model.net.pyramid = once_an_image(model.net.pyramid)
    return model


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


@contextlib.contextmanager
def _shared_hr(name: str) -> Iterator[None]:
    """While FSIM runs, compute the phase congruency of a repeated HR image once: it is half of FSIM's work."""
    if name != "fsim":
        yield
        return
    from pyiqa.archs import fsim_arch

    with replaced(fsim_arch, "_phase_congruency", once_an_image(fsim_arch._phase_congruency)):
        yield
