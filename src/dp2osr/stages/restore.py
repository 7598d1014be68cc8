"""LR images of a downstream benchmark -> restorations by a policy, as `dp2osr upscale` makes them: whole, by tiles.

Each finished restoration is kept beside the output until it stands, so that a killed job goes on where it was.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp2osr import config, prompts, resume, seeds, stage, strict, versions

if TYPE_CHECKING:
    import torch

    from dp2osr.upscale import Upscaler

LOG = logging.getLogger("restore")


class RestoreJob(strict.Strict):
    """What determines the restorations; `tile` is in output pixels, 0 for the model's own size."""

    policy: config.PolicySettings
    prompt: prompts.PromptJob
    scale: strict.Count
    tile: int
    num_seeds: strict.Count
    seed: int


@dataclass(frozen=True)
class Restorer:
    """A policy, and what it has restored before."""

    upscaler: "Upscaler"
    parts: resume.Parts
    seed: int

    def restore(self, data: bytes, text: str, photo: str, rollout: int) -> bytes:
        """Return one restoration as PNG. data: an encoded LR image; text: its prompt; photo: where its seed is from."""
        from dp2osr.shards import decode_image, encode_image

        name = f"{photo}-{rollout:04d}.png"
        if (kept := self.parts.get(name)) is not None:
            return kept
        embeddings = self.upscaler.backend.embed_prompts([text])
        noise = seeds.candidate(self.seed, photo, rollout)
        restored = encode_image(replace(self.upscaler, prompt=embeddings).restore(decode_image(data), noise))
        self.parts.put(name, restored)
        return restored


def read_lr(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """Yield key, facts and encoded LR image of each photograph; no image where it was rejected."""
    from dp2osr.shards import read_shard

    for key, fields in read_shard(path):
        yield key, json.loads(fields["json"]), fields.get("lr.png")


def read_prompts(path: Path, job: prompts.PromptJob, device: "torch.device") -> dict[str, str]:
    """Return the prompt of each photograph by key: one for all, or what a model says of its LR image."""
    from dp2osr.shards import decode_image

    used = [(key, data) for key, _, data in read_lr(path) if data is not None]
    if job.source not in ("tags", "caption"):
        return {key: job.text if job.source == "text" else "" for key, _ in used}
    describer = prompts.load_describer(job, device)
    return {key: describer.describe([decode_image(data)])[0] for key, data in used}


def samples(
    path: Path, texts: Mapping[str, str], restorer: Restorer, num_seeds: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a sample KEY-rROLLOUT (png, json) for each photograph and seed; json alone where it was rejected."""
    for key, facts, data in read_lr(path):
        for rollout in range(num_seeds):
            fields = {}
            if data is not None:
                fields["png"] = restorer.restore(data, texts[key], facts["sha256"][:16], rollout)
            told = facts | {"rollout": rollout, "prompt": texts.get(key, "")}
            yield f"{key}-r{rollout:04d}", fields | {"json": json.dumps(told).encode()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a shard of LR images in, a shard of restorations out."""
    args = parse_args(argv)
    from dp2osr import shards, upscale
    from dp2osr.models.backend import resolve, weights_hash

    job: RestoreJob = args.config
    device = stage.device(args.device)
    settings = job.policy.model_copy(update={"control": args.control})
    hashed = weights_hash(resolve(settings.model), resolve(settings.control))
    mark = resume.fingerprint(f"{versions.RESTORE} {job.model_dump_json()} {device.type}", hashed, args.lr)
    parts = resume.Parts(args.restored, mark)
    texts = read_prompts(args.lr, job.prompt, device)
    upscaler = upscale.load(settings, device=device, prompt="", scale=job.scale, tile=job.tile)
    made = samples(args.lr, texts, Restorer(upscaler, parts, job.seed), job.num_seeds)
    total = shards.count_samples(args.lr) * job.num_seeds
    shards.write_shard(args.restored, stage.progress(made, total, "restorations", LOG, kept=len(parts.names())))
    parts.clear()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = stage.parser(__doc__)
    parser.add_argument("--lr", type=Path, required=True, help="shard of LR images")
    parser.add_argument(
        "--control", required=True, help="control branch: a folder, a .safetensors file or builtin:NAME"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--restored", type=Path, required=True, help="output: shard of restorations")
    stage.config_arg(parser, RestoreJob)
    return stage.parse_args(parser, argv)


if __name__ == "__main__":
    stage.run(main)
