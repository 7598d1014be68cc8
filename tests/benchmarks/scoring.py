"""Time the batched Scorer against pyiqa called image by image: same scores, CPU seconds of each metric, the ratio.

Candidates are M noisy and blurred versions of photograph crops. One thread; CPU time, so that other work on the
machine does not count. Run: python tests/benchmarks/scoring.py
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dp2osr.images import load_builtin
from dp2osr.iqa import niqe
from dp2osr.iqa.metric import Scorer
from dp2osr.metrics import METRICS

PHOTOS = ["pyiqa/I03", "pyiqa/I04", "skimage/coffee", "skimage/chelsea", "pyiqa/I08", "skimage/astronaut"]
DEFAULT = ["fsim", "gmsd", "nlpd", "niqe", "psnr", "ssim", "piqe"]
NIQE_BLOCK = 32  # pixels


def crop(name: str, size: int) -> torch.Tensor:
    """Return the centre (3, size, size) of a built-in photograph, float32 RGB in [0, 1]."""
    array = np.array(Image.open(io.BytesIO(load_builtin(name))).convert("RGB"))
    top, left = ((side - size) // 2 for side in array.shape[:2])
    return torch.from_numpy(array[top : top + size, left : left + size].copy()).permute(2, 0, 1).float().div(255)


def degrade(hr: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return (count, 3, H, W): random blends with a blurred image, random noise, 8-bit levels."""
    blurred = torch.nn.functional.avg_pool2d(hr[None], 5, 1, 2, count_include_pad=False)
    blend = torch.rand(count, 1, 1, 1, generator=generator)
    sigma = 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, *hr.shape, generator=generator)
    return (hr * (1 - blend) + blurred * blend + sigma * noise).clamp(0, 1).mul(255).round().div(255)


def plain_scores(name: str, images: torch.Tensor, hr: torch.Tensor, model: Path) -> tuple[np.ndarray, float]:
    """Return pyiqa's scores (B,) image by image, and CPU seconds."""
    import pyiqa

    cpu = torch.device("cpu")
    options = {"type": "BlockNIQE", "block_size": NIQE_BLOCK, "pretrained_model_path": str(model)}
    metric = pyiqa.create_metric(name, device=cpu, **(options if name == "niqe" else {}))
    full_reference = METRICS[name].kind == "fr"
    pairs = list(zip(images.split(1), hr.split(1), strict=True))
    metric(*pairs[0][: 1 + full_reference])
    start = time.process_time()
    scores = [float(metric(image, reference) if full_reference else metric(image)) for image, reference in pairs]
    return np.array(scores), time.process_time() - start


def batched_scores(
    name: str, images: torch.Tensor, hr: torch.Tensor, model: Path, batch: int
) -> tuple[np.ndarray, float]:
    """Return the Scorer's scores (B,), and CPU seconds."""
    scorer = Scorer([name], device=torch.device("cpu"), niqe=model, niqe_block=NIQE_BLOCK, batch_size=batch)
    scorer.score(images[:1], hr[:1])
    start = time.process_time()
    scores = scorer.score(images, hr)[name]
    return scores, time.process_time() - start


def main() -> None:
    """Print a line a metric, and the whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=4, choices=range(1, len(PHOTOS) + 1))
    parser.add_argument("--rollouts", type=int, default=16, help="candidates a group")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=DEFAULT,
        choices=[n for n, metric in METRICS.items() if not metric.needs_weights],
        metavar="NAME",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    crops = torch.stack([crop(name, args.size) for name in PHOTOS[: args.groups]])
    images = torch.cat([degrade(hr, args.rollouts, generator) for hr in crops])
    hr = crops.repeat_interleave(args.rollouts, dim=0)
    totals = np.zeros(2)
    print(f"{len(images)} candidates of {args.groups} groups, {args.size} px, batch {args.batch_size}, one thread")
    print(f"{'metric':10}{'one by one':>14}{'batched':>12}{'ratio':>8}{'max |difference|':>20}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "niqe.mat"
        niqe.save(model, *niqe.fit(crops, block_size=NIQE_BLOCK, sharpness=0.0), block_size=NIQE_BLOCK)
        for name in args.metrics:
            plain, slow = plain_scores(name, images, hr, model)
            batched, fast = batched_scores(name, images, hr, model, args.batch_size)
            totals += (slow, fast)
            each = [f"{seconds / len(images) * 1e3:.2f} ms" for seconds in (slow, fast)]
            print(f"{name:10}{each[0]:>14}{each[1]:>12}{slow / fast:>8.2f}{np.abs(plain - batched).max():>20.1e}")
    print(f"{'all':10}{totals[0]:>12.2f} s{totals[1]:>10.2f} s{totals[0] / totals[1]:>8.2f}")


if __name__ == "__main__":
    main()
