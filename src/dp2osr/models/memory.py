"""GPU memory of each stage, of a model on `meta`: weights by their dtype, and working memory counted by the ledger.

Not in it: the CUDA context and libraries' workspaces (about 1 GiB), and what the allocator cannot use (often 5 to
15 %). The networks of metrics and RAM's are in judging.py.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dp2osr.config import TrainSettings
from dp2osr.models.footprint import META, Footprint, parameters
from dp2osr.models.ledger import backward_bytes, forward_bytes, recomputing, weights
from dp2osr.models.parts import decoded_at_once
from dp2osr.models.sharding import blocks

LOWER = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAM_BYTES = {
    "adamw": 2 * 4.0,
    "adamw8bit": 2 * (1 + 4 / 256),
}  # two moments a parameter; 8 bit: a scale for 256
GATHERED = 3  # blocks of a sharded backbone at a time: in use, in the making, and the buffer that was sent
PROMPTS = 32  # in one pass of the text encoders, as the embed stage has it


@dataclass(frozen=True)
class Need:
    """Bytes that a stage holds throughout (`lasting`), or that come and go: of those the largest counts."""

    what: str
    bytes: int
    lasting: bool = True


def total(needs: Sequence[Need]) -> int:
    """Return the most bytes at a time."""
    passing = [need.bytes for need in needs if not need.lasting]
    return sum(need.bytes for need in needs if need.lasting) + max(passing, default=0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(what: str, modules: Sequence[nn.Module], dtype: torch.dtype) -> Need:
    return Need(f"{what}, {_name(dtype)}", sum(map(parameters, modules)) * dtype.itemsize)


def embed(found: Footprint) -> list[Need]:
    """Text encoders, and the activations of one batch of prompts."""
    work = sum(_text_bytes(text, found.embeddings["prompt_embeds"][0]) for text in found.texts)
    return [
        _weights("text encoders", found.texts, found.dtype),
        Need(f"{PROMPTS} prompts in a batch", work, lasting=False),
    ]


def _text_bytes(text: Any, tokens: int) -> int:
    length = min(tokens, getattr(text.config, "max_position_embeddings", tokens))
    ids = torch.zeros((PROMPTS, length), dtype=torch.int64, device=META)
    return forward_bytes(lambda: text(ids)[0], known=weights(text))


def rollout(found: Footprint, *, images: int, size: int) -> list[Need]:
    """Frozen networks, and the larger of one step of sampling and of decoding, which is done in pieces."""
    return [
        _weights("backbone", [found.backbone], found.dtype),
        _weights("control branch", [found.branch], found.dtype),
        _weights("VAE", [found.vae], found.vae_dtype),
        *_sampling(found, images, size),
    ]


def _sampling(found: Footprint, images: int, size: int) -> list[Need]:
    branch = nn.Module.to(copy.deepcopy(found.branch), dtype=found.dtype).requires_grad_(False)
    count = images * found.evaluations
    known = weights(branch, found.backbone, found.vae)
    step = forward_bytes(lambda: found.backend.predict(branch, *found.inputs(count, size, found.dtype)), known=known)
    decoded = min(images, decoded_at_once(size * size))
    latents = torch.empty((decoded, *found.latent_shape(size)), dtype=found.vae_dtype, device=META)
    decode = forward_bytes(lambda: found.vae.decode(latents).sample.float().div(2).add(0.5).clamp(0, 1), known=known)
    return [
        Need(f"a step of sampling, {images} images{' and guidance' if count > images else ''}", step, lasting=False),
        Need(f"decoding, {decoded} images at once", decode, lasting=False),
    ]


def encode(found: Footprint, *, images: int, size: int) -> list[Need]:
    """The VAE, and the encoding of `images` candidates."""
    pixels = torch.empty((images, 3, size, size), device=META)
    work = forward_bytes(
        lambda: found.vae.encode((pixels * 2 - 1).to(found.vae_dtype)).latent_dist.mode().float(),
        known=weights(found.vae),
    )
    return [_weights("VAE", [found.vae], found.vae_dtype), Need(f"encoding, {images} images", work, lasting=False)]


def graph_images(settings: TrainSettings, *, top: int) -> int:
    """Return how many images one backward pass holds: micro_batch, or fewer where a step has no more."""
    unit, units = (2 * top, settings.groups_per_step) if settings.batching == "groups" else (2, settings.pairs_per_step)
    if unit >= settings.micro_batch:
        return settings.micro_batch
    return min(settings.micro_batch // unit, -(-units // settings.accumulation)) * unit


def train(found: Footprint, settings: TrainSettings, *, top: int, size: int, processes: int = 1) -> list[Need]:
    """Policy and reference in float32, optimizer, moving average, backbone; then what comes and goes in a step.

    Gradients count throughout: with several micro batches a step they are there from the first on. processes: of the
    training, which share the backbone out where train.sharding says so.
    """
    count = parameters(found.branch)
    images = graph_images(settings, top=top)
    needs = [
        *_backbone(found, processes if settings.sharding == "backbone" else 1),
        _weights("policy", [found.branch], torch.float32),
        _weights("reference", [found.branch], torch.float32),
        Need("gradients, float32", 4 * count),
        Need(settings.optimizer, int(ADAM_BYTES[settings.optimizer] * count)),
    ]
    if settings.ema_decay:
        needs.append(_weights("moving average", [found.branch], torch.float32))
    kept, most = step_bytes(found, settings, images=images, size=size)
    how = ", recomputed in backward" if settings.gradient_checkpointing else ""
    needs.append(Need(f"forward and backward, {images} images ({kept / 2**30:.1f} GiB kept{how})", most, lasting=False))
    if settings.optimizer == "adamw":
        needs.append(Need("the optimizer's step", 4 * count, lasting=False))
    return needs + _guard(found, settings, size=size, freed=4 * count)


def _backbone(found: Footprint, shares: int) -> list[Need]:
    """The backbone; shared out, its share, and what is gathered: blocks, and all that lies in none of them."""
    whole = _weights("backbone", [found.backbone], found.dtype)
    if shares == 1:
        return [whole]
    sizes = [parameters(block) for block in blocks(found.backbone)]
    gathered = GATHERED * max(sizes) + parameters(found.backbone) - sum(sizes)
    return [
        Need(f"{whole.what}, a share of {shares}", math.ceil(whole.bytes / shares)),
        Need("blocks of it, gathered", gathered * found.dtype.itemsize),
    ]


def step_bytes(found: Footprint, settings: TrainSettings, *, images: int, size: int) -> tuple[int, int]:
    """Return (bytes kept for backward, most bytes) of one pass of `images` images under the policy."""
    policy: Any = copy.deepcopy(found.branch).float().requires_grad_(True).train()
    for parameter in policy.parameters():
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    lower = LOWER[settings.precision]
    if settings.gradient_checkpointing:
        found.backend.checkpoint_gradients(policy)
        for module in (found.backbone, policy):
            if module.is_gradient_checkpointing:
                module.enable_gradient_checkpointing(recomputing(lower))
    try:
        return backward_bytes(
            lambda: found.backend.predict(policy, *found.inputs(images, size, torch.float32)),
            known=[*weights(policy, found.backbone), *gradients],
            lower=lower,
        )
    finally:
        if settings.gradient_checkpointing:
            found.backbone.disable_gradient_checkpointing()


def _guard(found: Footprint, settings: TrainSettings, *, size: int, freed: int) -> list[Need]:
    """The VAE, and a validation: copies of the policy, and sampling; the gradients (`freed`) are gone by then."""
    if not settings.guard.every:
        return []
    images = max(settings.micro_batch // settings.guard.num_rollouts, 1) * settings.guard.num_rollouts
    copied = found.dtype.itemsize if found.dtype != torch.float32 else 0  # sampled in the dtype of rollouts
    copies = parameters(found.branch) * (copied + (4 if settings.ema_decay else 0))
    work = max(need.bytes for need in _sampling(found, images, size))
    return [
        _weights("VAE, for the guard", [found.vae], found.vae_dtype),
        Need(f"the guard's sampling, {images} images", max(copies + work - freed, 0), lasting=False),
    ]
