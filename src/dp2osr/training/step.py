"""The gradient of one optimizer step, exact for any micro-batch and any number of processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from dp2osr.config import TrainSettings
from dp2osr.models.backend import Backend, Embeddings, stack
from dp2osr.training.batches import Unit, turns
from dp2osr.training.loss import STATS, Stats, group_pairs, image_errors
from dp2osr.training.pack import Pack


@dataclass(frozen=True)
class Batch:
    """I images and P pairs among them, on the device.

    latents, noise: (I, C, h, w) float32; timesteps: (I,); control: (I, ...); embeddings: first dimension I;
    chosen, rejected: (P,) int64 positions among the images; weights: (P,) float32.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    control: torch.Tensor
    embeddings: Embeddings
    chosen: torch.Tensor
    rejected: torch.Tensor
    weights: torch.Tensor

    def slices(self, size: int) -> list[slice]:
        """Return the images' slices of at most `size`."""
        return [slice(start, start + size) for start in range(0, len(self.latents), size)]


@dataclass(frozen=True)
class Feed:
    """Where the images of a unit come from: encoded pack and embeddings by group."""

    pack: Pack
    embeddings: Mapping[str, Mapping[str, torch.Tensor]]
    backend: Backend
    timestep_density: str

    def batch(self, units: Sequence[Unit]) -> Batch:
        """Load units; timestep and noise of each are drawn from its own seed on the CPU, so that devices agree."""
        latents, noise, timesteps, control, owners = [], [], [], [], []
        chosen, rejected, offset = [], [], 0
        for unit in units:
            images, condition = self.pack.load(unit.group_id, unit.rollouts)
            count = len(unit.rollouts)
            generator = torch.Generator("cpu").manual_seed(unit.seed)
            timesteps.append(self.backend.draw_timesteps(1, generator, self.timestep_density).expand(count))
            noise.append(torch.randn(images.shape[1:], generator=generator).expand_as(images))
            latents.append(images)
            control.append(condition.expand(count, *condition.shape))
            owners += [unit.group_id] * count
            chosen += [offset + place for place in unit.chosen]
            rejected += [offset + place for place in unit.rejected]
            offset += count
        device = self.backend.device
        return Batch(
            latents=torch.cat(latents).to(device),
            noise=torch.cat(noise).to(device),
            timesteps=torch.cat(timesteps).to(device),
            control=torch.cat(control).to(device),
            embeddings=stack([self.embeddings[owner] for owner in owners], device),
            chosen=torch.tensor(chosen, device=device),
            rejected=torch.tensor(rejected, device=device),
            weights=torch.tensor([w for unit in units for w in unit.weights], device=device),
        )


def branch_errors(accelerator: Accelerator, backend: Backend, branch: nn.Module, batch: Batch) -> torch.Tensor:
    """Return (I,) errors of the images of `batch` under control of `branch`, in one forward pass."""
    noisy = backend.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = backend.target(batch.latents, batch.noise, batch.timesteps)
    with accelerator.autocast():
        prediction = backend.predict(branch, noisy, batch.timesteps, batch.control, batch.embeddings)
    return image_errors(target, prediction)


def part(batch: Batch, span: slice) -> Batch:
    """Return the images `span` of a batch; its pairs, which may reach beyond, stay as they are."""
    images = {name: getattr(batch, name)[span] for name in ("latents", "noise", "timesteps", "control")}
    return replace(batch, embeddings={name: tensor[span] for name, tensor in batch.embeddings.items()}, **images)


@dataclass(frozen=True)
class Gradient:
    """Adds the gradient of units to the policy branch; the reference and the backbone are frozen and shared."""

    accelerator: Accelerator
    feed: Feed
    policy: nn.Module
    reference: nn.Module
    settings: TrainSettings

    def step(self, units: Sequence[Unit]) -> Stats:
        """Add the gradient of the global batch `units`, summed over processes; return its mean statistics.

        Each process takes every n-th unit, and each pair counts alike wherever it was computed, so that any number
        of processes gives the gradient of one.
        """
        total = sum(unit.num_pairs for unit in units)
        sums = torch.zeros(len(STATS), device=self.accelerator.device)
        for turn in turns(
            units,
            self.settings,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            in_step=self.feed.backend.sharded,
        ):
            share = turn.num_pairs / total
            stats = self._backward(self.feed.batch(turn.units), share, turn.passes)
            sums += share * torch.stack([stats[name] for name in STATS])
        self._sum_gradients()
        means = self.accelerator.reduce(sums, reduction="sum")
        return dict(zip(STATS, means.unbind(), strict=True))

    def _errors(self, batch: Batch, spare: Sequence[slice], *, graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (I,) errors of policy and reference; what the two have in common is computed once."""
        policy, reference = [], []
        for span in (*batch.slices(self.settings.micro_batch), *spare):
            with self.feed.backend.shared():
                with torch.no_grad():
                    reference.append(self._forward(self.reference, part(batch, span)))
                with torch.set_grad_enabled(graph):
                    policy.append(self._forward(self.policy, part(batch, span)))
        count = len(batch.latents)
        return torch.cat(policy)[:count], torch.cat(reference)[:count]

    def _forward(self, branch: nn.Module, batch: Batch) -> torch.Tensor:
        return branch_errors(self.accelerator, self.feed.backend, branch, batch)

    def _backward(self, batch: Batch, share: float, passes: int) -> Stats:
        """Backpropagate share · loss. A batch over micro_batch images goes twice through the policy: the loss depends
        on all errors at once, so dL/de comes from errors without a graph, and then each part's Σ dL/de · e is
        backpropagated. `passes` beyond those that the batch needs keep this process in step with the others: what
        they compute, of one image, weighs nothing."""
        spans = batch.slices(self.settings.micro_batch)
        spare = [slice(0, 1)] * (passes - len(spans))
        one_pass = passes == 1
        errors, reference = self._errors(batch, spare, graph=one_pass)
        if not one_pass:
            errors.requires_grad_()
        pairs = {"chosen": batch.chosen, "rejected": batch.rejected, "weights": batch.weights}
        loss, stats = group_pairs(errors, reference, beta=self.settings.beta, **pairs)
        if one_pass:
            self.accelerator.backward(loss * share)
            return stats
        (slopes,) = torch.autograd.grad(loss * share, errors)
        for span in spans:
            self.accelerator.backward((slopes[span] * self._forward(self.policy, part(batch, span))).sum())
        for span in spare:
            self.accelerator.backward(0 * self._forward(self.policy, part(batch, span)).sum())
        return stats

    def _sum_gradients(self) -> None:
        """Add up gradients over processes; a process without units adds zeros."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(gradient.contiguous(), reduction="sum")
