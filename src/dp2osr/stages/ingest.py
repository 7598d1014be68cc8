"""Read the images of a dataset, crop them, and record every file as a row of images.parquet.

A row is a crop (status ok, or rejected where it is flat), or a file that gave none (rejected, duplicate) with a reason.
An LR file that was given is a row, too: status partner, and the photo_id of the HR file that it belongs to.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from dp2osr import images, remote, seeds, stage, tables
from dp2osr.config_datasets import LrSettings
from dp2osr.errors import UserError
from dp2osr.partners import LrFile, Partners, misfit
from dp2osr.strict import Count, Probability, Strict

LOG = logging.getLogger("ingest")
LUMA = np.array([0.299, 0.587, 0.114])
BYTES_PER_PIXEL = 8  # a file of more than this times max_pixels is not read
OK, REJECTED, DUPLICATE, PARTNER = "ok", "rejected", "duplicate", "partner"
Row = dict[str, Any]


class IngestJob(Strict):
    """The keys of a dataset that decide its images.parquet, and the base seed.

    lr and scale: where LR images are given; nothing else reads them.
    """

    images: list[str]
    lr: LrSettings | None = None
    scale: Count = 1
    split: str
    hr_size: Count
    crop: Literal["random", "grid", "center", "full"]
    crops_per_image: Count
    downscale: Count
    min_std: Annotated[float, Field(ge=0)]
    max_pixels: Count
    max_rejected_share: Probability
    num_shards: Count
    seed: int

    @property
    def source(self) -> str:
        """Where LR images come from: degraded, given or alone."""
        return self.lr.source if self.lr else "degraded"

    @property
    def side(self) -> int:
        """Side of a crop in pixels of the file, which is LR where there is no HR."""
        return self.hr_size // self.scale if self.source == "alone" else self.hr_size


def ingest(job: IngestJob, *, copies: Path | None = None) -> pd.DataFrame:
    """Find, check and crop all images of the job's entries. Returns rows of tables.IMAGES in source order.

    copies: the folder with the copies of entries that are addresses (remote.py).
    """
    if not job.images:
        raise UserError("config: images: found an empty list, wanted folders, globs, .tar shards or builtin:NAME")
    max_bytes = BYTES_PER_PIXEL * job.max_pixels
    found = (item for entry in job.images for item in images.find(entry, max_bytes=max_bytes, copies=copies))
    partners = None
    if job.lr and job.source == "given":
        partners = Partners.find(job.lr.images, job.lr.endings, max_bytes=max_bytes, copies=copies)
    table = pd.DataFrame(list(_rows(found, job, partners)))
    _check_shares(table, job)
    table["image_id"] = _unique(table["image_id"])
    table["shard"] = _deal((table["status"] == OK).to_numpy(), job.num_shards)
    return table.drop(columns="is_image")


def _rows(found: Iterable[images.Found], job: IngestJob, partners: Partners | None) -> Iterator[Row]:
    """Yield the rows of each file; the first of several equal files is used. `partners` are the given LR files."""
    first: dict[str, str] = {}
    for count, item in enumerate(found, start=1):
        if count % 1000 == 0:
            LOG.info("%d files read", count)
        sha256 = "" if item.problem else hashlib.sha256(item.data).hexdigest()
        photo_id = (sha256 or hashlib.sha256(item.source.encode()).hexdigest())[:16]
        row = _file_row(item, photo_id, sha256, job.split)
        file = partners.take(item.source) if partners and item.is_image else None
        if item.problem:
            rows = [row | {"reason": item.problem}]
        elif sha256 in first:
            reason = f"same bytes as {first[sha256]}"
            rows = [row | {"image_id": f"{photo_id}-dup", "status": DUPLICATE, "reason": reason}]
        elif partners:
            rows = _pair_rows(item.data, row, job, file)
        else:
            rows = list(_crop_rows(item.data, row, job))
        if sha256 and (partners is None or any(each["status"] == OK for each in rows)):
            first.setdefault(sha256, item.source)  # an HR file whose pair fails may stand once more, beside another
        yield from rows
        if file:
            yield _partner_row(file, rows, job)
    for file, reason in partners.left() if partners else ():
        yield _lr_row(file, "", job) | {"reason": reason}


def _file_row(item: images.Found, photo_id: str, sha256: str, split: str) -> Row:
    """Return the row of a file that gives no crop."""
    return {
        "image_id": f"{photo_id}-bad",
        "photo_id": photo_id,
        "source": item.source,
        "sha256": sha256,
        "width": 0,
        "height": 0,
        "crop_x": -1,
        "crop_y": -1,
        "crop_size": 0,
        "split": split,
        "status": REJECTED,
        "reason": "",
        "is_image": item.is_image,
    }


def _crop_rows(data: bytes, row: Row, job: IngestJob) -> Iterator[Row]:
    """Decode a file and yield a row for each crop, or one row with the reason why there is none."""
    try:
        photo = images.decode(data, max_pixels=job.max_pixels)
    except images.BadImage as error:
        yield row | {"reason": str(error)}
        return
    yield from _photo_rows(photo, row, job)


def _photo_rows(photo: images.Pixels, row: Row, job: IngestJob) -> Iterator[Row]:
    """Yield a row for each crop of a decoded file, or one row with the reason why there is none."""
    height, width = photo.shape[:2]
    row = row | {"width": width, "height": height}
    if job.crop != "full" and min(width, height) < job.side * job.downscale:
        rule = "hr_size / scale" if job.source == "alone" else "hr_size x downscale"
        reason = f"too small: {width}x{height}, wanted at least {job.side * job.downscale} px ({rule})"
        yield row | {"reason": reason}
        return
    photo = images.area_downscale(photo, job.downscale)
    for number, (x, y, side) in enumerate(_boxes(photo, row["photo_id"], job)):
        part = photo[y : y + side, x : x + side] if side else photo
        std = float((part @ LUMA).std() / 255)
        crop = {"image_id": f"{row['photo_id']}-{number:03d}", "crop_x": x, "crop_y": y, "crop_size": side}
        flat = f"flat: standard deviation {std:.4f}, wanted at least {job.min_std}" if std < job.min_std else ""
        yield row | crop | {"status": REJECTED if flat else OK, "reason": flat}


def _boxes(photo: images.Pixels, photo_id: str, job: IngestJob) -> list[tuple[int, int, int]]:
    """Return (x, y, side) of the crops; side 0 is the whole file. Crops of a pair fall on whole LR pixels."""
    if job.crop == "full":
        return [(0, 0, 0)]
    step = job.scale if job.source == "given" else 1
    height, width = photo.shape[0] // step, photo.shape[1] // step
    seed = seeds.derive(job.seed, "crop", photo_id)
    boxes = images.crop_boxes(width, height, size=job.side // step, mode=job.crop, count=job.crops_per_image, seed=seed)
    return [(x * step, y * step, job.side) for x, y in boxes]


def _pair_rows(data: bytes, row: Row, job: IngestJob, file: LrFile | None) -> list[Row]:
    """Return the rows of an HR file with its LR file: those of its crops, or one with the reason why there is none."""
    if file is None:
        return [row | {"reason": "no LR file of its pair name"}]
    try:
        hr = images.decode(data, max_pixels=job.max_pixels)
        row = row | {"width": hr.shape[1], "height": hr.shape[0]}
        wrong = misfit(hr, _read_lr(file, job), job.scale)
    except images.BadImage as error:
        wrong = str(error)
    return [row | {"reason": wrong}] if wrong else list(_photo_rows(hr, row, job))


def _read_lr(file: LrFile, job: IngestJob) -> images.Pixels:
    """Decode a given LR file; raises BadImage that names it."""
    try:
        if file.found.problem:
            raise images.BadImage(file.found.problem)
        with images.Sources(file.copies) as sources:
            return images.decode(sources.read(file.found.source, file.sha256), max_pixels=job.max_pixels)
    except images.BadImage as error:
        raise images.BadImage(f"its LR file {file.found.source}: {error}") from None


def _partner_row(file: LrFile, hr_rows: Sequence[Row], job: IngestJob) -> Row:
    """Return the row of an LR file that an HR file has: partner where the pair gives a crop, else rejected."""
    row = _lr_row(file, hr_rows[0]["photo_id"], job)
    if not any(each["status"] == OK for each in hr_rows):
        return row | {"reason": f"its HR file {hr_rows[0]['source']} is not used"}
    width, height = (hr_rows[0][side] // job.scale for side in ("width", "height"))
    return row | {"status": PARTNER, "width": width, "height": height}


def _lr_row(file: LrFile, photo_id: str, job: IngestJob) -> Row:
    """Return the row of a given LR file, rejected so far; photo_id is that of its HR file, empty where it has none."""
    own = (file.sha256 or hashlib.sha256(file.found.source.encode()).hexdigest())[:16]
    row = _file_row(file.found, photo_id or own, file.sha256, job.split)
    return row | {"image_id": f"{photo_id or own}-lr"}


def _check_shares(table: pd.DataFrame, job: IngestJob) -> None:
    """Log how many crops and files there are of each status; raise UserError where too many files were rejected."""
    counts = Counter(table["status"])
    told = [OK, *([PARTNER] if job.source == "given" else []), REJECTED, DUPLICATE]
    LOG.info("crops and files: %s", ", ".join(f"{counts[status]} {status}" for status in told))
    for reason, count in Counter(table.loc[table["status"] == REJECTED, "reason"].str.split(":").str[0]).items():
        LOG.info("rejected: %d times '%s'", count, reason)
    files = table[table["is_image"] & (table["status"] != DUPLICATE)]
    used = (files["status"] == OK).groupby(files["photo_id"]).any()
    share = 1 - used.mean()
    if share > job.max_rejected_share or not used.any():
        example = files.loc[files["status"] == REJECTED].iloc[0]
        raise UserError(
            f"images: {share:.0%} of {len(used)} files rejected, at most {job.max_rejected_share:.0%} wanted"
            f" (max_rejected_share), and at least one used; e.g. {example['source']}: {example['reason']}"
        )
    if counts[OK] < job.num_shards:
        raise UserError(f"config: num_shards: found {job.num_shards}, wanted at most the {counts[OK]} crops there are")


def _unique(image_ids: pd.Series) -> pd.Series:
    """Number the second and later use of an id (several copies of one bad file): -bad, -bad-1, -bad-2."""
    repeat = image_ids.groupby(image_ids).cumcount()
    return image_ids.where(repeat == 0, image_ids + "-" + repeat.astype(str))


def _deal(used: np.ndarray, num_shards: int) -> np.ndarray:
    """Deal the used rows to shards in contiguous, nearly equal runs; the others get -1."""
    place = np.cumsum(used) - 1
    return np.where(used, place * num_shards // max(int(used.sum()), 1), -1)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: settings in, images.parquet out."""
    parser = stage.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="images.parquet to write")
    stage.config_arg(parser, IngestJob)
    args = stage.parse_args(parser, argv)
    copies = args.images.with_name(remote.FOLDER)
    tables.write(ingest(args.config, copies=copies), args.images, tables.IMAGES)


if __name__ == "__main__":
    stage.run(main)
