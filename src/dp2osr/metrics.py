"""Our own table of image-quality metrics: kind, direction, range, sizes, batches, memory, weights. Names are pyiqa's.

A test holds it against pyiqa's registry, so that a pyiqa release that flips a direction, or lets a name stand for
another model, fails loudly. docs/metrics.md says what was verified of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Misfit = Literal["", "too_small", "wrong_size"]


@dataclass(frozen=True)
class Metric:
    """One metric: `fr` compares with the HR image, `nr` does not; low and high are nominal ends of its range.

    min_size: the shorter side in pixels; multiple: both sides must be multiples of it. What happens to other sizes:
    docs/metrics.md.
    batch_safe: a batch gives each image the score that it gets alone, to float32 rounding; a test holds pyiqa to it.
    scratch, scratch_image: the largest temporary tensor, in bytes a pixel of one image, and in bytes an image whatever
    its size (crops and resized copies); both limit the batch.
    weights: files that pyiqa loads, by name, or a hub repository (hub:OWNER/NAME).
    of, options: the pyiqa metric that is created in its place, and with what; pyiqa's own of that name where empty.
    no_number: the status of a score that is no number.
    own: whether the model is this project's (iqa/), not pyiqa's.
    """

    kind: Literal["fr", "nr"]
    lower_better: bool
    low: float | None
    high: float | None
    min_size: int
    weights: tuple[str, ...] = ()
    batch_safe: bool = True
    scratch: int = 256
    scratch_image: int = 0
    multiple: int = 1
    of: str = ""
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    no_number: str = "nan"
    own: bool = False

    @property
    def needs_weights(self) -> bool:
        """Whether pyiqa loads weights from a hub for it."""
        return bool(self.weights)

    def misfit(self, height: int, width: int) -> Misfit:
        """Return why it is not defined for images of this size (pixels), or an empty text."""
        if min(height, width) < self.min_size:
            return "too_small"
        return "wrong_size" if height % self.multiple or width % self.multiple else ""

    def named(self, status: str, height: int, width: int) -> str:
        """Return a score's status (ok, nan, inf, too_small) in this metric's own words, for images of this size."""
        own = {"nan": self.no_number, "too_small": self.misfit(height, width) or status}
        return own.get(status, status)

    def temporary(self, height: int, width: int) -> int:
        """Return the largest temporary tensor for one image of this size (pixels), in bytes."""
        return self.scratch * height * width + self.scratch_image


_Y = MappingProxyType({"test_y_channel": True, "color_space": "ycbcr"})
_RESNET, _CLIP = "hub:timm/resnet50.a1_in1k", ("afine.pth", "ViT-B-32.pt")

METRICS: dict[str, Metric] = {
    # full reference, no weights; psnr is on RGB, ssim on the Y of YIQ, both on the whole image
    "psnr": Metric("fr", False, 0.0, None, 1),
    "psnr_y": Metric("fr", False, 0.0, None, 1, of="psnr", options=_Y),
    "ssim": Metric("fr", False, 0.0, 1.0, 11, scratch=1000),
    "ssim_y": Metric("fr", False, 0.0, 1.0, 11, scratch=1000, of="ssim", options=_Y),
    "ms_ssim": Metric("fr", False, 0.0, 1.0, 161, scratch=1000),
    "cw_ssim": Metric("fr", False, 0.0, 1.0, 64),
    "fsim": Metric("fr", False, 0.0, 1.0, 16),
    "vif": Metric("fr", False, 0.0, None, 41),
    "vsi": Metric("fr", False, 0.0, 1.0, 16, scratch=700),
    "gmsd": Metric("fr", True, 0.0, None, 8),
    "nlpd": Metric("fr", True, 0.0, None, 32),
    "mad": Metric("fr", True, 0.0, None, 32, scratch=2800),
    # no reference; niqe takes the parameters that the `niqe` stage fits
    "niqe": Metric("nr", True, 0.0, None, 32, scratch=400),
    "piqe": Metric("nr", True, 0.0, 100.0, 32),
    "entropy": Metric("nr", False, 0.0, 8.0, 1, scratch=2100),
    # with weights: the paper's reward and evaluation sets
    "lpips": Metric("fr", True, 0.0, 1.0, 32, ("LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"), scratch=36),
    "topiq_fr": Metric("fr", False, 0.0, 1.0, 32, ("cfanet_fr_kadid_res50-2c4cc61d.pth", _RESNET)),
    "afine_fr": Metric("fr", True, -2.0, 2.0, 32, _CLIP, batch_safe=False, multiple=32),
    "maniqa": Metric(
        "nr",
        False,
        0.0,
        1.0,
        224,
        ("ckpt_koniq10k.pt", "hub:timm/vit_base_patch8_224.augreg2_in21k_ft_in1k"),
        scratch_image=720 * 2**20,
    ),
    "musiq": Metric("nr", False, 0.0, 100.0, 32, ("musiq_koniq_ckpt-e95806b9.pth",), scratch_image=15 * 2**20),
    "clipiqa+": Metric("nr", False, 0.0, 1.0, 32, ("CLIP-IQA%2B_learned_prompts-603f3273.pth", "RN50.pt")),
    "topiq_nr": Metric("nr", False, 0.0, 1.0, 32, ("cfanet_nr_koniq_res50-9a73138b.pth", _RESNET)),
    "afine_nr": Metric("nr", True, -2.0, 2.0, 32, _CLIP, batch_safe=False, multiple=32),
    "qalign": Metric("nr", False, 1.0, 5.0, 32, ("hub:q-future/one-align",), batch_safe=False),
    "nima": Metric(
        "nr",
        False,
        0.0,
        10.0,
        32,
        ("NIMA_InceptionV2_ava-b0c77c00.pth", "hub:timm/inception_resnet_v2.tf_in1k"),
        scratch_image=6 * 2**20,
    ),
    "topiq_iaa": Metric(
        "nr",
        False,
        1.0,
        10.0,
        32,
        ("cfanet_iaa_ava_swin-393b41b4.pth", "swin_base_patch4_window12_384_22kto1k.pth"),
        scratch_image=21 * 2**20,
    ),
    # VisualQuality-R1 (iqa/vqr1.py): a language model that looks, thinks and answers with a number
    "vqr1": Metric("nr", False, 1.0, 5.0, 28, batch_safe=False, no_number="unparsed", own=True),
}


def arrow(name: str) -> str:
    """Return the sign for tables: '↓' where lower is better, else '↑'."""
    return "↓" if METRICS[name].lower_better else "↑"


def sign(name: str) -> float:
    """Return -1 where lower is better, else 1: sign · score is 'higher is better'."""
    return -1.0 if METRICS[name].lower_better else 1.0
