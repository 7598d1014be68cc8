"""Seeded candidates of one shard and one block of seeds, sampled from a policy.

Finished batches are kept beside the output until it stands, so that a killed job goes on where it was; the candidates
equal those of a job that was never killed. A batch is encoded and kept while the next one is sampled.
"""

import argparse
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dp2osr import config, resume, seeds, stage, strict, versions
from dp2osr.ahead import Behind
from dp2osr.config_rollout import SpeedSettings
from dp2osr.errors import UserError
from dp2osr.pieces import Pieces

if TYPE_CHECKING:
    import torch

    from dp2osr.models.backend import Backend, Embeddings
    from dp2osr.shards import Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")
Batch = Sequence[tuple[str, int]]  # (group_id, rollout)


class RolloutJob(strict.Strict):
    """What determines the candidates of a block: rollouts `first` .. `first + count - 1` of each group.

    whole: the images are photographs of any size, which are restored by tiles where the model's own size is smaller.
    """

    whole: bool = False
    policy: config.PolicySettings
    seed: int
    first: int
    count: strict.Count
    scale: strict.Count
    image_format: str


@dataclass(frozen=True)
class Sampler:
    """A policy and the groups of a shard, ready to sample any (group, rollout).

    pieces: candidates are sampled so many at once, or fewer where memory is short. filled: what is sampled at once is
    filled up to as many, and the surplus dropped.
    """

    backend: "Backend"
    branch: "torch.nn.Module"
    images: dict[str, "torch.Tensor"]
    embeddings: dict[str, "Embeddings"]
    negative: "Embeddings"
    policy_hash: str
    job: RolloutJob
    speed: SpeedSettings
    pieces: Pieces
    filled: bool

    def restore(self, batch: Batch) -> list[np.ndarray]:
        """Sample a batch; returns (H, W, 3) uint8 RGB of each candidate, off the GPU."""
        return self.pieces.run(batch, self._restore)

    def _restore(self, batch: Batch) -> list[np.ndarray]:
        import torch

        from dp2osr import sampling, shards
        from dp2osr.models import speed
        from dp2osr.models.backend import stack

        device, surplus = self.backend.device, self.pieces.size - len(batch) if self.filled else 0
        full = [*batch, *[batch[-1]] * surplus]
        restore = sampling.restore_whole if self.job.whole else sampling.restore
        with speed.attention(self.speed):
            restored = restore(
                self.backend,
                self.branch,
                torch.stack([self.images[group] for group, _ in full]).to(device),
                scale=self.job.scale,
                embeddings=stack([self.embeddings[group] for group, _ in full], device),
                negative=stack([self.negative] * len(full), device),
                seeds=[seeds.candidate(self.job.seed, group, rollout) for group, rollout in full],
                sampling=self.job.policy.sampling,
            )
        return [shards.to_uint8(image) for image in restored[: len(batch)]]

    def encode(self, batch: Batch, restored: Sequence[np.ndarray]) -> list["Sample"]:
        """Return the samples of the candidates' shard."""
        from dp2osr import shards

        found = []
        for (group, rollout), image in zip(batch, restored, strict=True):
            seed = seeds.candidate(self.job.seed, group, rollout)
            facts = {"group_id": group, "rollout": rollout, "seed": seed, "policy_hash": self.policy_hash}
            told = json.dumps({**facts, "sampling": self.job.policy.sampling.model_dump()}, sort_keys=True).encode()
            data = shards.encode_array(image, self.job.image_format)
            found.append((f"{group}-r{rollout:04d}", {self.job.image_format: data, "json": told}))
        return found


def plan(groups: Sequence[str], first: int, count: int, batch_size: int) -> list[Batch]:
    """Cut all (group, rollout) of a job, the rollouts of a group together, into batches."""
    wanted = [(group, rollout) for group in groups for rollout in range(first, first + count)]
    return [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]


def plan_shapes(images: Mapping[str, "torch.Tensor"], first: int, count: int, batch_size: int) -> list[Batch]:
    """Plan as `plan` does, the groups in order and no batch across images of two shapes."""
    alike = groupby(images, key=lambda group: images[group].shape)
    return [batch for _, groups in alike for batch in plan(list(groups), first, count, batch_size)]


def pack(samples: Sequence["Sample"]) -> bytes:
    """Serialize the samples of a batch."""
    buffer = io.BytesIO()
    fields = {f"{key}.{name}": np.frombuffer(data, np.uint8) for key, each in samples for name, data in each.items()}
    np.savez(buffer, allow_pickle=False, **fields)
    return buffer.getvalue()


def unpack(data: bytes) -> list["Sample"]:
    """Return the samples that `pack` serialized, in their order."""
    samples: dict[str, dict[str, bytes]] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for member in arrays.files:
            key, _, field = member.partition(".")
            samples.setdefault(key, {})[field] = arrays[member].tobytes()
    return list(samples.items())


def resumed(
    restore: Callable[[Batch], T],
    encode: Callable[[Batch, T], list["Sample"]],
    batches: Sequence[Batch],
    parts: resume.Parts,
) -> Iterator["Sample"]:
    """Compute the batches that `parts` does not hold yet, then yield all samples in order.

    A batch is encoded and kept while the next one is restored. After SIGTERM no further one is begun.
    """
    names = [f"batch-{index:06d}.npz" for index in range(len(batches))]
    pending = [index for index, name in enumerate(names) if not (parts.folder / name).is_file()]
    logger.info("%d batches, %d of them kept from an earlier attempt", len(batches), len(batches) - len(pending))

    def keep(index: int, restored: T) -> None:
        parts.put(names[index], pack(encode(batches[index], restored)))

    with Behind() as behind:
        for index in stage.progress(pending, len(pending), f"batches of {len(batches[0])} candidates", logger):
            behind.do(keep, index, restore(batches[index]))
            if stage.STOP.requested:  # the last line of the log says how many are kept
                behind.wait()
    for name, batch in zip(names, batches, strict=True):
        kept = parts.get(name)  # None where a second writer of the same output has finished and cleared it
        yield from unpack(kept) if kept is not None else encode(batch, restore(batch))


def load_sampler(args: argparse.Namespace) -> Sampler:
    """Read the shard's LR images and embeddings, and load the policy."""
    from dp2osr import shards
    from dp2osr.models import speed
    from dp2osr.models.backend import load_backend, read_embeddings, resolve, weights_hash

    job: RolloutJob = args.config
    images = {group: shards.decode_image(fields["lr.png"]) for group, fields in shards.read_shard(args.lr)}
    embeddings, negative = read_embeddings(args.embeddings)
    if absent := [group for group in images if group not in embeddings]:
        raise UserError(f"embeddings {args.embeddings}: no prompt of group {absent[0]}, which {args.lr} holds")
    if not images:
        raise UserError(f"shard {args.lr}: no images in it; fewer shards than images are wanted (num_shards)")
    policy_hash = weights_hash(resolve(job.policy.model), resolve(args.control))
    device = stage.device(args.device)
    backend = load_backend(job.policy, device=device, parts=frozenset({"backbone", "vae"}))
    branch = backend.load_control(args.control)
    speed.prepare(backend, branch, args.speed)
    pieces = Pieces(args.batch_size, "candidates", logger)
    filled = args.speed.compile and not job.whole  # what is compiled is for one shape
    return Sampler(backend, branch, images, embeddings, negative, policy_hash, job, args.speed, pieces, filled)


def main(argv: Sequence[str] | None = None) -> None:
    """Sample a block of candidates of a shard."""
    parser = stage.parser(__doc__)
    parser.add_argument("--lr", type=Path, required=True, help="shard of LR images")
    parser.add_argument("--embeddings", type=Path, required=True, help="embeddings of the shard")
    parser.add_argument(
        "--control", required=True, help="control branch: a folder, a .safetensors file or builtin:NAME"
    )
    parser.add_argument("--batch-size", type=int, required=True, help="candidates denoised at once")
    stage.config_arg(parser, SpeedSettings, "--speed")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--candidates", type=Path, required=True, help="output: shard of candidates")
    stage.config_arg(parser, RolloutJob)
    args = stage.parse_args(parser, argv)
    from dp2osr import shards

    sampler = load_sampler(args)
    batches = plan_shapes(sampler.images, args.config.first, args.config.count, args.batch_size)
    how = f"{args.batch_size} {args.speed.model_dump_json(exclude={'compile_cache'})} {sampler.backend.device.type}"
    settings = f"{versions.ROLLOUT} {args.config.model_dump_json()} {how}"
    mark = resume.fingerprint(settings, sampler.policy_hash, args.lr, args.embeddings)
    parts = resume.Parts(args.candidates, mark)
    shards.write_shard(args.candidates, resumed(sampler.restore, sampler.encode, batches, parts))
    parts.clear()


if __name__ == "__main__":
    stage.run(main)
