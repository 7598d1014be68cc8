"""Our samplers beside diffusers' own pipelines, our DPO loss beside the formula with diffusers' forward passes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from dp2osr.config import PolicySettings
from dp2osr.models.backend import Backend, load_backend
from dp2osr.training.loss import group_pairs
from dp2osr.training.step import Batch, branch_errors
from parity_rig import (
    FLUX_SAMPLERS,
    NEGATIVE,
    PROMPTS,
    SD_SAMPLERS,
    SEEDS,
    SIZE,
    controls,
    policy,
    theirs_flux,
    theirs_sd,
)

CPU = torch.device("cpu")


def ours(settings: PolicySettings, rows: Sequence[int]) -> torch.Tensor:
    """Return our images of some of the prompts, control images and seeds, in one batch."""
    backend = load_backend(settings, device=CPU)
    branch = backend.load_control(settings.control)
    prompt = backend.embed_prompts([PROMPTS[row] for row in rows])
    negative = backend.embed_prompts([settings.sampling.negative_prompt] * len(rows))
    control = backend.prepare_control(controls(len(SEEDS))[list(rows)])
    seeds = [SEEDS[row] for row in rows]
    latents = backend.sample(branch, control, prompt, negative, seeds, settings.sampling)
    return backend.decode_latents(latents)


def set_prediction(model: Path, kind: str, folder: Path) -> Path:
    """Return a copy of the model whose scheduler says `kind`."""
    (folder / "scheduler").mkdir(parents=True)
    for part in model.iterdir():
        if part.name != "scheduler" and part.is_dir():
            (folder / part.name).symlink_to(part)
    text = (model / "scheduler" / "scheduler_config.json").read_text()
    (folder / "scheduler" / "scheduler_config.json").write_text(text.replace("epsilon", kind))
    return folder


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SD_SAMPLERS)
def test_sd_equals_diffusers_batched_and_single(name: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    model = set_prediction(tiny_model, kind, tmp_path / "model")
    settings = policy(model, "sd", negative_prompt=NEGATIVE, **SD_SAMPLERS[name])
    batched = ours(settings, (0, 1, 2))
    assert batched.std() > 0.01
    for row in (0, 1, 2) if name == "ddpm" else (2,):
        wanted = theirs_sd(settings, row, model / "controlnet")
        assert (batched[row] - wanted[0]).abs().max() < 1e-4
        assert (ours(settings, (row,)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", FLUX_SAMPLERS)
def test_flux_equals_diffusers_batched_and_single(name: str, tiny_flux: Path) -> None:
    scheduler = "FlowMatchEulerDiscreteScheduler"
    settings = policy(tiny_flux, "flux", negative_prompt=NEGATIVE, scheduler=scheduler, **FLUX_SAMPLERS[name])
    batched = ours(settings, (0, 1, 2))
    assert batched.std() > 0.01 and (batched[0] - batched[2]).abs().max() > 0.01
    for row in (0, 1, 2):
        wanted = theirs_flux(settings, row, tiny_flux / "controlnet")
        assert (batched[row] - wanted[0]).abs().max() < 1e-4
        assert (ours(settings, (row,)) - wanted).abs().max() < 1e-4


def make_batch(backend: Backend) -> Batch:
    """Return two groups of two winners and two losers, one timestep and noise a group."""
    generator = torch.Generator().manual_seed(5)
    latents = backend.encode_images(torch.rand(8, 3, SIZE, SIZE, generator=generator))
    shared = torch.tensor([0] * 4 + [1] * 4)
    prompt = backend.embed_prompts(PROMPTS[:2])
    return Batch(
        latents=latents,
        noise=torch.randn((2, *latents.shape[1:]), generator=generator)[shared],
        timesteps=backend.draw_timesteps(2, generator)[shared],
        control=backend.prepare_control(controls(2))[shared],
        embeddings={name: tensor[shared] for name, tensor in prompt.items()},
        chosen=torch.tensor([0, 0, 1, 1, 4, 4, 5, 5]),
        rejected=torch.tensor([2, 3, 2, 3, 6, 7, 6, 7]),
        weights=torch.linspace(0.8, 1.3, 8),
    )


def plain_sd(model: Path, branch: Any) -> Callable[[Batch, int], torch.Tensor]:
    """Return e(branch, x) of one image of a batch, with diffusers' own modules one image at a time."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet").eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained(model / "scheduler")

    def error(batch: Batch, i: int) -> torch.Tensor:
        at = slice(i, i + 1)
        alpha = scheduler.alphas_cumprod[batch.timesteps[i]]
        noisy = alpha.sqrt() * batch.latents[at] + (1 - alpha).sqrt() * batch.noise[at]
        text = batch.embeddings["prompt_embeds"][at]
        found = branch(noisy, batch.timesteps[at], text, batch.control[at])
        extra = {
            "down_block_additional_residuals": found.down_block_res_samples,
            "mid_block_additional_residual": found.mid_block_res_sample,
        }
        predicted = unet(noisy, batch.timesteps[at], text, **extra).sample
        velocity = alpha.sqrt() * batch.noise[at] - (1 - alpha).sqrt() * batch.latents[at]
        target = velocity if scheduler.config.prediction_type == "v_prediction" else batch.noise[at]
        return (target - predicted).double().square().mean()

    return error


def plain_flux(model: Path, branch: Any, guidance: float) -> Callable[[Batch, int], torch.Tensor]:
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(model / "transformer").eval()
    pipeline = diffusers.FluxControlNetPipeline

    def error(batch: Batch, i: int) -> torch.Tensor:
        at, (_, channels, height, width) = slice(i, i + 1), batch.latents.shape
        t = batch.timesteps[i]
        noisy = (1 - t) * batch.latents[at] + t * batch.noise[at]
        tokens, control = (
            pipeline._pack_latents(tensor, 1, channels, height, width) for tensor in (noisy, batch.control[at])
        )
        conditions = {
            "hidden_states": tokens,
            "timestep": t[None],
            "guidance": torch.tensor([guidance]),
            "pooled_projections": batch.embeddings["pooled"][at],
            "encoder_hidden_states": batch.embeddings["prompt_embeds"][at],
            "txt_ids": torch.zeros(batch.embeddings["prompt_embeds"].shape[1], 3),
            "img_ids": pipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, torch.float32),
        }
        found = branch(controlnet_cond=control, **conditions)
        predicted = transformer(
            controlnet_block_samples=found.controlnet_block_samples,
            controlnet_single_block_samples=found.controlnet_single_block_samples,
            **conditions,
        ).sample
        target = pipeline._pack_latents(batch.noise[at] - batch.latents[at], 1, channels, height, width)
        return (target - predicted).double().square().mean()

    return error


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flux"])
def test_dpo_loss_and_gradients_equal_the_formula(kind: str, tiny_model: Path, tiny_flux: Path, tmp_path: Path) -> None:
    """L = mean over pairs of w · -log sigmoid(-β/2 [(e_θ,w - e_ref,w) - (e_θ,l - e_ref,l)]), one image at a time."""
    beta, flux = 50.0, kind == "flux"
    model = tiny_flux if flux else set_prediction(tiny_model, kind, tmp_path / "model")
    settings = policy(model, "flux" if flux else "sd", guidance=2.5, text_tokens=16)
    backend = load_backend(settings, device=CPU)
    batch, accelerator = make_batch(backend), Accelerator(cpu=True)
    reference = backend.load_control(settings.control)
    tuned = backend.load_control(settings.control)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    assert type(tuned) is (diffusers.FluxControlNetModel if flux else diffusers.ControlNetModel)
    make = {"flux": lambda branch: plain_flux(model, branch, 2.5)}.get(kind, lambda branch: plain_sd(model, branch))

    plain = {name: make(branch) for name, branch in (("policy", tuned), ("reference", reference))}
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected, weight in zip(batch.chosen, batch.rejected, batch.weights, strict=True):
        gain = [plain["policy"](batch, int(i)) - plain["reference"](batch, int(i)).detach() for i in (chosen, rejected)]
        total = total + weight * -functional.logsigmoid(-beta / 2 * (gain[0] - gain[1]))
    wanted = total / len(batch.chosen)
    slopes = torch.autograd.grad(wanted, list(tuned.parameters()), allow_unused=True)

    with torch.no_grad():
        errors_ref = branch_errors(accelerator, backend, reference, batch)
    errors = branch_errors(accelerator, backend, tuned, batch)
    pairs = {"chosen": batch.chosen, "rejected": batch.rejected, "weights": batch.weights}
    loss, _ = group_pairs(errors, errors_ref, beta=beta, **pairs)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert abs(loss.item() - 0.6931) > 1e-3
    found = [parameter.grad for parameter in tuned.parameters()]
    both = [(one, other) for one, other in zip(found, slopes, strict=True) if one is not None or other is not None]
    assert len(both) > 10 and not any(one is None or other is None for one, other in both)
    ours_, theirs = (torch.cat([tensor.flatten() for tensor in side]) for side in zip(*both, strict=True))
    assert (ours_ - theirs).norm() <= 1e-5 * theirs.norm()
    assert all(parameter.grad is None for parameter in backend.backbone.parameters())


@pytest.mark.parametrize("backend_name", ["sd", "flux"])
def test_policy_equal_to_reference_gives_log_two_for_every_pair(
    backend_name: str, tiny_model: Path, tiny_flux: Path
) -> None:
    settings = policy(tiny_flux if backend_name == "flux" else tiny_model, backend_name, text_tokens=16)
    backend = load_backend(settings, device=CPU)
    batch, accelerator = make_batch(backend), Accelerator(cpu=True)
    branch = backend.load_control(settings.control)
    errors = branch_errors(accelerator, backend, branch, batch)
    for chosen, rejected in zip(batch.chosen, batch.rejected, strict=True):
        pair = {"chosen": chosen[None], "rejected": rejected[None], "weights": torch.ones(1)}
        loss, _ = group_pairs(errors, errors.detach(), beta=5000.0, **pair)
        assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
