"""Each stage in our way and in the plain way, as functions to be timed (fullsize.py) or counted (counting.py).

Our way is the pipeline's own code (`sampling.restore`, `training.step.Gradient`, `Scorer`). The plain ways are
diffusers' pipelines for one image and one seed, under autocast as in the authors' script; the VAE for one image;
pyiqa's metrics for one image; a Diffusion-DPO step that holds two whole models and takes every pair by itself.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import random_model
import scoring
import torch
from torch import nn

from dp2osr import colour, config, sampling
from dp2osr.config_rollout import SpeedSettings
from dp2osr.iqa import niqe, pretrained
from dp2osr.iqa.metric import Scorer
from dp2osr.models import speed
from dp2osr.models.backend import Backend, Embeddings
from dp2osr.training.batches import Schedule
from dp2osr.training.loop import make_optimizer
from dp2osr.training.loss import dpo_loss
from dp2osr.training.step import Batch, Feed, Gradient, branch_errors, part

SCALE = 4
SCORED_GROUPS = 2  # a call ends with another HR image than it begins with, so nothing is kept from call to call
Work = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """Models and sizes. plain_dtype: of diffusers' networks and their autocast; accelerator: for training.

    speed: the switches of our rollouts.
    """

    backend: Backend
    policy: config.PolicySettings
    train: config.TrainSettings
    size: int
    batch: int
    top: int
    plain_dtype: torch.dtype
    accelerator: Any
    speed: SpeedSettings

    @property
    def device(self) -> torch.device:
        """Where all runs."""
        return self.backend.device

    def branch(self, dtype: torch.dtype) -> Any:
        """Return a control branch of ours."""
        return random_model.control_branch(self.backend, dtype)

    def embeddings(self, count: int) -> Embeddings:
        """Return random text embeddings."""
        return random_model.embeddings(self.backend, self.policy, count)


@dataclass(frozen=True)
class Contest:
    """A stage in both ways, ours first: what makes each, and how many units a call of it is worth."""

    stage: str
    unit: str
    make: tuple[Callable[[], Work], Callable[[], Work]]
    units: tuple[int, int]


def rollout(setup: Setup) -> Iterator[Contest]:
    """Candidates of one image: a batch of seeds beside diffusers' pipeline."""
    lr = torch.rand(1, 3, setup.size // SCALE, setup.size // SCALE, device=setup.device)

    def ours() -> Work:
        branch = setup.branch(setup.backend.dtype).requires_grad_(False)
        prompt, negative = (setup.embeddings(setup.batch) for _ in range(2))
        speed.prepare(setup.backend, branch, setup.speed)

        def restore() -> torch.Tensor:
            with speed.attention(setup.speed):
                return sampling.restore(
                    setup.backend,
                    branch,
                    lr.expand(setup.batch, -1, -1, -1),
                    scale=SCALE,
                    embeddings=prompt,
                    negative=negative,
                    seeds=range(setup.batch),
                    sampling=setup.policy.sampling,
                )

        return restore

    yield Contest("rollout", "image", (ours, lambda: _pipeline(setup, lr)), (setup.batch, 1))


def _pipeline(setup: Setup, lr: torch.Tensor) -> Work:
    """Return diffusers' own pipeline for one image; its networks are of `plain_dtype`, the VAE is the policy's.

    It is given text embeddings, and its image the colour fix, as ours.
    """
    backend: Any = setup.backend
    dtype = setup.plain_dtype
    networks = {backend.backbone_folder: random_model.plain_backbone(backend, dtype), "vae": backend.autoencoder.vae}
    networks["controlnet"] = random_model.plain_branch(backend, dtype)
    found, call = _diffusion(setup, networks) if backend.backbone_folder == "unet" else _flow(setup, networks)
    found.set_progress_bar_config(disable=True)
    sampler = setup.policy.sampling
    call |= {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance, "output_type": "pt"}
    call |= {"height": setup.size, "width": setup.size}

    def restore() -> torch.Tensor:
        control = sampling.images_control(lr, SCALE)
        image = "image" if backend.backbone_folder == "unet" else "control_image"
        with torch.autocast(setup.device.type, dtype, enabled=dtype != torch.float32):
            images = found(**{image: control}, **call).images
        return colour.fix(images.float(), control, sampler.colour_fix)

    return restore


def _diffusion(setup: Setup, networks: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion's pipeline and what it takes of text."""
    backend: Any = setup.backend
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    found = diffusers.StableDiffusionControlNetPipeline(
        **networks,
        **dict.fromkeys(absent),
        scheduler=backend.make_scheduler(setup.policy.sampling.scheduler),
        requires_safety_checker=False,
    )
    prompt, negative = (setup.embeddings(1)["prompt_embeds"].to(setup.plain_dtype) for _ in range(2))
    return found, {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _flow(setup: Setup, networks: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return FLUX's pipeline and what it takes of text."""
    backend: Any = setup.backend
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(backend.scheduler_config)
    found = diffusers.FluxControlNetPipeline(**networks, **dict.fromkeys(absent), scheduler=scheduler)
    prompt = {name: tensor.to(setup.plain_dtype) for name, tensor in setup.embeddings(1).items()}
    return found, {"prompt_embeds": prompt["prompt_embeds"], "pooled_prompt_embeds": prompt["pooled"]}


def decode(setup: Setup) -> Iterator[Contest]:
    """Latents to images."""
    latents = torch.randn(setup.batch, *random_model.latent_shape(setup.backend, setup.size), device=setup.device)
    yield _autoencoder(setup, "decode", setup.backend.decode_latents, latents)


def encode(setup: Setup) -> Iterator[Contest]:
    """Candidates to latents."""
    images = torch.rand(setup.batch, 3, setup.size, setup.size, device=setup.device)
    yield _autoencoder(setup, "encode", setup.backend.encode_images, images)


def _autoencoder(setup: Setup, stage: str, work: Callable[..., Any], batch: torch.Tensor) -> Contest:
    def ours() -> Work:
        return lambda: work(batch)

    def plain() -> Work:
        return lambda: [work(one) for one in batch.split(1)]

    return Contest(stage, "image", (ours, plain), (setup.batch, setup.batch))


def score(setup: Setup) -> Iterator[Contest]:
    """What pyiqa's metrics cost that need no download: those without weights, and trained ones with random weights."""
    crops = torch.stack([_photo(name, setup.size) for name in scoring.PHOTOS[:SCORED_GROUPS]])
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([scoring.degrade(hr, setup.batch, generator) for hr in crops])
    hr = crops.repeat_interleave(setup.batch, dim=0)
    for stage, names in (("score, no weights", scoring.DEFAULT), ("score, trained", scoring.TRAINED)):

        def ours(names: Sequence[str] = names) -> Work:
            judge = _judge(setup, names, crops)
            return lambda: judge.score(images, hr)

        def plain(names: Sequence[str] = names) -> Work:
            models = _judge(setup, names, crops)._models
            return lambda: [scoring.plain(name, models[name], images, hr, setup.device) for name in names]

        yield Contest(stage, "image", (ours, plain), (len(images), len(images)))


def _photo(name: str, size: int) -> torch.Tensor:
    """Return a photograph (3, size, size) in [0, 1], enlarged where it is smaller."""
    image = scoring.crop(name, min(size, 384))
    if size <= 384:
        return image
    return nn.functional.interpolate(image[None], size=(size, size), mode="bicubic").clamp(0, 1)[0]


def _judge(setup: Setup, names: Sequence[str], crops: torch.Tensor) -> Scorer:
    """Return a Scorer whose trained metrics have random weights; NIQE is fitted on `crops`."""
    made, block = scoring.random_weights(), scoring.NIQE_BLOCK

    def create(name: str, device: torch.device, **_: Any) -> Any:
        return made.create(name, device)

    with tempfile.TemporaryDirectory() as folder, pretrained.replaced(pretrained, "create", create):
        path = Path(folder) / "niqe.mat"
        niqe.save(path, *niqe.fit(crops, block_size=block, sharpness=0.0), block_size=block)
        return Scorer(names, device=setup.device, niqe=path, niqe_block=block, batch_size=setup.batch)


def train(setup: Setup) -> Iterator[Contest]:
    """A DPO step of one group, and of as many images as pairs of many groups, beside the textbook's of these pairs."""
    for batching in ("groups", "pairs"):
        settings = step_settings(setup, batching)

        def ours(settings: config.TrainSettings = settings) -> Work:
            return our_step(setup, settings)

        def plain() -> Work:
            return textbook(setup, step_settings(setup, "pairs"))

        pairs = setup.top**2 if batching == "groups" else setup.top
        yield Contest(f"DPO, {batching}", "pair", (ours, plain), (pairs, setup.top))


def step_settings(setup: Setup, batching: str) -> config.TrainSettings:
    """Return settings of a step of 2N images: a group of N² pairs, or N pairs."""
    changes = {"batching": batching, "groups_per_step": 1, "pairs_per_step": setup.top, "accumulation": 1}
    return setup.train.model_copy(update=changes)


def feed_and_schedule(setup: Setup, settings: config.TrainSettings) -> tuple[Feed, Schedule]:
    """Return random training data: one group's N² pairs, or N pairs of as many groups."""
    top = setup.top
    rows: list[tuple[str, int, int, float]] = [(str(group), 0, 1, 1.0) for group in range(top)]
    if settings.batching == "groups":
        rows = [("0", w, top + loser, 1.0) for w in range(top) for loser in range(top)]
    pairs = pd.DataFrame(rows, columns=["group_id", "chosen", "rejected", "weight"])
    pack: Any = random_model.RandomPack(setup.backend, setup.size)
    prompt = {name: tensor[0] for name, tensor in setup.embeddings(1).items()}
    embeddings = dict.fromkeys(map(str, range(top)), prompt)
    feed = Feed(pack=pack, embeddings=embeddings, backend=setup.backend, timestep_density="uniform")
    return feed, Schedule(pairs, settings=settings, seed=0)


def our_step(setup: Setup, settings: config.TrainSettings) -> Work:
    """Return an optimizer step as the pipeline makes it."""
    feed, schedule = feed_and_schedule(setup, settings)
    policy, reference = (setup.branch(torch.float32) for _ in range(2))
    policy.requires_grad_(True).train()
    if settings.gradient_checkpointing:
        setup.backend.checkpoint_gradients(policy)
    optimizer = make_optimizer(policy, settings)
    gradient = Gradient(setup.accelerator, feed, policy, reference.requires_grad_(False), settings)

    def step() -> None:
        gradient.step(schedule.step(1))
        optimizer.step()
        optimizer.zero_grad()

    return step


def textbook(setup: Setup, settings: config.TrainSettings) -> Work:
    """Return a Diffusion-DPO step of two whole models: each pair by itself, 2N images, policy and reference apart."""
    feed, schedule = feed_and_schedule(setup, settings)
    backend: Any = copy.copy(setup.backend)
    backend.backbone = copy.deepcopy(setup.backend.backbone)
    setattr(backend, backend.backbone_folder, backend.backbone)
    policy, reference = (random_model.plain_branch(setup.backend, torch.float32) for _ in range(2))
    policy.requires_grad_(True).train()
    reference.requires_grad_(False)
    if settings.gradient_checkpointing:
        backend.checkpoint_gradients(policy)
    optimizer = make_optimizer(policy, settings)

    def step() -> None:
        batch = feed.batch(schedule.step(1))
        for span in batch.slices(settings.micro_batch):
            _textbook_backward(setup, (backend, policy), reference, part(batch, span), settings.beta)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _textbook_backward(
    setup: Setup, policy: tuple[Backend, nn.Module], reference: nn.Module, batch: Batch, beta: float
) -> None:
    """Add the gradient of pairs whose winner and loser alternate in `batch`; policy: its backbone's backend, branch."""
    with torch.no_grad():
        base = branch_errors(setup.accelerator, setup.backend, reference, batch)
    errors = branch_errors(setup.accelerator, *policy, batch)
    weights = torch.ones(len(errors) // 2, device=errors.device)
    loss, _ = dpo_loss(errors[::2], base[::2], errors[1::2], base[1::2], beta=beta, weights=weights)
    setup.accelerator.backward(loss)


STAGES: dict[str, Callable[[Setup], Iterator[Contest]]] = {
    "rollout": rollout,
    "decode": decode,
    "encode": encode,
    "score": score,
    "train": train,
}
