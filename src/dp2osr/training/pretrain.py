"""Pretraining of a tiny model: VAE, then backbone and control branch together, or a control branch alone.

Resumable: the batch of a step is a pure function of (seed, phase, step), and a checkpoint holds the rest.
"""

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from dp2osr import seeds
from dp2osr.config import PhaseSettings, PolicySettings, PretrainSettings
from dp2osr.errors import UserError
from dp2osr.models import build
from dp2osr.models.backend import Backend, load_backend, resolve
from dp2osr.models.parts import load_settings, place
from dp2osr.resume import atomic
from dp2osr.sampling import images_control
from dp2osr.stopping import STOP, TERMINATED
from dp2osr.training.checkpoint import atomic_folder
from dp2osr.training.pool import Pool

log = logging.getLogger(__name__)

LossOf = Callable[[torch.Generator], torch.Tensor]


class Trainer:
    """Trains the phases one after the other and keeps one checkpoint file a phase in `folder`.

    The folder belongs to one setting: what lies there is gone on from without a question. `policy` says which backend
    the model is for; its model and control are what comes out.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        policy: PolicySettings,
        pool: Pool,
        folder: Path,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.settings, self.pool, self.folder, self.seed, self.device = settings, pool, folder, seed, device
        self.rows: list[dict[str, object]] = []
        self.start = resolve(settings.backbone) if settings.backbone else self._untrained(policy)
        whole = policy.sampling.model_copy(update={"dtype": "float32", "vae_dtype": "float32"})
        policy = policy.model_copy(update={"model": str(self.start), "sampling": whole})
        self.backend: Backend = load_backend(policy, device=device)
        self.vae: Any = self.backend.autoencoder.vae
        self.control = (
            self._new_control() if settings.backbone else self.backend.load_control(self.start / "controlnet")
        )

    def _untrained(self, policy: PolicySettings) -> Path:
        """Return the folder of the model with which the training starts, beside the checkpoints."""
        folder = self.folder / "start"
        if folder.exists():
            return folder
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seeds.derive(self.seed, "initial weights"))
        with atomic_folder(folder) as temporary:
            shapes = self.settings.architecture
            build.write(temporary, shapes, backend=policy.backend, size=self.pool.hr.shape[2])
            if self.settings.autoencoder:
                self._take_autoencoder(resolve(self.settings.autoencoder) / "vae", temporary / "vae")
        return folder

    def _take_autoencoder(self, given: Path, place: Path) -> None:
        wanted = self.settings.architecture.latent_channels
        found = load_settings(AutoencoderKL, given.parent, given.name)["latent_channels"]
        if found != wanted:
            raise UserError(
                f"autoencoder {given}: its latents have {found} channels, "
                f"and pretrain.architecture.latent_channels says {wanted}"
            )
        shutil.rmtree(place)
        shutil.copytree(given, place)

    def _new_control(self) -> Any:
        torch.manual_seed(seeds.derive(self.seed, "initial weights"))
        return place(build.new_control(self.backend.backbone, self.settings.architecture), self.device, torch.float32)

    def run(self) -> None:
        """Train whatever phases are not finished yet."""
        trained = {name: module.requires_grad_(True) for name, module in self._trained().items()}
        if trained.pop("vae", None):
            self._phase("vae", self.settings.vae, [self.vae], self._vae_loss)
            self._fix_latent_scale()
        joint = list(trained.values())
        self.latents = self._encode_pool(self.pool.hr, self.backend.encode_images)
        self.controls = self._encode_controls()
        self.texts = self.backend.embed_prompts(["", "photograph", "dead leaves"])
        self._phase("denoiser", self.settings.denoiser, joint, self._denoiser_loss(self.settings.denoiser))
        self._phase("finetune", self.settings.finetune, joint, self._denoiser_loss(self.settings.finetune))

    def _trained(self) -> dict[str, nn.Module]:
        """Return the networks that are trained, by the folder that they are saved in."""
        if self.settings.backbone:
            return {"controlnet": self.control}
        vae = {} if self.settings.autoencoder else {"vae": self.vae}
        return vae | {self.backend.backbone_folder: self.backend.backbone, "controlnet": self.control}

    @STOP.in_hand()
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
            if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == phase.steps or STOP.requested:
                self._save(name, step + 1, total, modules, averages, optimizer)
            if STOP.requested:
                raise SystemExit(TERMINATED)
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
    def _encode_pool(self, images: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return `encode` of (N, 3, H, W) uint8 images, on the CPU."""
        return torch.cat([encode(batch.to(self.device).float() / 255).cpu() for batch in images.split(128)])

    def _encode_controls(self) -> torch.Tensor | None:
        """Return the control of each image of the pool where the backend makes latents of it, else None."""
        if self.backend.control_factor == 1:
            return None
        scale = self.pool.hr.shape[2] // self.pool.lr.shape[2]
        return self._encode_pool(self.pool.lr, lambda lr: self.backend.prepare_control(images_control(lr, scale)))

    def _denoiser_loss(self, phase: PhaseSettings) -> LossOf:
        """Return the squared error of the prediction at a random timestep, LR upsampled as control."""
        whole = self.pool.hr.shape[2]

        def cut(images: torch.Tensor, crops: list[tuple[int, int, int]]) -> torch.Tensor:
            """Return the crops, given in HR pixels, of (N, C, h, w) latents or smaller images."""
            factor = whole // images.shape[2]
            side = phase.crop // factor
            windows = (
                (i, slice(y // factor, y // factor + side), slice(x // factor, x // factor + side)) for i, y, x in crops
            )
            return torch.stack([images[i, :, rows, columns] for i, rows, columns in windows]).to(self.device)

        def loss(generator: torch.Generator) -> torch.Tensor:
            crops = list(self._crops(phase.batch_size, phase.crop, generator))
            latents = cut(self.latents, crops)
            kinds = 2 - self.pool.photograph[[i for i, _, _ in crops]].long()
            dropped = torch.rand(len(crops), generator=generator) < self.settings.prompt_dropout
            text = {name: tensor[torch.where(dropped, 0, kinds)] for name, tensor in self.texts.items()}
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            steps = self.backend.draw_timesteps(len(crops), generator)
            noisy = self.backend.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
            if self.controls is None:
                lr = cut(self.pool.lr, crops).float() / 255
                control = self.backend.prepare_control(images_control(lr, whole // self.pool.lr.shape[2]))
            else:
                control = cut(self.controls, crops)
            predicted = self.backend.predict(self.control, noisy, steps, control, text)
            return functional.mse_loss(predicted, self.backend.target(latents, noise, steps))

        return loss

    def save(self, folder: Path) -> None:
        """Write the model in diffusers' layout, the control branch in controlnet/."""
        trained = self._trained()
        for part in self.start.iterdir():
            if part.is_dir() and part.name not in trained:
                shutil.copytree(part, folder / part.name)
        for name, module in trained.items():
            module.save_pretrained(folder / name)  # type: ignore[operator]


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
