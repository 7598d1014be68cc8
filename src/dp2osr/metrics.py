"""Our own table of image-quality metrics: kind, direction, range, smallest image. Names are pyiqa's.

A test holds it against pyiqa's registry, so that a pyiqa release that flips a direction fails loudly.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric: `fr` compares with the HR image, `nr` does not; `min_size` is the shorter side in pixels.

    `batch_safe`: a batch gives each image the score that it gets alone, to float32 rounding; a test holds pyiqa to it.
    `scratch` is the largest temporary that pyiqa allocates, in bytes a pixel of one image: it limits the batch.
    """

    kind: Literal["fr", "nr"]
    lower_better: bool
    low: float | None
    high: float | None
    min_size: int
    needs_weights: bool
    batch_safe: bool = True
    scratch: int = 256


METRICS: dict[str, Metric] = {
    # full reference, no weights
    "psnr": Metric("fr", False, 0.0, None, 1, False),
    "ssim": Metric("fr", False, 0.0, 1.0, 11, False, scratch=1000),
    "ms_ssim": Metric("fr", False, 0.0, 1.0, 161, False, scratch=1000),
    "cw_ssim": Metric("fr", False, 0.0, 1.0, 64, False),
    "fsim": Metric("fr", False, 0.0, 1.0, 16, False),
    "vif": Metric("fr", False, 0.0, None, 41, False),
    "vsi": Metric("fr", False, 0.0, 1.0, 16, False, scratch=700),
    "gmsd": Metric("fr", True, 0.0, None, 8, False),
    "nlpd": Metric("fr", True, 0.0, None, 32, False),
    "mad": Metric("fr", True, 0.0, None, 32, False, scratch=2800),
    # no reference; niqe takes the parameters that the `niqe` stage fits
    "niqe": Metric("nr", True, 0.0, None, 32, False, scratch=400),
    "piqe": Metric("nr", True, 0.0, 100.0, 32, False),
    "entropy": Metric("nr", False, 0.0, 8.0, 1, False, scratch=2100),
    # with weights from a hub: the paper's reward and evaluation sets; scored one by one until batches are verified
    "lpips": Metric("fr", True, 0.0, None, 32, True, batch_safe=False),
    "topiq_fr": Metric("fr", False, 0.0, 1.0, 32, True, batch_safe=False),
    "afine_fr": Metric("fr", True, None, None, 32, True, batch_safe=False),
    "maniqa": Metric("nr", False, 0.0, 1.0, 224, True, batch_safe=False),
    "musiq": Metric("nr", False, 0.0, 100.0, 32, True, batch_safe=False),
    "clipiqa+": Metric("nr", False, 0.0, 1.0, 32, True, batch_safe=False),
    "topiq_nr": Metric("nr", False, 0.0, 1.0, 32, True, batch_safe=False),
    "afine_nr": Metric("nr", True, None, None, 32, True, batch_safe=False),
    "qalign": Metric("nr", False, 1.0, 5.0, 32, True, batch_safe=False),
    "nima": Metric("nr", False, 0.0, 10.0, 32, True, batch_safe=False),
    "topiq_iaa": Metric("nr", False, 1.0, 10.0, 32, True, batch_safe=False),
}


def arrow(name: str) -> str:
    """Return the sign for tables: '↓' where lower is better, else '↑'."""
    return "↓" if METRICS[name].lower_better else "↑"


def sign(name: str) -> float:
    """Return -1 where lower is better, else 1: sign · score is 'higher is better'."""
    return -1.0 if METRICS[name].lower_better else 1.0
