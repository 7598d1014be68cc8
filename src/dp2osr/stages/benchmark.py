"""Photographs of a downstream benchmark -> their LR images, one shard.

A sample is NUMBER with lr.png and json (name, file, sha256, status, reason); of a rejected photograph it is json alone.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import images, seeds, stage
from dp2osr.config_degradation import DegradationSettings
from dp2osr.errors import UserError
from dp2osr.strict import Count, Probability, Strict

if TYPE_CHECKING:
    import torch

    from dp2osr.downstream.photos import Photo

LOG = logging.getLogger("benchmark")
SMALLEST = 8  # px, side of an LR image


class BenchmarkJob(Strict):
    """The keys of a benchmark that decide its LR images, and the base seed."""

    kind: str
    max_images: int
    max_pixels: Count
    max_rejected_share: Probability
    degradation: DegradationSettings
    num_shards: Count
    seed: int


class LowerResolution:
    """Makes LR images of photographs, or takes given ones."""

    def __init__(self, job: BenchmarkJob, given: Path | None, device: "torch.device") -> None:
        from dp2osr.downstream import photos

        self.job, self.device = job, device
        self.given = photos.by_name(given) if given else None

    def of(self, photo: "Photo", data: bytes) -> "torch.Tensor":
        """Return the LR image (3, h, w) of a photograph's bytes; raises images.BadImage with the reason."""
        import torch

        from dp2osr.degradation.pipeline import degrade

        scale = self.job.degradation.scale
        array = images.decode(data, max_pixels=self.job.max_pixels)
        height, width = array.shape[:2]
        if photo.size and photo.size != (width, height):
            raise images.BadImage(f"{width}x{height} px, annotated as {photo.size[0]}x{photo.size[1]}")
        if min(height, width) < SMALLEST * scale:
            raise images.BadImage(f"{width}x{height} px, wanted at least {SMALLEST * scale} px a side")
        rows, columns = height // scale * scale, width // scale * scale
        if self.given is not None:
            return self._given(photo, (columns // scale, rows // scale))
        hr = torch.from_numpy(array[:rows, :columns].copy()).to(self.device).permute(2, 0, 1).float().div(255)
        drawn = seeds.derive(self.job.seed, "degrade", name_of(data))
        return degrade(hr[None], settings=self.job.degradation, seeds=[drawn])[0][0]

    def _given(self, photo: "Photo", size: tuple[int, int]) -> "torch.Tensor":
        import torch

        assert self.given is not None
        if photo.name not in self.given:
            raise UserError(f"config: lr: no image '{photo.name}' there, which the annotations name")
        path = self.given[photo.name]
        array = images.decode(path.read_bytes(), max_pixels=self.job.max_pixels)
        if array.shape[1::-1] != size:
            found = f"{array.shape[1]}x{array.shape[0]}"
            raise images.BadImage(f"its LR image {path} is {found} px, wanted {size[0]}x{size[1]}")
        return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div(255)


def name_of(data: bytes) -> str:
    """Return what seeds are derived from: the content of the photograph's file alone."""
    return hashlib.sha256(data).hexdigest()[:16]


def samples(
    photographs: Sequence["Photo"], numbers: Sequence[int], lower: LowerResolution
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the sample of each photograph, in order; raises UserError at the end where too many were rejected."""
    from dp2osr.shards import encode_image

    num_rejected = 0
    for number in numbers:
        photo = photographs[number]
        data = photo.path.read_bytes()
        facts = {"name": photo.name, "file": photo.path.name, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            lr = lower.of(photo, data)
        except images.BadImage as error:
            LOG.warning("%s: rejected: %s", photo.path, error)
            num_rejected += 1
            yield key(number), {"json": json.dumps(facts | {"status": "rejected", "reason": str(error)}).encode()}
            continue
        told = json.dumps(facts | {"status": "ok", "reason": ""}).encode()
        yield key(number), {"lr.png": encode_image(lr.cpu()), "json": told}
    LOG.info("%d of %d photographs rejected", num_rejected, len(numbers))
    if num_rejected > lower.job.max_rejected_share * len(numbers):
        raise UserError(
            f"{num_rejected} of {len(numbers)} photographs cannot be used, wanted at most a share of "
            f"{lower.job.max_rejected_share:g} (max_rejected_share); the log names each"
        )


def key(number: int) -> str:
    """Return the key of a photograph in the shards."""
    return f"{number:06d}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a benchmark's folders in, one shard of LR images out."""
    args = parse_args(argv)
    from dp2osr.downstream import photos
    from dp2osr.shards import write_shard

    job: BenchmarkJob = args.config
    found = photos.find(job.kind, args.images, args.annotations, max_images=job.max_images)
    numbers = range(args.shard, len(found), job.num_shards)
    lower = LowerResolution(job, args.given, stage.device(args.device))
    made = samples(found, numbers, lower)
    write_shard(args.lr, stage.progress(made, len(numbers), "photographs", LOG))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = stage.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--annotations", type=Path, required=True, help="the benchmark's JSON, or folder")
    parser.add_argument("--given", type=Path, help="folder of given LR images")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--lr", type=Path, required=True, help="output: shard of LR images (tar)")
    stage.config_arg(parser, BenchmarkJob)
    return stage.parse_args(parser, argv)


if __name__ == "__main__":
    stage.run(main)
