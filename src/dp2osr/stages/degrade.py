"""Crop the HR images of one shard, degrade them to LR, and store both with all drawn parameters.

A sample's pixels follow from the file, its crop and its seed alone: the number of shards and the batch do not matter.
LR images that are given are cropped where their HR images are, and stored as they are; without HR images, alone.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from dp2osr import images, remote, seeds, stage, tables
from dp2osr.config_degradation import DegradationSettings
from dp2osr.errors import UserError
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("degrade")
BATCH_SIZE = 16  # images degraded at once; any value gives the same pixels


class DegradeJob(Strict):
    """The keys of a dataset that decide its pixels, and the base seed; of given LR images, the scale alone is read."""

    source: Literal["degraded", "given", "alone"] = "degraded"
    downscale: Count
    max_pixels: Count
    degradation: DegradationSettings
    seed: int


def read_crops(
    rows: pd.DataFrame, *, downscale: int, max_pixels: int, copies: Path | None = None
) -> Iterator[np.ndarray]:
    """Yield the crop of each row of tables.IMAGES, (crop_size, crop_size, 3) uint8; one photograph is kept decoded.

    A crop_size of 0 is the whole image, (H, W, 3). copies: the folder with the copies of sources that are addresses
    (remote.py). Raises UserError when a file is gone or is not the one that was ingested.
    """
    decoded, photo = "", np.empty((0, 0, 3), dtype=np.uint8)
    with images.Sources(copies) as sources:
        for row in rows.to_dict("records"):
            if row["sha256"] != decoded:
                data = sources.read(row["source"], row["sha256"])
                photo = images.area_downscale(images.decode(data, max_pixels=max_pixels), downscale)
                decoded = row["sha256"]
            x, y, size = row["crop_x"], row["crop_y"], row["crop_size"]
            crop = photo[y : y + size, x : x + size]
            if not size:
                crop = photo
            elif crop.shape != (size, size, 3):
                raise UserError(f"images: {row['source']}: crop {row['image_id']} does not fit; run ingest again")
            yield crop


def degrade_rows(
    rows: pd.DataFrame, job: DegradeJob, device: "torch.device", *, copies: Path | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a sample (key, fields hr.png, lr.png, json) for each row of tables.IMAGES, in its order."""
    crops = read_crops(rows, downscale=job.downscale, max_pixels=job.max_pixels, copies=copies)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows.iloc[start : start + BATCH_SIZE]
        yield from _degrade_batch(batch, [next(crops) for _ in range(len(batch))], job, device)


def _degrade_batch(
    rows: pd.DataFrame, crops: list[np.ndarray], job: DegradeJob, device: "torch.device"
) -> Iterator[tuple[str, dict[str, bytes]]]:
    import torch

    from dp2osr.degradation.pipeline import degrade
    from dp2osr.shards import encode_image

    hr = torch.from_numpy(np.stack(crops)).to(device).permute(0, 3, 1, 2).float().div(255)
    drawn = [seeds.derive(job.seed, "degrade", image_id) for image_id in rows["image_id"]]
    lr, parameters = degrade(hr, settings=job.degradation, seeds=drawn)
    for index, row in enumerate(rows.to_dict("records")):
        notes = {
            "photo_id": row["photo_id"],
            "source": row["source"],
            "crop": [row["crop_x"], row["crop_y"], row["crop_size"]],
            "degradation": parameters[index],
            "seed": drawn[index],
        }
        text = json.dumps(notes, sort_keys=True, ensure_ascii=False).encode()
        yield row["image_id"], {"hr.png": encode_image(hr[index]), "lr.png": encode_image(lr[index]), "json": text}


def given_rows(
    rows: pd.DataFrame, partners: pd.DataFrame, job: DegradeJob, *, copies: Path | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a sample (key, fields hr.png, lr.png, json) for each row, its LR crop from the photograph's given LR file.

    rows, partners: of tables.IMAGES, with status ok and partner.
    """
    scale = job.degradation.scale
    known = partners.set_index("photo_id")
    if lacking := [photo for photo in rows["photo_id"] if photo not in known.index]:
        raise UserError(f"images: photograph {lacking[0]} has no row of its LR file; run ingest again")
    files = {name: known[name].loc[rows["photo_id"].tolist()].to_numpy() for name in ("source", "sha256")}
    places = {name: rows[name].to_numpy() // scale for name in ("crop_x", "crop_y", "crop_size")}
    lr_rows = rows.assign(**files, **places)
    how: dict[str, Any] = {"downscale": 1, "max_pixels": job.max_pixels, "copies": copies}
    hr_crops, lr_crops = (read_crops(each, **how) for each in (rows, lr_rows))
    for row, lr_source, hr, lr in zip(rows.to_dict("records"), files["source"], hr_crops, lr_crops, strict=True):
        height, width = (side * scale for side in lr.shape[:2])
        yield _given(row, {"hr.png": hr[:height, :width], "lr.png": lr}, {"lr_source": lr_source})


def lone_rows(
    rows: pd.DataFrame, job: DegradeJob, *, copies: Path | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a sample (key, fields lr.png, json) for each row of tables.IMAGES, whose file is LR."""
    crops = read_crops(rows, downscale=1, max_pixels=job.max_pixels, copies=copies)
    for row, lr in zip(rows.to_dict("records"), crops, strict=True):
        yield _given(row, {"lr.png": lr}, {})


def make_samples(
    rows: pd.DataFrame,
    partners: pd.DataFrame,
    job: DegradeJob,
    device: "torch.device",
    *,
    copies: Path | None = None,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of rows of tables.IMAGES as the job says where their LR images come from."""
    if job.source == "given":
        return given_rows(rows, partners, job, copies=copies)
    if job.source == "alone":
        return lone_rows(rows, job, copies=copies)
    return degrade_rows(rows, job, device, copies=copies)


def _given(row: dict, crops: dict[str, np.ndarray], more: dict[str, str]) -> tuple[str, dict[str, bytes]]:
    """Return the sample of (H, W, 3) uint8 crops by field."""
    import torch

    from dp2osr.shards import encode_image

    crop = [row["crop_x"], row["crop_y"], row["crop_size"]]
    notes = {"photo_id": row["photo_id"], "source": row["source"], "crop": crop, **more}
    text = json.dumps(notes, sort_keys=True, ensure_ascii=False).encode()
    found = {name: torch.from_numpy(array.copy()).permute(2, 0, 1).div(255) for name, array in crops.items()}
    return row["image_id"], {name: encode_image(image) for name, image in found.items()} | {"json": text}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: images.parquet and a shard number in, the shard's tar out."""
    parser = stage.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the dataset")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--lr", type=Path, required=True, help="tar to write")
    stage.config_arg(parser, DegradeJob)
    args = stage.parse_args(parser, argv)
    from dp2osr.shards import write_shard

    table = tables.read(args.images, tables.IMAGES)
    rows = table[(table["status"] == "ok") & (table["shard"] == args.shard)]
    partners, copies = table[table["status"] == "partner"], args.images.with_name(remote.FOLDER)
    samples = make_samples(rows, partners, args.config, stage.device(args.device), copies=copies)
    write_shard(args.lr, stage.progress(samples, len(rows), "degraded", LOG))


if __name__ == "__main__":
    stage.run(main)
