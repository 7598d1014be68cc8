"""Small copies of images, and sprite sheets: many tiles in one WebP."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dp2osr.errors import UserError

GREY = (128, 128, 128)
MAX_SIDE = 16383  # pixels: the largest that WebP has


@dataclass(frozen=True)
class Sprite:
    """Tiles of one size in rows of `columns`, as WebP; `has` says of each whether there was an image for it."""

    width: int
    height: int
    columns: int
    has: list[bool]
    webp: bytes

    def as_json(self) -> dict[str, object]:
        """Return what a page needs to show a tile; the image in base64."""
        missing = [at for at, present in enumerate(self.has) if not present]
        place = {"width": self.width, "height": self.height, "columns": self.columns, "tiles": len(self.has)}
        return place | {"missing": missing, "webp": base64.b64encode(self.webp).decode()}


def shrink(data: bytes, side: int, *, name: str) -> Image.Image:
    """Decode PNG or WebP bytes; return RGB whose longer side is at most `side` pixels. `name` is for errors."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no readable image ({error})") from None


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge or shrink to the size of a tile: hard pixels where it grows, as an LR image is shown."""
    grows = image.width < size[0]
    return image.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def sprite(images: Sequence[Image.Image | None], *, quality: int) -> Sprite:
    """Put images on one sheet, all at the size of the largest; a place without an image stays grey."""
    sizes = [image.size for image in images if image is not None]
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(8, 8))
    columns = max(next(n for n in range(1, len(images) + 2) if n * n >= len(images)), 1)
    rows = -(-len(images) // columns)
    if max(columns * width, rows * height) > MAX_SIDE:
        raise UserError(
            f"explorer.thumbnail: {len(images)} tiles of {width} × {height} px make a sheet of {columns * width} × "
            f"{rows * height} px, wanted at most {MAX_SIDE}: choose smaller thumbnails"
        )
    sheet = Image.new("RGB", (columns * width, max(rows, 1) * height), GREY)
    for at, image in enumerate(images):
        if image is not None:
            sheet.paste(fit(image, (width, height)), (at % columns * width, at // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="WEBP", quality=quality, method=2)
    return Sprite(width, height, columns, [image is not None for image in images], buffer.getvalue())


def candidates(paths: Iterable[Path], side: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield the key of each candidate of some shards, and its small copy; no large image is kept."""
    from dp2osr import shards

    for path in paths:
        for key, fields in shards.read_shard(path):
            data = fields.get("png") or fields.get("webp")
            if data is None:
                raise UserError(f"candidates {path}: {key}: found fields {sorted(fields)}, wanted png or webp")
            yield key, shrink(data, side, name=f"candidates {path}: {key}")
