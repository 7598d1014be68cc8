"""Pretraining of a tiny SD-style model: VAE, then UNet and control branch together, or a control branch alone.

Resumable: the batch of a step is a pure function of (seed, phase, step), and a checkpoint holds the rest.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from torch.nn import functional

from dp2osr import seeds
from dp2osr.config import PhaseSettings, PretrainSettings
from dp2osr.errors import UserError
from dp2osr.models import build
from dp2osr.models.backend import resolve
from dp2osr.models.sd import load_part
from dp2osr.resume import atomic
from dp2osr.training.pool import Pool

log = logging.getLogger(__name__)

LossOf = Callable[[torch.Generator], torch.Tensor]


class Trainer:
    """Trains the phases one after the other and keeps one checkpoint file a phase in `folder`.

    The folder belongs to one setting: what lies there is gone on from without a question.
    """

    def __init__(
        self, settings: PretrainSettings, pool: Pool, folder: Path, *, seed: int, device: torch.device
    ) -> None:
        self.settings, self.pool, self.folder, self.seed, self.device = settings, pool, folder, seed, device
        self.rows: list[dict[str, object]] = []
        torch.manual_seed(seeds.derive(seed, "initial weights"))
        shapes = settings.architecture
        self.tokenizer, self.text_encoder = build.tokenizer(), build.text_encoder(shapes).to(device).eval()
        self.vae: AutoencoderKL = build.vae(shapes)
        cells = pool.hr.shape[2] // 2 ** (len(shapes.vae_channels) - 1)
        self.unet: UNet2DConditionModel = build.unet(shapes, sample_size=cells)
        self.scheduler = build.scheduler(shapes)
        if settings.backbone:
            self._load_backbone(resolve(settings.backbone))
        self.control: ControlNetModel = build.control(self.unet, shapes)
        for module in (self.vae, self.unet, self.control):
            module.to(device, memory_format=torch.channels_last)

    def _load_backbone(self, folder: Path) -> None:
        self.vae = load_part(AutoencoderKL, folder, "vae")
        self.unet = load_part(UNet2DConditionModel, folder, "unet")
        self.scheduler = load_part(type(self.scheduler), folder, "scheduler")
        self.tokenizer = load_part(type(self.tokenizer), folder, "tokenizer")
        self.text_encoder = load_part(type(self.text_encoder), folder, "text_encoder", dtype=torch.float32)
        self.text_encoder.to(self.device).eval()
        self.unet.requires_grad_(False).eval()

    def run(self) -> None:
        """Train whatever phases are not finished yet."""
        joint = [self.control] if self.settings.backbone else [self.unet, self.control]
        if not self.settings.backbone:
            self._phase("vae", self.settings.vae, [self.vae], self._vae_loss)
            self._fix_latent_scale()
        self.vae.requires_grad_(False).eval()
        self.latents = self._encode_pool()
        self.texts = self._embed(["", "photograph", "dead leaves"])
        self._phase("denoiser", self.settings.denoiser, joint, self._denoiser_loss(self.settings.denoiser))
        self._phase("finetune", self.settings.finetune, joint, self._denoiser_loss(self.settings.finetune))

    def _phase(self, name: str, phase: PhaseSettings, modules: list[nn.Module], loss_of: LossOf) -> None:
        averages = [copy.deepcopy(module).requires_grad_(False) for module in modules]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        first, total = self._restore(name, modules, averages, optimizer)
        since = time.monotonic()
        for step in range(first, phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = _cosine(step, phase)
            generator = torch.Generator().manual_seed(seeds.derive(self.seed, name, step))
            loss = loss_of(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                raise UserError(
                    f"pretrain: phase {name}, step {step + 1}: loss {loss.item()}, gradient norm {norm}, wanted finite "
                    f"numbers; lower pretrain.{name}.learning_rate"
                )
            optimizer.step()
            _average(averages, modules, min(self.settings.ema_decay, (1 + step) / (10 + step)))
            total += loss.item()
            if (step + 1) % 100 == 0 or step + 1 == phase.steps:
                count = (step % 100) + 1
                rate = count / (time.monotonic() - since)
                left = (phase.steps - step - 1) / rate
                log.info(
                    "%s %d/%d loss %.4f, %.1f steps/s, %.0f s left",
                    name,
                    step + 1,
                    phase.steps,
                    total / count,
                    rate,
                    left,
                )
                self.rows.append({"phase": name, "step": step + 1, "loss": total / count})
                total, since = 0.0, time.monotonic()
            if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == phase.steps:
                self._save(name, step + 1, total, modules, averages, optimizer)
        for module, average in zip(modules, averages, strict=True):
            module.load_state_dict(average.state_dict())

    def _file(self, phase: str) -> Path:
        return self.folder / f"{phase}.pt"

    def _save(
        self,
        name: str,
        step: int,
        total: float,
        modules: list[nn.Module],
        averages: list[nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        state = {
            "step": step,
            "total": total,
            "modules": [module.state_dict() for module in modules],
            "averages": [module.state_dict() for module in averages],
            "optimizer": optimizer.state_dict(),
            "rows": [row for row in self.rows if row["phase"] == name],
        }
        with atomic(self._file(name)) as temporary:
            torch.save(state, temporary)

    def _restore(
        self, name: str, modules: list[nn.Module], averages: list[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        """Take up the checkpoint; return its step and the sum of losses that no row of the log holds yet."""
        if not self._file(name).is_file():
            return 0, 0.0
        state = torch.load(self._file(name), map_location=self.device, weights_only=True)
        for module, average, weights, mean in zip(modules, averages, state["modules"], state["averages"], strict=True):
            module.load_state_dict(weights)
            average.load_state_dict(mean)
        optimizer.load_state_dict(state["optimizer"])
        self.rows += state["rows"]
        log.info("%s: goes on after step %d", name, state["step"])
        return int(state["step"]), float(state["total"])

    def _crops(self, count: int, crop: int, generator: torch.Generator) -> Iterator[tuple[int, int, int]]:
        """Yield (image, top, left) with corners on multiples of 8 pixels."""
        cells = (self.pool.hr.shape[2] - crop) // 8 + 1
        for _ in range(count):
            image = int(torch.randint(len(self.pool.hr), (1,), generator=generator))
            top, left = (8 * int(torch.randint(cells, (1,), generator=generator)) for _ in range(2))
            yield image, top, left

    def _vae_loss(self, generator: torch.Generator) -> torch.Tensor:
        """L1 of pixels and of their differences, squared error (most for chroma), a small KL term."""
        phase = self.settings.vae
        crops = self._crops(phase.batch_size, phase.crop, generator)
        batch = torch.stack([self.pool.hr[i, :, y : y + phase.crop, x : x + phase.crop] for i, y, x in crops])
        images = (batch.to(self.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        restored = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = restored - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        chroma = error - error.mean(1, keepdim=True)
        squared = 4 * error.square().mean() + 8 * chroma.square().mean()
        return error.abs().mean() + 0.5 * edges + squared + 1e-4 * posterior.kl().mean() / error[0].numel()

    @torch.no_grad()
    def _fix_latent_scale(self) -> None:
        """Scale latents to unit variance, as Stable Diffusion does, and keep the factor in the VAE's config."""
        posterior = self.vae.encode(self.pool.hr[:256].to(self.device).float() / 127.5 - 1).latent_dist
        self.vae.register_to_config(scaling_factor=round(1 / posterior.mode().std().item(), 5))

    @torch.no_grad()
    def _encode_pool(self) -> torch.Tensor:
        parts = []
        for batch in self.pool.hr.split(128):
            posterior = self.vae.encode(batch.to(self.device).float() / 127.5 - 1).latent_dist
            parts.append(posterior.mode().cpu() * self.vae.config.scaling_factor)
        return torch.cat(parts)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def _denoiser_loss(self, phase: PhaseSettings) -> LossOf:
        """Return the squared error of the prediction at a random timestep, LR upsampled as control."""
        factor = self.pool.hr.shape[2] // self.latents.shape[2]
        scale = self.pool.hr.shape[2] // self.pool.lr.shape[2]
        cells, small = phase.crop // factor, phase.crop // scale

        def loss(generator: torch.Generator) -> torch.Tensor:
            crops = list(self._crops(phase.batch_size, phase.crop, generator))
            latents = torch.stack(
                [
                    self.latents[i, :, y // factor : y // factor + cells, x // factor : x // factor + cells]
                    for i, y, x in crops
                ]
            ).to(self.device)
            lr = torch.stack(
                [
                    self.pool.lr[i, :, y // scale : y // scale + small, x // scale : x // scale + small]
                    for i, y, x in crops
                ]
            )
            size = (phase.crop, phase.crop)
            up = functional.interpolate(lr.to(self.device).float() / 255, size=size, mode="bicubic").clamp(0, 1)
            kinds = 2 - self.pool.photograph[[i for i, _, _ in crops]].long()
            dropped = torch.rand(len(crops), generator=generator) < self.settings.prompt_dropout
            text = self.texts[torch.where(dropped, 0, kinds)]
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            total = self.scheduler.config.num_train_timesteps
            steps = torch.randint(0, total, (len(crops),), generator=generator).to(self.device)
            noisy = self.scheduler.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
            down, middle = self.control(noisy, steps, text, up, return_dict=False)
            predicted = self.unet(
                noisy, steps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
            velocity = self.scheduler.config.prediction_type == "v_prediction"
            target = self.scheduler.get_velocity(latents, noise, steps) if velocity else noise
            return functional.mse_loss(predicted, target)

        return loss

    def save(self, folder: Path) -> None:
        """Write the model in diffusers' layout, the control branch in controlnet/."""
        parts = {
            "vae": self.vae,
            "unet": self.unet,
            "controlnet": self.control,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "scheduler": self.scheduler,
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)


def _cosine(step: int, phase: PhaseSettings) -> float:
    """Return the learning rate of a step: 100 steps of warm-up, then cosine decay."""
    warm = min(1.0, (step + 1) / 100)
    decay = phase.final + (1 - phase.final) * 0.5 * (1 + math.cos(math.pi * step / max(phase.steps, 1)))
    return phase.learning_rate * warm * decay


@torch.no_grad()
def _average(averages: list[nn.Module], modules: list[nn.Module], decay: float) -> None:
    for average, module in zip(averages, modules, strict=True):
        for mean, value in zip(average.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
