"""Encode the selected candidates of one shard for training: latents and control, each once.

A group of the output holds the latents of the candidates that some pair chose or rejected, and the control: encoded
where the control branch takes latents, else as the LR image (training/pack.py). The text embeddings stay in their own
files, under the same group_id.
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import resume, stage, tables, versions
from dp2osr.config import PolicySettings
from dp2osr.errors import UserError
from dp2osr.pieces import Pieces

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from dp2osr.models.backend import Backend
    from dp2osr.training.pack import TarIndex

logger = logging.getLogger(__name__)


def selected(pairs: "pd.DataFrame") -> dict[str, list[int]]:
    """Return the rollouts that some pair of a group chose or rejected, ascending, by group in order."""
    import pandas as pd

    columns = [pairs[["group_id", name]].set_axis(["group_id", "rollout"], axis=1) for name in ("chosen", "rejected")]
    both = pd.concat(columns).drop_duplicates().sort_values(["group_id", "rollout"])
    return {str(group): rows["rollout"].tolist() for group, rows in both.groupby("group_id")}


def read_candidates(index: "TarIndex", group_id: str, rollouts: Sequence[int]) -> "torch.Tensor":
    """Return candidates (K, 3, H, W) RGB in [0, 1]; raises UserError naming one that is missing."""
    import torch

    from dp2osr import shards

    images = []
    for rollout in rollouts:
        key = f"{group_id}-r{rollout:04d}"
        name = next((f"{key}.{kind}" for kind in ("png", "webp") if f"{key}.{kind}" in index), None)
        if name is None:
            raise UserError(f"candidates: {key} is missing, though pairs selects it; run the rollout again")
        images.append(shards.decode_image(index.read(name)))
    return torch.stack(images)


def encode_group(
    backend: "Backend", candidates: "torch.Tensor", rollouts: Sequence[int], lr: "torch.Tensor", *, pieces: Pieces
) -> bytes:
    """Return the field `safetensors` of a sample of the training pack.

    candidates: (K, 3, H, W), lr: (3, h, w), both RGB in [0, 1]. Latents are the mode of the VAE's posterior.
    """
    import torch

    from dp2osr.sampling import images_control
    from dp2osr.training.pack import dump_group

    latents = torch.stack(pieces.run(range(len(candidates)), lambda part: backend.encode_images(candidates[part])))
    scale = candidates.shape[2] // lr.shape[1]
    if backend.control_factor == 1:  # an image, which is made again from the LR image
        return dump_group(latents, rollouts, scale=scale)
    return dump_group(latents, rollouts, control=backend.prepare_control(images_control(lr[None], scale))[0])


def encode(
    backend: "Backend",
    wanted: Mapping[str, Sequence[int]],
    *,
    index: "TarIndex",
    lr: Path,
    parts: resume.Parts,
    pieces: Pieces,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of the groups of LR shard `lr` that are in `wanted`; finished ones are kept in `parts`."""
    from dp2osr import shards
    from dp2osr.training.pack import FIELD, LR_FIELD

    for group_id, fields in shards.read_shard(lr):
        if group_id not in wanted:
            continue
        data = parts.get(group_id)
        if data is None:
            candidates = read_candidates(index, group_id, wanted[group_id])
            image = shards.decode_image(fields["lr.png"])
            data = encode_group(backend, candidates, wanted[group_id], image, pieces=pieces)
            parts.put(group_id, data)
        control = {LR_FIELD: fields["lr.png"]} if backend.control_factor == 1 else {}
        yield group_id, control | {FIELD: data}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse paths and settings."""
    parser = stage.parser(__doc__)
    parser.add_argument("--pairs", type=Path, required=True, help="pairs of the run")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="blocks of the shard")
    parser.add_argument("--lr", type=Path, required=True, help="LR shard")
    parser.add_argument("--encoded", type=Path, required=True, help="output: tar of encoded groups")
    parser.add_argument("--batch-size", type=int, default=32, help="candidates encoded at once")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    stage.config_arg(parser, PolicySettings)
    return stage.parse_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read pairs, candidates and LR images of a shard; write its part of the training pack."""
    args = parse_args(argv)
    from dp2osr import shards
    from dp2osr.models.backend import load_backend
    from dp2osr.training.pack import TarIndex

    policy: PolicySettings = args.config
    own = TarIndex([args.lr])
    every = selected(tables.read(args.pairs, tables.PAIRS))
    wanted = {group_id: rollouts for group_id, rollouts in every.items() if f"{group_id}.lr.png" in own}
    backend = load_backend(policy, device=stage.device(args.device), parts=frozenset({"vae"}))
    settings = f"{policy.model_dump_json()} {args.batch_size} {versions.ENCODE}"
    mark = resume.fingerprint(settings, args.pairs, args.lr, *args.candidates)
    parts = resume.Parts(args.encoded, mark)
    pieces = Pieces(args.batch_size, "candidates", logger)
    samples = encode(backend, wanted, index=TarIndex(args.candidates), lr=args.lr, parts=parts, pieces=pieces)
    kept = sum(group_id in wanted for group_id in parts.names())
    shards.write_shard(args.encoded, stage.progress(samples, len(wanted), "groups encoded", logger, kept=kept))
    parts.clear()


if __name__ == "__main__":
    stage.run(main)
