"""Batched rollouts against diffusers' own pipeline, one image and one seed at a time: same images, what speed-up?

Both ways use the same weights, prompt, noise, scheduler and colour fix. Prints seconds, the largest difference of a
pixel in [0, 1], and the ratio; fails where the images differ by more than the tolerance.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from dp2osr import colour, config, images, sampling, seeds, stage
from dp2osr.errors import UserError
from dp2osr.models.backend import load_backend, resolve, stack

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ("skimage/astronaut", "skimage/chelsea", "skimage/coffee", "skimage/rocket")


def find_model(name: str, folder: Path) -> str:
    """Return the model's folder; where the embedded one is absent, a random one of a few thousand weights."""
    try:
        return str(resolve(name))
    except UserError:
        spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "tiny.py")
        assert spec is not None and spec.loader is not None
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        print(f"{name} not found: a random tiny model takes its place")
        return str(tiny.build(folder / "model"))


def load_lr(count: int, size: int) -> torch.Tensor:
    """Return LR images (count, 3, size/4, size/4): averaged crops of photographs."""
    found = []
    for index in range(count):
        data = images.load_builtin(PHOTOS[index % len(PHOTOS)])
        pixels = torch.from_numpy(images.decode(data, max_pixels=10**8)).permute(2, 0, 1).float().div(255)
        top = 16 * (index // len(PHOTOS))
        found.append(torch.nn.functional.avg_pool2d(pixels[:, top : top + size, 100 : 100 + size], 4))
    return torch.stack(found)


def batched(backend: Any, branch: Any, lr: torch.Tensor, numbers: Sequence[Sequence[int]], args: Any) -> torch.Tensor:
    """Return all candidates, group after group, sampled in batches."""
    prompt = {name: tensor[0] for name, tensor in backend.embed_prompts([""]).items()}
    negative = {name: tensor[0] for name, tensor in backend.embed_prompts([args.sampling.negative_prompt]).items()}
    flat = [(index, seed) for index, group in enumerate(numbers) for seed in group]
    found = []
    for start in range(0, len(flat), args.batch_size):
        batch = flat[start : start + args.batch_size]
        restored = sampling.restore(
            backend,
            branch,
            lr[[index for index, _ in batch]],
            scale=4,
            embeddings=stack([prompt] * len(batch), backend.device),
            negative=stack([negative] * len(batch), backend.device),
            seeds=[seed for _, seed in batch],
            sampling=args.sampling,
        )
        found.append(restored)
    return torch.cat(found).cpu()


def one_by_one(
    backend: Any, branch: Any, lr: torch.Tensor, numbers: Sequence[Sequence[int]], args: Any
) -> torch.Tensor:
    """Return the same candidates from StableDiffusionControlNetPipeline."""
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae=backend.autoencoder.vae,
        text_encoder=backend.text_encoder,
        tokenizer=backend.tokenizer,
        unet=backend.unet,
        controlnet=branch,
        scheduler=backend.make_scheduler(args.sampling.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    cells = args.size // backend.latent_factor
    found = []
    for image, group in zip(lr, numbers, strict=True):
        upsampled = sampling.images_control(image[None], 4)
        for seed in group:
            noise = torch.randn(
                (1, backend.unet.config.in_channels, cells, cells), generator=torch.Generator().manual_seed(seed)
            )
            restored = pipeline(
                prompt="",
                negative_prompt=args.sampling.negative_prompt,
                image=upsampled,
                height=args.size,
                width=args.size,
                num_inference_steps=args.sampling.steps,
                guidance_scale=args.sampling.guidance,
                latents=noise.to(backend.device),
                output_type="pt",
            ).images
            found.append(colour.fix(restored.float(), upsampled, args.sampling.colour_fix))
    return torch.cat(found).cpu()


def main() -> None:
    """Time both ways and compare their images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-sd")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="HR pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(args.model, Path(folder))
        policy = config.read(ROOT / "config" / "config.yaml").policies["base"]
        args.sampling = policy.sampling.model_copy(update={"guidance": args.guidance})
        policy = policy.model_copy(update={"model": model, "sampling": args.sampling})
        backend: Any = load_backend(policy, device=stage.device(args.device))
        branch = backend.load_control(f"{model}/controlnet")
    lr = load_lr(args.images, args.size).to(backend.device)
    numbers = [[seeds.candidate(0, f"image-{image}", m) for m in range(args.seeds)] for image in range(args.images)]
    results, seconds = [], []
    for way in (batched, one_by_one):
        way(backend, branch, lr[:1], numbers[:1], args)  # warm up
        start = time.perf_counter()
        results.append(way(backend, branch, lr, numbers, args))
        seconds.append(time.perf_counter() - start)
    difference = float((results[0] - results[1]).abs().max())
    count = args.images * args.seeds
    for name, spent in zip(("batched", "one by one, diffusers' pipeline"), seconds, strict=True):
        print(f"{name}: {count} candidates in {spent:.2f} s, {count / spent:.2f}/s")
    print(f"largest difference {difference:.2e} (tolerance {args.tolerance:.0e}); ratio {seconds[1] / seconds[0]:.2f}")
    sys.exit(difference > args.tolerance)


if __name__ == "__main__":
    main()
