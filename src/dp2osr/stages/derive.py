"""Controls made from another policy's candidates: blurred, their mean, or plain bicubic enlargement."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dp2osr import stage
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    import torch

    from dp2osr.shards import Sample


LOG = logging.getLogger("derive")


class DeriveJob(Strict):
    """How candidates are derived; sigma in pixels, for blur."""

    kind: Literal["blur", "mean", "bicubic"]
    sigma: float
    scale: Count
    image_format: Literal["png", "webp"]


def blur(image: "torch.Tensor", sigma: float) -> "torch.Tensor":
    """Blur (3, H, W) with a Gaussian of `sigma` pixels, cut at 4 sigma, reflecting borders."""
    from torchvision.transforms.functional import gaussian_blur

    if sigma == 0:
        return image
    radius = min(max(1, math.ceil(4 * sigma)), min(image.shape[1:]) - 1)
    return gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)


def blurred(candidates: Iterable["Sample"], job: DeriveJob) -> Iterator["Sample"]:
    """Blur each candidate."""
    for _, fields in candidates:
        facts, image = read_candidate(fields)
        yield candidate(blur(image, job.sigma), facts["group_id"], facts["rollout"], job)


def averaged(candidates: Iterable["Sample"], job: DeriveJob) -> Iterator["Sample"]:
    """Average the candidates of each group, over all blocks, into one: rollout 0."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for _, fields in candidates:
        facts, image = read_candidate(fields)
        group = facts["group_id"]
        sums[group] = sums[group] + image if group in sums else image
        counts[group] = counts.get(group, 0) + 1
    for group, total in sums.items():
        yield candidate(total / counts[group], group, 0, job)


def enlarged(shard: Iterable["Sample"], job: DeriveJob) -> Iterator["Sample"]:
    """Enlarge each LR image by bicubic interpolation: rollout 0."""
    from dp2osr.sampling import images_control
    from dp2osr.shards import decode_image

    for group, fields in shard:
        lr = decode_image(fields["lr.png"])
        yield candidate(images_control(lr[None], job.scale)[0], group, 0, job)


def read_candidate(fields: dict[str, bytes]) -> tuple[dict, "torch.Tensor"]:
    """Return what a candidate's sample says of it and its image (3, H, W) in [0, 1]."""
    from dp2osr.shards import decode_image

    data = fields["png"] if "png" in fields else fields["webp"]
    return json.loads(fields["json"]), decode_image(data)


def candidate(image: "torch.Tensor", group: str, rollout: int, job: DeriveJob) -> "Sample":
    """Return the sample of a derived candidate."""
    from dp2osr.shards import encode_image

    told = {"group_id": group, "rollout": rollout, "derive": job.kind, "sigma": job.sigma}
    data = encode_image(image, job.image_format)
    return f"{group}-r{rollout:04d}", {job.image_format: data, "json": json.dumps(told, sort_keys=True).encode()}


def main(argv: Sequence[str] | None = None) -> None:
    """Derive the candidates of a shard from those of another policy (blur, mean) or from its LR images (bicubic)."""
    parser = stage.parser(__doc__)
    parser.add_argument("--source", type=Path, nargs="+", required=True, help="candidates, or the LR shard for bicubic")
    parser.add_argument("--candidates", type=Path, required=True, help="output: shard of candidates")
    stage.config_arg(parser, DeriveJob)
    args = stage.parse_args(parser, argv)
    from dp2osr.shards import count_samples, read_shard, write_shard

    read = (sample for path in args.source for sample in read_shard(path))
    samples = stage.progress(read, sum(map(count_samples, args.source)), "images read", LOG)
    kinds = {"blur": blurred, "mean": averaged, "bicubic": enlarged}
    write_shard(args.candidates, kinds[args.config.kind](samples, args.config))


if __name__ == "__main__":
    stage.run(main)
