"""What a rollout, an encode and a DPO step cost at full size, beside the plain way and beside the card's limit.

Random weights in the published architectures, the paper's steps and guidance. Each stage is timed beside the plain way
in turns (median of `--repeats`, the first of each not counted), and its floating-point operations are counted and set
against the matrix rate that the device reaches in a plain product. The plain ways: diffusers' own pipeline, one image
and one seed at a time; the VAE one image at a time; a textbook Diffusion-DPO step with two whole models, pair by pair.

    python tests/benchmarks/fullsize.py --architecture sd2-base                       # a data-centre GPU
    python tests/benchmarks/fullsize.py --architecture sd2-base --device cpu --width 8 --size 128 --steps 4

`--width` divides the networks' widths, for a machine without a GPU: its ratios say little of the full size.
Scores: tests/benchmarks/scoring.py.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import random_model
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from dp2osr import config, sampling, stage
from dp2osr.models.backend import Backend
from dp2osr.training.batches import Schedule
from dp2osr.training.loop import make_optimizer
from dp2osr.training.loss import dpo_loss
from dp2osr.training.step import Batch, Feed, Gradient, branch_errors, part

SCALE = 4


@dataclass
class Row:
    """What a unit costs our way and the plain way: seconds, peak memory in GiB (0 on the CPU), our counted FLOPs."""

    stage: str
    unit: str
    ours_s: float
    plain_s: float
    ours_gib: float
    plain_gib: float
    flops: float

    def line(self, rate: float) -> str:
        """Return the row of the printed table; rate: FLOP/s of the device's matrix product."""
        share = f"{self.flops / self.ours_s / rate:.0%}" if self.flops else ""
        memory = f"{self.ours_gib:.1f} / {self.plain_gib:.1f}"
        ratio = self.plain_s / self.ours_s
        return (
            f"{self.stage:14}{self.unit:>7}{self.ours_s:>11.4f}{self.plain_s:>11.4f}{ratio:>8.2f}{memory:>15}{share:>7}"
        )


@dataclass
class Bench:
    """The models and how to measure."""

    backend: Backend
    policy: config.PolicySettings
    train: config.TrainSettings
    args: argparse.Namespace

    @property
    def device(self) -> torch.device:
        """Where all runs."""
        return self.backend.device

    def timed(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Return seconds of a call and its peak memory in GiB."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0

    def compare(
        self, stage: str, unit: str, ours: Callable[[], Any], plain: Callable[[], Any], units: tuple[int, int]
    ) -> Row:
        """Time both ways in turns; units: how many each makes a call."""
        with FlopCounterMode(display=False) as counter:
            ours()
        plain()
        turns = [(self.timed(ours), self.timed(plain)) for _ in range(self.args.repeats)]
        seconds = [statistics.median(turn[way][0] for turn in turns) / units[way] for way in (0, 1)]
        memory = [max(turn[way][1] for turn in turns) for way in (0, 1)]
        return Row(stage, unit, *seconds, *memory, flops=counter.get_total_flops() / units[0])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of a square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def pipeline(bench: Bench, branch: Any) -> Callable[[torch.Tensor], Any]:
    """Return diffusers' own pipeline as a function of one control image (1, 3, H, W)."""
    backend: Any = bench.backend
    vae, sampler = backend.autoencoder.vae, bench.policy.sampling
    prompt, negative = (random_model.embeddings(backend, bench.policy, 1) for _ in range(2))
    common = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance, "output_type": "pt"}
    common |= {"height": bench.args.size, "width": bench.args.size}
    none: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if backend.backbone_folder == "unet":
        none |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind, scheduler = diffusers.StableDiffusionControlNetPipeline, backend.make_scheduler(sampler.scheduler)
        found = kind(vae=vae, unet=backend.unet, controlnet=branch, scheduler=scheduler, **none)
        common |= {
            f"{name}prompt_embeds": each["prompt_embeds"] for name, each in (("", prompt), ("negative_", negative))
        }
        image = "image"
    else:
        none |= {"text_encoder_2": None, "tokenizer_2": None}
        kind = diffusers.FluxControlNetPipeline
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(backend.scheduler_config)
        found = kind(vae=vae, transformer=backend.transformer, controlnet=branch, scheduler=scheduler, **none)
        common |= {"prompt_embeds": prompt["prompt_embeds"], "pooled_prompt_embeds": prompt["pooled"]}
        image = "control_image"
    found.set_progress_bar_config(disable=True)
    # As the authors' script: networks in half precision, autocast where the VAE is not
    autocast = torch.autocast(bench.device.type, backend.dtype, enabled=backend.dtype != torch.float32)

    def restore(control: torch.Tensor) -> Any:
        with autocast:
            return found(**{image: control}, **common).images

    return restore


def rollout(bench: Bench) -> Row:
    """Candidates of one image: a batch beside diffusers' pipeline."""
    backend, args = bench.backend, bench.args
    branch = random_model.control_branch(backend, backend.dtype).eval()
    lr = torch.rand(1, 3, args.size // SCALE, args.size // SCALE, device=bench.device)
    plain = pipeline(bench, branch)
    prompt, negative = (random_model.embeddings(backend, bench.policy, args.batch) for _ in range(2))

    def ours() -> torch.Tensor:
        return sampling.restore(
            backend,
            branch,
            lr.expand(args.batch, -1, -1, -1),
            scale=SCALE,
            embeddings=prompt,
            negative=negative,
            seeds=range(args.batch),
            sampling=bench.policy.sampling,
        )

    control = sampling.images_control(lr, SCALE)
    return bench.compare("rollout", "image", ours, lambda: plain(control), (args.batch, 1))


def autoencoder(bench: Bench) -> Iterator[Row]:
    """Decoding of a batch and encoding of a group's candidates, beside one image at a time."""
    backend, args = bench.backend, bench.args
    images = torch.rand(args.batch, 3, args.size, args.size, device=bench.device)
    latents = backend.encode_images(images)
    for name, work, batch in (("decode", backend.decode_latents, latents), ("encode", backend.encode_images, images)):

        def single(work: Any = work, batch: torch.Tensor = batch) -> list[Any]:
            return [work(one) for one in batch.split(1)]

        yield bench.compare(name, "image", lambda work=work, batch=batch: work(batch), single, (args.batch, args.batch))


class RandomPack:
    """The training pack of groups that nobody encoded."""

    def __init__(self, bench: Bench) -> None:
        backend, size = bench.backend, bench.args.size
        image = torch.rand(1, 3, size, size, device=bench.device)
        self._latent = backend.encode_images(image)[0].cpu()
        self._control = backend.prepare_control(image)[0].float().cpu()

    def load(self, group_id: str, rollouts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents (K, C, h, w) and the control of a group."""
        return torch.randn(len(rollouts), *self._latent.shape), self._control


def textbook(bench: Bench, accelerator: Accelerator, pairs: Batch, settings: config.TrainSettings) -> Callable[[], Any]:
    """Return a Diffusion-DPO step that holds two whole models and computes each pair by itself, all in one batch."""
    models = []
    for _ in range(2):
        backend: Any = copy.copy(bench.backend)
        backend.backbone = copy.deepcopy(bench.backend.backbone)
        setattr(backend, backend.backbone_folder, backend.backbone)
        models.append((backend, random_model.control_branch(backend, torch.float32)))
    (policy, branch), (frozen, reference) = models
    optimizer = make_optimizer(branch.train(), settings)
    reference.requires_grad_(False)

    def step() -> None:
        for start in range(0, len(pairs.latents), settings.micro_batch):
            piece = part(pairs, slice(start, start + settings.micro_batch))
            with torch.no_grad():
                base = branch_errors(accelerator, frozen, reference, piece)
            errors = branch_errors(accelerator, policy, branch, piece)
            weights = torch.ones(len(errors) // 2, device=errors.device)
            loss, _ = dpo_loss(errors[::2], base[::2], errors[1::2], base[1::2], beta=settings.beta, weights=weights)
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    if settings.gradient_checkpointing:
        policy.checkpoint_gradients(branch)
    return step


def training(bench: Bench) -> Iterator[Row]:
    """A DPO step of one group and of its images as single pairs, beside the textbook's."""
    top = bench.args.top
    accelerator = Accelerator(cpu=bench.device.type == "cpu", mixed_precision=bench.train.precision)
    rows = [("group", w, top + loser, 1.0) for w in range(top) for loser in range(top)]
    pairs = pd.DataFrame(rows, columns=["group_id", "chosen", "rejected", "weight"])
    prompt = {name: tensor[0].cpu() for name, tensor in random_model.embeddings(bench.backend, bench.policy, 1).items()}
    pack: Any = RandomPack(bench)
    feed = Feed(pack=pack, embeddings={"group": prompt}, backend=bench.backend, timestep_density="uniform")
    for batching in ("groups", "pairs"):
        changes = {"batching": batching, "groups_per_step": 1, "pairs_per_step": top, "accumulation": 1}
        settings = bench.train.model_copy(update=changes)
        units = Schedule(pairs, settings=settings, seed=0).step(1)
        policy, reference = (random_model.control_branch(bench.backend, torch.float32) for _ in range(2))
        if settings.gradient_checkpointing:
            bench.backend.checkpoint_gradients(policy)
        optimizer = make_optimizer(policy.train(), settings)
        gradient = Gradient(accelerator, feed, policy, reference.requires_grad_(False), settings)

        def ours(gradient: Gradient = gradient, units: Any = units, optimizer: Any = optimizer) -> None:
            gradient.step(units)
            optimizer.step()
            optimizer.zero_grad()

        single = Schedule(pairs, settings=settings.model_copy(update={"batching": "pairs"}), seed=0).step(1)
        plain = textbook(bench, accelerator, feed.batch(single), settings)
        yield bench.compare(f"DPO {batching}", "pair", ours, plain, (sum(u.num_pairs for u in units), top))


def main() -> None:
    """Measure all stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(random_model.OVERLAYS), required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=1, help="divides the networks' widths")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, help="of sampling; the paper's unless given")
    parser.add_argument("--batch", type=int, default=8, help="candidates at once")
    parser.add_argument("--top", type=int, help="N; the paper's unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args()
    device = stage.device(args.device)
    found = random_model.settings(args.architecture)
    args.top = args.top or found.runs["default"].pairs.top
    changes: dict[str, Any] = {"steps": args.steps} if args.steps else {}
    train = found.runs["default"].train
    if device.type == "cpu":
        changes["dtype"] = "float32"
        train = train.model_copy(update={"precision": "no"})
    with tempfile.TemporaryDirectory() as folder:
        base = found.policies["base"]
        model = random_model.reduced(args.architecture, args.width, Path(folder) / "model")
        policy = base.model_copy(update={"model": str(model), "sampling": base.sampling.model_copy(update=changes)})
        backend = random_model.load(policy, device)
    bench = Bench(backend, policy, train, args)
    rate = matrix_rate(device, backend.dtype)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.architecture}, width / {args.width}, {args.size} px, {policy.sampling.steps} steps, {card},")
    print(f"{backend.dtype}, torch {torch.__version__}; a matrix product reaches {rate / 1e12:.2f} TFLOP/s")
    print(f"{'stage':14}{'unit':>7}{'ours, s':>11}{'plain, s':>11}{'ratio':>8}{'GiB':>15}{'MFU':>7}")
    rows = []
    for row in (rollout(bench), *autoencoder(bench), *training(bench)):
        print(row.line(rate), flush=True)
        rows.append(asdict(row))
    if args.output:
        args.output.write_text(
            json.dumps({"card": card, "rate": rate, "arguments": vars(args), "rows": rows}, default=str)
        )


if __name__ == "__main__":
    main()
