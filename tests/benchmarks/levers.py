"""Each speed lever beside the way without it: seconds of both, their ratio, and how far the images go apart.

    python tests/benchmarks/levers.py                                              # the embedded SD model
    python tests/benchmarks/levers.py --model flow                                 # the embedded flow model
    python tests/benchmarks/levers.py --model sd2-base --device cuda --size 512    # published shape, random weights
    python tests/benchmarks/levers.py --count                                      # operations at full size, no GPU

Both ways take turns in one run: ratios are medians over the turns, the first of each way not counted. On a CPU seconds
are of the process, but for the thread that encodes. `--count` counts floating-point operations of the published
architectures on torch's meta device, without weights or a GPU: what a lever can gain at most, where arithmetic binds.
"""

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import random_model
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from dp2osr import config, resume, sampling, shards, stage
from dp2osr.config_rollout import SpeedSettings
from dp2osr.iqa.pretrained import replaced
from dp2osr.models import footprint, parts, speed
from dp2osr.models.backend import Backend, Embeddings, load_backend
from dp2osr.stages import rollout
from dp2osr.training.loss import group_pairs
from dp2osr.training.step import Batch, branch_errors

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = {"sd": [], "flow": [ROOT / "config" / "tiny-flow.yaml"]}
FLOW = {"flow", "flux-dev"}
SCALE = 4
PLAIN = {
    "channels_last": False,
    "fuse_qkv": False,
    "attention": "auto",
    "cudnn_benchmark": False,
    "compile": False,
    "compile_cache": "",
}


@dataclass(frozen=True)
class Way:
    """How candidates are sampled: changes of the policy's sampling and of the plain switches, and what is patched."""

    sampling: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    batch: int = 0  # candidates at once; 0: all
    around: Callable[["Setup"], AbstractContextManager[Any]] = lambda setup: nullcontext()


@dataclass
class Setup:
    """A model made ready for a way, and what it restores."""

    backend: Backend
    branch: Any
    policy: config.PolicySettings
    speed: SpeedSettings
    prompt: Embeddings
    negative: Embeddings
    args: argparse.Namespace

    def images(self, batch: int) -> torch.Tensor:
        """Return the candidates (B, 3, H, W) in [0, 1], `batch` at once."""
        args, found = self.args, []
        side = args.size // SCALE
        lr = torch.rand(args.images, 3, side, side, generator=torch.Generator().manual_seed(1))
        for span in torch.arange(args.images).split(batch or args.images):
            with speed.attention(self.speed):
                restored = sampling.restore(
                    self.backend,
                    self.branch,
                    lr[span].to(self.backend.device),
                    scale=SCALE,
                    embeddings={name: tensor[span] for name, tensor in self.prompt.items()},
                    negative={name: tensor[span] for name, tensor in self.negative.items()},
                    seeds=span.tolist(),
                    sampling=self.policy.sampling,
                )
            found.append(restored)
        return torch.cat(found).float().cpu()


def policy_of(args: argparse.Namespace, changes: dict[str, Any]) -> config.PolicySettings:
    """Return the settings of the model's policy, on a CPU in float32, with `changes` of its sampling."""
    if args.model in EMBEDDED:
        found = config.read(ROOT / "config" / "config.yaml", *EMBEDDED[args.model]).policy("base")
    else:
        found = random_model.settings(args.model).policy("base")
    plain: dict[str, Any] = {"dtype": "float32", "vae_dtype": "float32"} if args.device == "cpu" else {}
    plain |= {"steps": args.steps} if args.steps else {}
    plain |= {"guidance": args.guidance} if args.guidance else {}
    return found.model_copy(update={"sampling": found.sampling.model_copy(update=plain | changes)})


def load(args: argparse.Namespace, way: Way) -> Setup:
    """Load the model, and make it ready."""
    policy, device = policy_of(args, way.sampling), torch.device(args.device)
    if args.model in EMBEDDED:
        backend = load_backend(policy, device=device)
        branch = backend.load_control(policy.control)
        texts = [[f"a photograph of {n} things, sharp" for n in range(args.images)], [""] * args.images]
        prompt, negative = map(backend.embed_prompts, texts)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)  # the same weights for each way
            model = random_model.reduced(args.model, args.width, Path(folder) / "model")
            backend = random_model.load(policy.model_copy(update={"model": str(model)}), device)
            branch = random_model.control_branch(backend, backend.dtype).eval()
            prompt, negative = (random_model.embeddings(backend, policy, args.images) for _ in range(2))
    settings = SpeedSettings(**PLAIN | way.speed)
    speed.prepare(backend, branch, settings)
    return Setup(backend, branch, policy, settings, prompt, negative, args)


@contextlib.contextmanager
def embedded_each_step(setup: Setup) -> Iterator[None]:
    """Embed the control image in each step."""
    with replaced(setup.backend, "_embedded_once", lambda branch, tiled: nullcontext()):
        yield


def decoded_whole(setup: Setup) -> AbstractContextManager[Any]:
    """Decode the whole batch at once."""
    return replaced(parts, "DECODED_PIXELS", 2**62)


def decoded_singly(setup: Setup) -> AbstractContextManager[Any]:
    """Decode one image at a time."""
    return replaced(parts, "DECODED_PIXELS", 1)


@contextlib.contextmanager
def eight_bit(setup: Setup) -> Iterator[None]:
    """Hold the backbone's weights in 8 bit, and cast each layer's when it is computed: diffusers' own way."""
    backbone: Any = setup.backend.backbone
    if not getattr(backbone, "_cast", False):
        backbone.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=setup.backend.dtype)
        backbone._cast = True
    yield


def levers(args: argparse.Namespace) -> dict[str, tuple[Way, Way]]:
    """Return (the way without, the way with) by the lever's name."""
    lower = "bfloat16"
    found = {
        "batch": (Way(batch=1), Way()),
        "channels_last": (Way(), Way(speed={"channels_last": True})),
        "fuse_qkv": (Way(), Way(speed={"fuse_qkv": True})),
        "attention: fused": (Way(speed={"attention": "math"}), Way()),
        "control embedded once": (Way(around=embedded_each_step), Way()),
        "decode whole": (Way(around=decoded_singly), Way(around=decoded_whole)),
        "decode in pieces": (Way(around=decoded_whole), Way()),
        "vae bfloat16": (Way(), Way(sampling={"vae_dtype": lower})),
        "compile": (Way(), Way(speed={"compile": True, "compile_cache": args.compile_cache})),
    }
    if args.device == "cpu":
        found["networks bfloat16"] = (Way(), Way(sampling={"dtype": lower}))
        found["networks float16"] = (Way(), Way(sampling={"dtype": "float16"}))
    else:
        found |= {f"attention: {name}": (Way(), Way(speed={"attention": name})) for name in ("flash", "cudnn")}
        found["cudnn_benchmark"] = (Way(), Way(speed={"cudnn_benchmark": True}))
    if args.model in FLOW:
        del found["control embedded once"]
        found["weights float8"] = (Way(), Way(around=eight_bit))
        tokens = {n: Way(sampling={"text_tokens": n}) for n in (512, 256, 128)}
        found |= {f"text tokens {n}": (tokens[512], tokens[n]) for n in (256, 128)}
    return found


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Return seconds and result."""
    start = clock()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, found


def turns(
    ways: list[Callable[[], Any]], args: argparse.Namespace, *, clock: Callable[[], float] | None = None
) -> tuple[list[float], float, list[Any]]:
    """Return the median seconds of both ways, the median of their ratio in a turn, and what they gave last.

    On a CPU seconds are of this process, which other work on the machine disturbs less, unless a clock is given.
    """
    clock = clock or (time.process_time if args.device == "cpu" else time.perf_counter)
    for way in ways:
        way()
    rows = [[timed(way, clock) for way in ways] for _ in range(args.repeats)]
    seconds = [statistics.median(row[at][0] for row in rows) for at in (0, 1)]
    return seconds, statistics.median(row[0][0] / row[1][0] for row in rows), [result for _, result in rows[-1]]


def line(name: str, seconds: list[float], ratio: float, results: list[torch.Tensor]) -> str:
    """Return a row of the table."""
    difference = results[0].double() - results[1].double()
    noise = float(difference.square().mean())
    psnr = "same bits" if not noise else f"{-10 * math.log10(noise):.1f} dB"
    return f"{name:24}{seconds[0]:>10.3f}{seconds[1]:>10.3f}{ratio:>8.2f}{float(difference.abs().max()):>11.1e}  {psnr}"


def compare(args: argparse.Namespace, without: Way, with_it: Way) -> tuple[list[float], float, list[Any]]:
    """Sample both ways in turns."""
    made = [(load(args, way), way) for way in (without, with_it)]

    def run(setup: Setup, way: Way) -> torch.Tensor:
        with way.around(setup):
            return setup.images(way.batch)

    return turns([partial(run, setup, way) for setup, way in made], args)


def encoding(args: argparse.Namespace) -> tuple[list[float], float, list[Any]]:
    """Sample four batches that are encoded and kept: after each, or in a thread beside the next."""
    setup = load(args, Way(speed={"channels_last": True}))
    batches: list[rollout.Batch] = [[("image", number)] for number in range(4)]

    def restore(batch: rollout.Batch) -> torch.Tensor:
        return setup.images(0)

    def encode(batch: rollout.Batch, images: torch.Tensor) -> list[Any]:
        return [(f"{batch[0][1]}-{n}", {"png": shards.encode_image(image)}) for n, image in enumerate(images)]

    def sequential() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            kept = resume.Parts(Path(folder) / "out", "mark")
            for number, batch in enumerate(batches):
                kept.put(str(number), rollout.pack(encode(batch, restore(batch))))
            return total([sample for name in kept.names() for sample in rollout.unpack(kept.get(name) or b"")])

    def overlapped() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return total(list(rollout.resumed(restore, encode, batches, resume.Parts(Path(folder) / "out", "mark"))))

    def total(samples: list[Any]) -> torch.Tensor:
        return torch.stack([shards.decode_image(fields["png"]) for _, fields in samples])

    return turns([sequential, overlapped], args, clock=time.perf_counter)


def training(args: argparse.Namespace) -> tuple[list[float], float, list[Any]]:
    """Errors and gradients of one group, without and with what policy and reference share."""
    setup = load(args, Way(speed={"channels_last": True}))
    backend, accelerator = setup.backend, Accelerator(cpu=args.device == "cpu")
    policy = setup.branch.float()
    policy.requires_grad_(True)
    generator, count, device = torch.Generator().manual_seed(3), args.images, backend.device
    latents = backend.encode_images(torch.rand(count, 3, args.size, args.size, generator=generator).to(device))
    control = backend.prepare_control(torch.rand(1, 3, args.size, args.size, generator=generator))
    half = torch.arange(count // 2, device=device)
    batch = Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator).to(device),
        timesteps=backend.draw_timesteps(1, generator).expand(count),
        control=control.expand(count, *control.shape[1:]),
        embeddings={name: tensor[:1].expand(count, *tensor.shape[1:]) for name, tensor in setup.prompt.items()},
        chosen=half,
        rejected=half + count // 2,
        weights=torch.ones(count // 2, device=device),
    )

    def step(context: Callable[[], AbstractContextManager[Any]]) -> torch.Tensor:
        policy.zero_grad()
        with context():
            with torch.no_grad():
                reference = branch_errors(accelerator, backend, policy, batch)
            errors = branch_errors(accelerator, backend, policy, batch)
        pairs = {"chosen": batch.chosen, "rejected": batch.rejected, "weights": batch.weights}
        group_pairs(errors, reference, beta=50.0, **pairs)[0].backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).cpu()

    return turns([lambda: step(nullcontext), lambda: step(backend.shared)], args)


def operations(work: Callable[[], Any]) -> float:
    """Return counted floating-point operations in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def count() -> None:
    """Print the operations of the published architectures at 512 px, of one image."""
    for name in random_model.OVERLAYS:
        policy = random_model.settings(name).policy("base")
        found: Any = footprint.load(policy, architecture=name)
        branch = torch.nn.Module.to(found.branch, dtype=found.dtype).requires_grad_(False)
        with torch.no_grad():
            rows = {**networks(found, branch), **particular(found, branch)}
        print(f"{name}, 10^12 operations of an image of 512 px")
        for what, number in rows.items():
            print(f"    {what:40}{number:10.3f}")


def networks(found: Any, branch: Any) -> dict[str, float]:
    """Return the operations of each network."""
    settings, inputs = found.policy.sampling, found.inputs(1, 512, found.dtype)
    latents = torch.empty((1, *found.latent_shape(512)), dtype=found.vae_dtype, device="meta")
    pixels = torch.empty((1, 3, 512, 512), dtype=found.vae_dtype, device="meta")
    whole = operations(lambda: found.backend.predict(branch, *inputs))
    rows = {
        "a prediction": whole,
        "of it the branch": whole - operations(lambda: backbone_alone(found, inputs)),
        "a candidate": settings.steps * found.evaluations * whole,
        "decoding": operations(lambda: found.vae.decode(latents)),
        "encoding": operations(lambda: found.vae.encode(pixels)),
    }
    for text in found.texts:
        tokens = settings.text_tokens if "T5" in type(text).__name__ else 77
        ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
        rows[f"a prompt, {type(text).__name__}"] = operations(partial(text, ids))
    return rows


def particular(found: Any, branch: Any) -> dict[str, float]:
    """Return the operations that a lever of this backend leaves out."""
    noisy, timesteps, control, embeddings = found.inputs(1, 512, found.dtype)
    if hasattr(found.backend, "unet"):
        return {
            "embedding of the control image": operations(lambda: branch.controlnet_cond_embedding(control)),
            "an image of a training step": operations(lambda: both_branches(found, branch, nullcontext)),
            "the same, sharing": operations(lambda: both_branches(found, branch, found.backend.shared)),
        }
    rows = {}
    for tokens in (256, 128):
        shorter = embeddings | {"prompt_embeds": embeddings["prompt_embeds"][:, :tokens]}
        predict = partial(found.backend.predict, branch, noisy, timesteps, control, shorter)
        rows[f"a prediction, {tokens} text tokens"] = operations(predict)
    return rows


def backbone_alone(found: Any, inputs: Any) -> Any:
    """Predict without a control branch."""
    noisy, timesteps, _, embeddings = inputs
    backend = found.backend
    if hasattr(backend, "unet"):
        return backend.unet(noisy, timesteps, embeddings["prompt_embeds"], return_dict=False)
    tokens, ids = backend._tokens(noisy, embeddings)
    return backend._velocity(tokens, timesteps, embeddings, ids, {})


def both_branches(found: Any, branch: Any, shared: Callable[[], AbstractContextManager[Any]]) -> None:
    """Pass an image forward under the reference, forward and backward under the policy."""
    policy, backbone = branch.float().requires_grad_(True), found.backbone.float()
    found.backend.dtype = torch.float32  # operations do not depend on it
    inputs = found.inputs(1, 512, torch.float32)
    with shared():
        found.backend.predict(policy, *inputs)
        with torch.enable_grad():
            found.backend.predict(policy, *inputs).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())


def main() -> None:
    """Measure the levers, or count operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*EMBEDDED, *random_model.OVERLAYS], default="sd")
    parser.add_argument("--levers", nargs="+", metavar="NAME", help="some of them; all unless given")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=1, help="divides the widths of a published architecture")
    parser.add_argument("--images", type=int, default=8, help="candidates in a batch")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--steps", type=int, help="of sampling; the policy's unless given")
    parser.add_argument("--guidance", type=float, help="the policy's unless given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile-cache", default="", help="folder; empty: torch's own")
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    if args.count:
        count()
        return
    stage.device(args.device)
    measured: dict[str, Callable[[], Any]] = {
        name: partial(compare, args, *pair) for name, pair in levers(args).items()
    }
    measured |= {"encoding in a thread": lambda: encoding(args), "training: shared": lambda: training(args)}
    if unknown := set(args.levers or []) - set(measured):
        parser.error(f"--levers: found {sorted(unknown)[0]!r}, wanted some of {', '.join(measured)}")
    print(f"{args.model}, {args.images} images of {args.size} px, {args.device}, torch {torch.__version__}")
    print(f"{'lever':24}{'without':>10}{'with, s':>10}{'ratio':>8}{'max diff':>11}  PSNR")
    for name in args.levers or measured:
        print(line(name, *measured[name]()), flush=True)


if __name__ == "__main__":
    main()
