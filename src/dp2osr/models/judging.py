"""GPU memory of networks that belong to no policy: those of metrics, in scoring and in the guard, and RAM's.

pyiqa builds its networks with weights from a hub or not at all, so what a metric holds stands in a table. A test builds
each on `meta` without its weights and holds the table to it; RAM is built here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dp2osr.iqa.metric import SCRATCH
from dp2osr.metrics import METRICS
from dp2osr.models import ram
from dp2osr.models.footprint import META, parameters
from dp2osr.models.ledger import forward_bytes, weights
from dp2osr.models.memory import Need
from dp2osr.prompts import BATCH


@dataclass(frozen=True)
class Cost:
    """What a metric of pyiqa 0.1.16 holds.

    parameters: of its network, in `dtype`. fixed, per_pixel: bytes of working memory of an image, at most: what does
    not depend on its size, and what a pixel takes; counted by the ledger, for networks on `meta`. network: which one.
    """

    parameters: int = 0
    fixed: int = 0
    per_pixel: int = 0
    network: str = ""
    dtype: torch.dtype = torch.float32


WITHOUT_NETWORK = {  # bytes a pixel, by the ledger on the CPU
    **{"psnr": 24, "ssim": 103, "ms_ssim": 103, "cw_ssim": 500, "fsim": 720, "vif": 230, "vsi": 490},
    **{"gmsd": 33, "nlpd": 50, "mad": 3400, "niqe": 290, "piqe": 30, "entropy": 2100},
}
COSTS: dict[str, Cost] = {
    "lpips": Cost(2_470_848, 0, 260, "AlexNet's convolutions, and five layers of 1 x 1"),
    "topiq_fr": Cost(36_038_662, 1_100_000, 851, "ResNet-50 and attention across scales"),
    "topiq_nr": Cost(45_196_934, 1_100_000, 463, "ResNet-50 and attention across scales"),
    # working memory of one image by the ledger, 81 bytes a pixel, and as much for the features of the other
    "afine_fr": Cost(152_678_284, 0, 200, "CLIP ViT-B/32 and two heads"),
    "afine_nr": Cost(152_678_284, 0, 200, "that of afine_fr, loaded once more"),
    "maniqa": Cost(135_747_530, 2_281_000_000, 24, "ViT-B/8 and two Swin stages on 20 crops of 224 px"),
    "musiq": Cost(27_125_825, 46_700_000, 237, "a transformer on patches of three sizes of the image"),
    "clipiqa+": Cost(102_023_521, 3_500_000, 224, "CLIP ResNet-50 and a learned prompt"),
    # working memory by hand: attention of 1,025 patches by 16 heads, keys and values of 32 layers
    "qalign": Cost(8_197_859_328, 300_000_000, 0, "mPLUG-Owl2: LLaMA-2 7B and ViT-L at 448 px", torch.float16),
    "nima": Cost(54_321_834, 19_000_000, 0, "Inception-ResNet-v2 at 299 px"),
    **{name: Cost(per_pixel=each) for name, each in WITHOUT_NETWORK.items()},
}


def at_once(name: str, *, batch: int, size: int) -> int:
    """Return how many images of `size` pixels a metric takes at once on a GPU, `batch` at most, as `Scorer` does."""
    metric = METRICS[name]
    if not metric.batch_safe:
        return 1
    return max(1, min(batch, SCRATCH["cuda"] // metric.temporary(size, size)))


def working_bytes(name: str, *, batch: int, size: int) -> int:
    """Return the working memory of a metric, of as many images of `size` pixels as it takes at once.

    Of a metric that the table lacks, its largest temporary.
    """
    cost = COSTS.get(name, Cost(per_pixel=METRICS[name].scratch))
    return at_once(name, batch=batch, size=size) * (cost.fixed + cost.per_pixel * size * size)


def score(names: Sequence[str], *, batch: int, size: int) -> list[Need]:
    """Return the networks of a group of metrics, and the working memory of the one that takes most."""
    held = [(name, COSTS[name]) for name in names if name in COSTS and COSTS[name].parameters]
    needs = [Need(f"{name}, {str(cost.dtype)[6:]}", cost.parameters * cost.dtype.itemsize) for name, cost in held]
    work = {name: working_bytes(name, batch=batch, size=size) for name in names}
    most = max(work, key=work.__getitem__)
    count = at_once(most, batch=batch, size=size)
    return [*needs, Need(f"{most} of {count} image{'s' * (count > 1)}", work[most], lasting=False)]


def guard(names: Sequence[str], *, batch: int, size: int) -> list[Need]:
    """Return what the metrics of a reward add to training, where the guard scores validation images."""
    found = score(names, batch=batch, size=size)
    held = sum(need.bytes for need in found if need.lasting)
    needs = [Need("metrics, for the guard", held)] if held else []
    return needs + [Need(f"the guard's {need.what}", need.bytes, lasting=False) for need in found if not need.lasting]


def describe() -> list[Need]:
    """Return RAM in float32, and the tagging of a batch of LR images."""
    sizes = ram.Architecture()
    with META:
        network = ram.Ram(sizes).eval()
    images = torch.empty((BATCH, 3, sizes.image_size, sizes.image_size), device=META)
    work = forward_bytes(lambda: network(images), known=[*weights(network), images])
    return [
        Need("RAM, float32", parameters(network) * torch.float32.itemsize),
        Need(f"tagging, {BATCH} images", work, lasting=False),
    ]


def uncounted(names: Sequence[str]) -> list[str]:
    """Return the metrics with networks that the table lacks."""
    return [name for name in names if METRICS[name].needs_weights and name not in COSTS]
