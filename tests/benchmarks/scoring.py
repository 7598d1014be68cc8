"""Time the Scorer against pyiqa called image by image: same scores, seconds of each metric, the ratio.

Candidates are M noisy and blurred versions of photograph crops. The two ways take turns within one run, and the table
has the median of each and of their ratio, so that other work on the machine counts on both sides. On the CPU one
thread, and CPU time. Each metric is given decoded images; with --files, all of them then score encoded ones:
metric(path, path) for each metric and image, and the score stage's functions from its two tars to its table.
Run: python tests/benchmarks/scoring.py [--files] [--trained] [--size 256] [--device cuda]
"""

import argparse
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dp2osr.images import load_builtin
from dp2osr.iqa import niqe, pretrained
from dp2osr.iqa.metric import Scorer
from dp2osr.metrics import METRICS
from dp2osr.resume import Parts
from dp2osr.shards import count_samples, encode_image, write_shard
from dp2osr.stages import score

PHOTOS = ["pyiqa/I03", "pyiqa/I04", "skimage/coffee", "skimage/chelsea", "pyiqa/I08", "skimage/astronaut"]
DEFAULT = ["fsim", "gmsd", "nlpd", "niqe", "psnr", "ssim", "piqe"]
TRAINED = ["lpips", "topiq_fr", "afine_fr", "topiq_nr", "afine_nr", "musiq"]  # with random weights
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


def random_weights() -> Any:
    """Return tests/random_metrics.py."""
    file = Path(__file__).resolve().parents[1] / "random_metrics.py"
    spec = importlib.util.spec_from_file_location("random_metrics", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clock(device: torch.device) -> float:
    """Return CPU seconds of this process, or the wall clock once the GPU has nothing left to do."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], np.ndarray], device: torch.device) -> tuple[np.ndarray, float]:
    """Return what the function returns, and its seconds."""
    start = clock(device)
    found = function()
    return found, clock(device) - start


def plain(name: str, model: Any, images: torch.Tensor, hr: torch.Tensor, device: torch.device) -> np.ndarray:
    """Return pyiqa's scores (B,), one image at a time from memory of the host."""
    pairs = zip(images.split(1), hr.split(1), strict=True)
    given = ([each.to(device, copy=True) for each in pair] for pair in pairs)
    return np.array([float(model(*pair[: 1 + (METRICS[name].kind == "fr")])) for pair in given])


def compare(
    name: str, images: torch.Tensor, hr: torch.Tensor, args: argparse.Namespace, model: Path
) -> tuple[list[float], list[float], float]:
    """Return seconds of each repeat, one by one and by the Scorer, and the largest difference of scores.

    The Scorer's own pyiqa model is called for both, so that they have the same weights.
    """
    device = torch.device(args.device)
    judge = Scorer([name], device=device, niqe=model, niqe_block=NIQE_BLOCK, batch_size=args.batch_size)
    other = torch.rand(2, *hr.shape[1:])
    plain(name, judge._models[name], other, other, device)
    slow, fast, difference = [], [], 0.0
    for _ in range(args.repeats):
        judge.score(other, other)  # another HR image: nothing of the last repeat is kept
        single, seconds = timed(lambda: plain(name, judge._models[name], images, hr, device), device)
        slow.append(seconds)
        shared, seconds = timed(lambda: judge.score(images, hr)[name], device)
        fast.append(seconds)
        difference = max(difference, float(np.abs(single - shared).max()))
    return slow, fast, difference


def report(names: list[str], images: torch.Tensor, hr: torch.Tensor, args: argparse.Namespace, model: Path) -> None:
    """Print a line a metric, the full-reference ones, and the whole."""
    print(f"{'metric':10}{'one by one':>14}{'Scorer':>12}{'ratio':>8}{'max |difference|':>20}", flush=True)
    totals: dict[str, list[np.ndarray]] = {"all": [], "all FR": []}
    for name in names:
        slow, fast, difference = compare(name, images, hr, args, model)
        each = [f"{median(seconds) / len(images) * 1e3:.2f} ms" for seconds in (slow, fast)]
        ratio = median(a / b for a, b in zip(slow, fast, strict=True))
        print(f"{name:10}{each[0]:>14}{each[1]:>12}{ratio:>8.2f}{difference:>20.1e}", flush=True)
        totals["all"].append(np.array([slow, fast]))
        if METRICS[name].kind == "fr":
            totals["all FR"].append(np.array([slow, fast]))
    for label, parts in totals.items():
        if parts:
            slow, fast = np.sum(parts, axis=0)
            print(f"{label:10}{median(slow):>12.2f} s{median(fast):>10.2f} s{median(slow / fast):>8.2f}")


def write_files(images: torch.Tensor, hr: torch.Tensor, folder: Path) -> list[tuple[Path, Path]]:
    """Write each image (B, 3, H, W) and the HR images as PNG, and the score stage's tars; return the paths of pairs."""
    names: dict[bytes, str] = {}
    pairs, candidates = [], []
    for index, (image, reference) in enumerate(zip(images, hr, strict=True)):
        encoded = encode_image(image)
        group = names.setdefault(encode_image(reference), f"hr{len(names)}")
        (folder / f"{index}.png").write_bytes(encoded)
        pairs.append((folder / f"{index}.png", folder / f"{group}.png"))
        notes = json.dumps({"group_id": group, "rollout": index}).encode()
        candidates.append((f"{index:06d}", {"json": notes, "png": encoded}))
    for data, group in names.items():
        (folder / f"{group}.png").write_bytes(data)
    write_shard(folder / "lr.tar", [(group, {"hr.png": data}) for data, group in names.items()])
    write_shard(folder / "candidates.tar", candidates)
    return pairs


def plain_files(judge: Scorer, pairs: list[tuple[Path, Path]]) -> np.ndarray:
    """Return scores (metrics, B): each metric reads both files of each pair, an NR metric one."""

    def one(name: str, pair: tuple[Path, Path]) -> float:
        return float(judge._models[name](*map(str, pair[: 1 + (METRICS[name].kind == "fr")])))

    return np.array([[one(name, pair) for pair in pairs] for name in judge.names])


def stage_files(judge: Scorer, folder: Path) -> np.ndarray:
    """Return scores (metrics, B): the score stage's way from its tars to its table."""
    tar, parts = folder / "candidates.tar", Parts(folder / "scores.parquet", "benchmark")
    hr = score.HrImages(folder / "lr.tar") if judge.needs_hr else None
    chunks = score.prepare(score.read_candidates(tar), tar, hr, parts, pin=judge.device.type == "cuda")
    frame = score.score_all(chunks, judge, parts, num_candidates=count_samples(tar))
    parts.clear()
    return frame.pivot(index="metric", columns="rollout", values="score").loc[judge.names].to_numpy()


def report_files(
    names: list[str], images: torch.Tensor, hr: torch.Tensor, args: argparse.Namespace, model: Path
) -> None:
    """Print a line for all metrics, each of both ways from encoded images."""
    device = torch.device(args.device)
    judge = Scorer(names, device=device, niqe=model, niqe_block=NIQE_BLOCK, batch_size=args.batch_size)
    other = torch.rand(2, *hr.shape[1:])
    slow, fast, difference = [], [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_files(images, hr, folder)
        plain_files(judge, pairs[:1])
        for _ in range(args.repeats):
            judge.score(other, other)
            single, seconds = timed(lambda: plain_files(judge, pairs), device)
            slow.append(seconds)
            shared, seconds = timed(lambda: stage_files(judge, folder), device)
            fast.append(seconds)
            difference = max(difference, float(np.abs(single - shared).max()))
    ratio = median(a / b for a, b in zip(slow, fast, strict=True))
    print(f"{'from files: ' + ', '.join(names)}")
    print(f"{'':10}{median(slow):>12.2f} s{median(fast):>10.2f} s{ratio:>8.2f}{difference:>20.1e}", flush=True)


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=2, choices=range(1, len(PHOTOS) + 1))
    parser.add_argument("--rollouts", type=int, default=16, help="candidates a group")
    parser.add_argument("--size", type=int, default=96, help="pixels, at most 384")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--files", action="store_true", help="from encoded images too")
    parser.add_argument("--trained", action="store_true", help="true networks with random weights instead")
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS], metavar="NAME", help="instead of the default set")
    return parser.parse_args()


def main() -> None:
    """Make the images and print the table."""
    args = parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    crops = torch.stack([crop(name, args.size) for name in PHOTOS[: args.groups]])
    images = torch.cat([degrade(hr, args.rollouts, generator) for hr in crops])
    hr = crops.repeat_interleave(args.rollouts, dim=0)
    made = random_weights()
    pretrained.create = lambda name, device, **_: made.create(name, device)
    where = f"{args.device}, batch {args.batch_size}, median of {args.repeats}"
    print(f"{args.rollouts} candidates of each of {args.groups} images at {args.size} px, {where}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "niqe.mat"
        niqe.save(model, *niqe.fit(crops, block_size=NIQE_BLOCK, sharpness=0.0), block_size=NIQE_BLOCK)
        names = args.metrics or (TRAINED if args.trained else DEFAULT)
        report(names, images, hr, args, model)
        if args.files:
            for some in ([name for name in names if METRICS[name].kind == "fr"], names):
                report_files(some, images, hr, args, model)


if __name__ == "__main__":
    main()
