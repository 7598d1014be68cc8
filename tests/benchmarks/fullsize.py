"""What each stage costs at full size, beside the plain way and beside the card's limit.

Random weights in the published architectures, the paper's steps, guidance and N. A stage (rollout, VAE decode, encode,
scores, DPO steps in both batchings) is timed warm, the median of `--repeats`; the ways are those of ways.py. The first
call of each is counted instead (counting.py): operations beside the rate that the device reaches in a plain product
give the model FLOPs utilisation, and the least seconds beside its memory's rate, too.

    python tests/benchmarks/fullsize.py --architecture sd2-base --output sd2.jsonl       # a data-centre GPU
    python tests/benchmarks/fullsize.py --architecture flux-dev --stages rollout train   # a part of it
    python tests/benchmarks/fullsize.py --architecture sd2-base --count                  # no GPU: counts, true size
    python tests/benchmarks/fullsize.py --architecture sd2-base --device cpu --width 8 --size 128 --steps 4

A row of `--output` is written as soon as it is there. On a GPU each way is made, timed and freed by itself, so that its
memory is its own; on the CPU the ways take turns, one thread, CPU seconds. `--width` divides the networks' widths, for
a machine without a GPU: its ratios say little of the full size.
"""

import argparse
import gc
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import counting
import diffusers
import random_model
import scoring
import torch
import ways
from accelerate import Accelerator

from dp2osr import config, stage

WARM_UPS = 1  # further calls that are not timed, after the one that is counted
HEADER = (
    f"{'stage':18}{'unit':>9}{'ours':>10}{'plain':>10}{'ratio':>7}{'spread':>12}{'seconds':>10}"
    f"{'TFLOP':>9}{'least s':>10}{'MFU':>12}{'GiB':>13}"
)


@dataclass
class Way:
    """One way: seconds a unit of each repeat, peak memory in GiB (0 on the CPU), and what a unit takes."""

    count: counting.Count = field(default_factory=counting.Count)
    seconds: list[float] = field(default_factory=list)
    gib: float = 0.0

    @property
    def per_second(self) -> float:
        """Units a second; 0 where memory was short."""
        return 1 / median(self.seconds) if self.seconds else 0.0

    @property
    def spread(self) -> float:
        """Half the range of the repeats as a share of their median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / median(self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class Device:
    """What the device reaches: FLOP/s of a square product in the networks' dtype, bytes/s of a copy (read + write)."""

    device: torch.device
    name: str
    rate: float
    memory: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Device":
        """Time a product and a copy, the best of six."""
        gpu = device.type == "cuda"
        side, size = (8192, 2**31) if gpu else (1024, 2**27)
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        works = (lambda: left @ right, lambda: target.copy_(source))
        product, copy = (min(timed(work, device)[0] for _ in range(6)) for work in works)
        name = torch.cuda.get_device_name(device) if gpu else "CPU"
        return cls(device, name, rate=2 * side**3 / product, memory=2 * size / copy)

    def least(self, count: counting.Count) -> float:
        """Return the least seconds of a unit: its operations, or reading the weights where that takes longer."""
        return max(count.flops / self.rate, count.weights / self.memory)

    def share(self, way: Way) -> str:
        """Return the model FLOPs utilisation of a way."""
        return f"{way.count.flops * way.per_second / self.rate:.0%}" if way.seconds else "-"


@dataclass
class Row:
    """A stage in both ways."""

    stage: str
    unit: str
    ours: Way
    plain: Way

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is: the median over turns; None where memory was short for one."""
        pairs = list(zip(self.ours.seconds, self.plain.seconds, strict=False))
        return median(plain / ours for ours, plain in pairs) if pairs else None

    def line(self, device: Device) -> str:
        """Return the row of the printed table."""
        both = (self.ours, self.plain)
        rates = [f"{way.per_second:.4g}" if way.seconds else "no memory" for way in both]
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        spread = "/".join(f"{way.spread:.0%}" for way in both)
        seconds = f"{1 / self.ours.per_second:.4f}" if self.ours.seconds else "-"
        share = "/".join(device.share(way) for way in both)
        memory = "/".join(f"{way.gib:.1f}" for way in both)
        return (
            f"{self.stage:18}{self.unit + 's/s':>9}{rates[0]:>10}{rates[1]:>10}{ratio:>7}{spread:>12}{seconds:>10}"
            f"{self.ours.count.flops / 1e12:>9.3f}{device.least(self.ours.count):>10.4f}{share:>12}{memory:>13}"
        )


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return seconds of a call (a GPU's wall clock, the CPU's own time) and its peak memory in GiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = scoring.clock(device)
    work()
    seconds = scoring.clock(device) - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def measure(contest: ways.Contest, device: torch.device, repeats: int) -> Row:
    """Time both ways of a stage: apart on a GPU, in turns on the CPU."""
    both = (Way(), Way())
    for turn in [[0], [1]] if device.type == "cuda" else [[0, 1]]:
        try:
            works = {way: contest.make[way]() for way in turn}
            for way, work in works.items():
                both[way].count = counting.counted(work) * (1 / contest.units[way])
                for _ in range(WARM_UPS):
                    work()
            for _, (way, work) in itertools.product(range(repeats), works.items()):
                seconds, gib = timed(work, device)
                both[way].seconds.append(seconds / contest.units[way])
                both[way].gib = max(both[way].gib, gib)
        except torch.OutOfMemoryError:
            both[turn[0]].seconds.clear()
        works = {}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Row(contest.stage, contest.unit, *both)


def record(row: Row, device: Device, args: argparse.Namespace, setup: ways.Setup) -> str:
    """Return a row as a line of JSON, with all that it depends on."""
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "architecture": args.architecture,
        **{name: getattr(args, name) for name in ("width", "size", "batch", "top", "repeats")},
        "steps": setup.policy.sampling.steps,
        "speed": setup.speed.model_dump(),
        "dtype": str(setup.backend.dtype),
        "plain_dtype": str(setup.plain_dtype),
        "card": device.name,
        "product_flops_per_s": device.rate,
        "copy_bytes_per_s": device.memory,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": torch.version.cuda},
    }
    return json.dumps(facts | asdict(row) | {"ratio": row.ratio, "units_per_second": row.ours.per_second})


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(random_model.OVERLAYS), required=True)
    parser.add_argument("--stages", nargs="+", choices=[*ways.STAGES], default=[*ways.STAGES])
    parser.add_argument("--count", action="store_true", help="count at true size on no device, and end")
    parser.add_argument("--configfile", type=Path, nargs="*", default=[], help="overlays on the paper's setting")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=1, help="divides the networks' widths")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, help="of sampling; the paper's unless given")
    parser.add_argument("--batch", type=int, help="candidates at once; the setting's unless given")
    parser.add_argument("--top", type=int, help="N; the paper's unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    return parser.parse_args()


def in_float32(
    policy: config.PolicySettings, train: config.TrainSettings
) -> tuple[config.PolicySettings, config.TrainSettings]:
    """Return the settings for a CPU."""
    sampler = policy.sampling.model_copy(update={"dtype": "float32"})
    return policy.model_copy(update={"sampling": sampler}), train.model_copy(update={"precision": "no"})


def make_setup(
    policy: config.PolicySettings, train: config.TrainSettings, args: argparse.Namespace, device: torch.device
) -> ways.Setup:
    """Return the models on the device; the plain way is in float16 as the authors', on a CPU in float32."""
    backend = random_model.load(policy, device)
    plain = torch.float32 if device.type == "cpu" else torch.float16
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=train.precision)
    return ways.Setup(backend, policy, train, args.size, args.batch, args.top, plain, accelerator, args.speed)


def run(policy: config.PolicySettings, train: config.TrainSettings, args: argparse.Namespace) -> None:
    """Measure the stages, each with models of its own, and print a table."""
    where = stage.device(args.device)
    if where.type == "cpu":
        torch.set_num_threads(1)
        policy, train = in_float32(policy, train)
    device = Device.measure(where, getattr(torch, policy.sampling.dtype))
    sizes = f"width / {args.width}, {args.size} px, {policy.sampling.steps} steps, batch {args.batch}"
    print(f"{args.architecture}, {sizes}, N = {args.top}, median of {args.repeats}; {device.name},")
    print(f"{policy.sampling.dtype}, torch {torch.__version__};", end=" ")
    print(f"a product reaches {device.rate / 1e12:.3g} TFLOP/s, a copy {device.memory / 1e9:.3g} GB/s")
    print(HEADER, flush=True)
    for name in args.stages:
        run_stage(name, make_setup(policy, train, args, where), device, args)


def run_stage(name: str, setup: ways.Setup, device: Device, args: argparse.Namespace) -> None:
    """Measure a stage; print its rows and append them to the output, each as soon as it is there."""
    for contest in ways.STAGES[name](setup):
        row = measure(contest, setup.device, args.repeats)
        print(row.line(device), flush=True)
        if args.output:
            with args.output.open("a") as handle:
                handle.write(record(row, device, args, setup) + "\n")


def main() -> None:
    """Measure or count."""
    args = parse_args()
    warnings.filterwarnings("ignore", "`FluxPosEmbed`", FutureWarning)
    found = random_model.settings(args.architecture, args.configfile)
    args.top = args.top or found.runs["default"].pairs.top
    args.speed = found.rollout.speed
    args.batch = args.batch or found.rollout.batch_size
    base, train = found.policies["base"], found.runs["default"].train
    sampler = base.sampling.model_copy(update={"steps": args.steps or base.sampling.steps})
    with tempfile.TemporaryDirectory() as folder:
        base = base.model_copy(update={"sampling": sampler})
        policy = random_model.policy(base, args.architecture, args.width, Path(folder) / "model")
        if not args.count:
            return run(policy, train, args)
        sizes = {"size": args.size, "batch": args.batch, "top": args.top}
        print(f"{args.architecture}, width / {args.width}, {args.size} px, {sampler.steps} steps")
        for line in counting.report(args.architecture, policy, train, **sizes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
