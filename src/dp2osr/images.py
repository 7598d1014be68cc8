"""Reading photographs: any common file becomes (H, W, 3) uint8 RGB by one stated rule, or a BadImage with a reason.

The rule: the first page counts; EXIF orientation is applied; greyscale and 1-bit are replicated to three channels;
palettes are expanded; alpha is composited on white; 16-bit greyscale becomes round(x / 257), of 16-bit colour Pillow
keeps the high byte (at most one level away from that); CMYK and YCbCr are converted; colour profiles are ignored.
"""

import contextlib
import hashlib
import io
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dp2osr import remote
from dp2osr.dead_leaves import dead_leaves
from dp2osr.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
# Where photographs lie inside installed packages: collection -> (package, folder relative to it, suffixes).
COLLECTIONS = {
    "skimage": ("skimage", "data", (".png", ".jpg")),
    "matplotlib": ("matplotlib", "mpl-data/sample_data", (".png", ".jpg")),
    "pyiqa": ("pyiqa", "../ResultsCalibra/ref_dir", (".bmp", ".BMP", ".png")),
}
BUILTIN = "builtin:"
IN_TAR = "::"  # between a tar and its member in the name of a source
CropMode = Literal["random", "grid", "center"]
Pixels = NDArray[np.uint8]


class BadImage(Exception):
    """A file that cannot be used; the message is the reason that images.parquet records."""


@dataclass(frozen=True)
class Found:
    """One file of an entry: its name for `Sources.read`, and its bytes or the `problem` that kept them away."""

    source: str
    data: bytes
    problem: str
    is_image: bool  # by its suffix


def find(entry: str, *, max_bytes: int, copies: Path | None = None) -> Iterator[Found]:
    """Yield every file of a config entry in a stable order: a folder, a glob, a file, a .tar shard or builtin:NAME.

    Of an address (remote.py) the copy in `copies` is read, and the address named. Files over `max_bytes` and files
    without an image suffix are named but not read. Raises UserError naming the entry when there is no image in it.
    """
    num_images = 0
    for found in _walk(entry, max_bytes, copies):
        num_images += found.is_image
        yield found
    if not num_images:
        raise UserError(f"images: {entry}: no image there, wanted files like {', '.join(sorted(SUFFIXES))}")


def _walk(entry: str, max_bytes: int, copies: Path | None) -> Iterator[Found]:
    if entry.startswith(BUILTIN):
        for name in expand_builtin(entry.removeprefix(BUILTIN)):
            yield Found(BUILTIN + name, load_builtin(name), "", True)
        return
    if remote.is_remote(entry):
        for address in remote.expand(entry):
            yield from _one(address, remote.local(address, copies), max_bytes)
        return
    root = Path(entry)
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file())
    elif root.is_file():
        paths = [root]
    else:
        matches = glob(entry, recursive=True)  # noqa: PTH207 (pathlib's takes no absolute pattern)
        paths = sorted(path for path in map(Path, matches) if path.is_file())
        if not paths:
            raise UserError(f"images: {entry}: not found")
    for path in paths:
        yield from _one(path.as_posix(), path, max_bytes)


def _one(name: str, path: Path, max_bytes: int) -> Iterator[Found]:
    """Yield the members of a .tar shard, or the file itself; `name` is what a table calls it."""
    if path.suffix.lower() == ".tar":
        yield from _members(name, path, max_bytes)
    else:
        yield _file(name, path, max_bytes)


def _file(name: str, path: Path, max_bytes: int) -> Found:
    is_image = path.suffix.lower() in SUFFIXES
    try:
        problem = _refuse(path.suffix, is_image, path.stat().st_size, max_bytes)
        return Found(name, b"" if problem else path.read_bytes(), problem, is_image)
    except OSError as error:
        return Found(name, b"", f"cannot be read: {error.strerror}", is_image)


def _members(name: str, path: Path, max_bytes: int) -> Iterator[Found]:
    with _open_tar(path) as (tar, handle):
        for member in tar.getmembers():
            if member.isfile():
                suffix = Path(member.name).suffix
                is_image = suffix.lower() in SUFFIXES
                problem = _refuse(suffix, is_image, member.size, max_bytes)
                data = b"" if problem else _slice(handle, member)
                yield Found(f"{name}{IN_TAR}{member.name}", data, problem, is_image)


def _refuse(suffix: str, is_image: bool, size: int, max_bytes: int) -> str:
    if not is_image:
        return f"no image suffix: {suffix or '(none)'}"
    return f"file too large: {size} bytes, at most {max_bytes}" if size > max_bytes else ""


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """Open an uncompressed tar; damage becomes a UserError. Members are read at their offsets, never extracted."""
    try:
        with path.open("rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            last = max(tar.getmembers(), key=lambda member: member.offset_data, default=None)
            if last is not None and last.offset_data + last.size > path.stat().st_size:
                raise tarfile.ReadError("unexpected end of data")
            yield tar, handle
    except tarfile.TarError as error:
        raise UserError(f"images: {path}: truncated or damaged tar ({error})") from None


def _slice(handle: IO[bytes], member: tarfile.TarInfo) -> bytes:
    handle.seek(member.offset_data)
    return handle.read(member.size)


class Sources:
    """Reads files by the names that `find` gave, and checks that they still are what the table says."""

    def __init__(self, copies: Path | None = None) -> None:
        self._copies = copies  # of what an address names
        self._stack = contextlib.ExitStack()
        self._tars: dict[str, tuple[dict[str, list[tarfile.TarInfo]], IO[bytes]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, source: str, sha256: str) -> bytes:
        """Return the bytes of `source`; raises UserError when it is gone or its SHA-256 is another."""
        try:
            for data in self._candidates(source):
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
        except FileNotFoundError:
            remedy = "; snakemake --forcerun fetch_images copies it again" if remote.is_remote(source) else ""
            raise UserError(f"images: {source}: not found; it was there at ingest{remedy}") from None
        raise UserError(f"images: {source}: the file changed after ingest; run ingest again")

    def _candidates(self, source: str) -> Iterator[bytes]:
        archive, mark, member = source.partition(IN_TAR)
        if source.startswith(BUILTIN):
            yield load_builtin(source.removeprefix(BUILTIN))
        elif mark:
            index, handle = self._index(archive)
            yield from (_slice(handle, found) for found in index.get(member, []))
        else:
            yield remote.local(source, self._copies).read_bytes()

    def _index(self, archive: str) -> tuple[dict[str, list[tarfile.TarInfo]], IO[bytes]]:
        if archive not in self._tars:
            tar, handle = self._stack.enter_context(_open_tar(remote.local(archive, self._copies)))
            index: dict[str, list[tarfile.TarInfo]] = {}
            for member in tar.getmembers():
                index.setdefault(member.name, []).append(member)
            self._tars[archive] = index, handle
        return self._tars[archive]


def expand_builtin(name: str) -> list[str]:
    """Expand a range: "dead-leaves/0..2" gives three names, any other name itself."""
    match = re.fullmatch(r"dead-leaves/(\d+)\.\.(\d+)", name)
    if not match:
        return [name]
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UserError(f"builtin:{name}: found an empty range, wanted first..last")
    return [f"dead-leaves/{seed}" for seed in range(first, last + 1)]


def load_builtin(name: str) -> bytes:
    """Return the file of a built-in image, e.g. "skimage/coffee", "pyiqa/I03"; "dead-leaves/7" is rendered to BMP."""
    collection, _, item = name.partition("/")
    if collection == "dead-leaves" and item.isdecimal():
        buffer = io.BytesIO()
        Image.fromarray(dead_leaves(int(item))).save(buffer, format="BMP")
        return buffer.getvalue()
    if collection not in COLLECTIONS or not re.fullmatch(r"[A-Za-z0-9_-]+", item):
        wanted = ", ".join(f"{known}/NAME" for known in COLLECTIONS)
        raise UserError(f"builtin:{name}: unknown, wanted {wanted} or dead-leaves/SEED")
    return _packaged_file(name, item, *COLLECTIONS[collection]).read_bytes()


def _packaged_file(name: str, item: str, package: str, folder: str, suffixes: tuple[str, ...]) -> Path:
    spec = find_spec(package)  # looks the package up without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"builtin:{name}: package {package} is not installed")
    root = Path(spec.submodule_search_locations[0]) / folder
    for suffix in suffixes:
        if (path := root / f"{item}{suffix}").is_file():
            return path
    known = ", ".join(sorted({path.stem for path in root.glob("*") if path.suffix in suffixes}))
    raise UserError(f"builtin:{name}: not in {package}, wanted one of {known or '(no images there)'}")


def decode(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an image file to (H, W, 3) uint8 RGB; raises BadImage with the reason.

    The size is read from the header first: more than `max_pixels` pixels are refused before any is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb and EXIF warnings; max_pixels decides here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BadImage(f"too many pixels: {image.width}x{image.height}, at most {max_pixels}")
                image.load()
                return to_rgb(image)
    except Image.DecompressionBombError:
        raise BadImage(f"too many pixels, at most {max_pixels}") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, struct.error, zlib.error) as error:
        kind = "not an image" if isinstance(error, Image.UnidentifiedImageError) else "unreadable"
        detail = "no PNG, JPEG, WebP, TIFF or BMP" if kind == "not an image" else " ".join(str(error).split())
        raise BadImage(f"{kind}: {detail[:120]}") from None


def to_rgb(image: Image.Image) -> Pixels:
    """Apply the rule of the module to a Pillow image. Returns (H, W, 3) uint8 RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _reduce_16bit(np.asarray(image))
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _reduce_16bit(values: NDArray[np.generic]) -> Pixels:
    """Map greyscale (H, W) integers in [0, 65535] to 8 bit; other ranges have no stated meaning."""
    if not np.issubdtype(values.dtype, np.integer):
        raise BadImage("floating-point pixels: their range is not stated")
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise BadImage("32-bit pixels: their range is not stated")
    grey = ((wide * 2 + 257) // 514).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def area_downscale(array: Pixels, factor: int) -> Pixels:
    """Average blocks of `factor` x `factor` pixels of (H, W, 3) uint8; rows and columns that fill no block are cut."""
    if factor == 1:
        return array
    height, width = array.shape[0] // factor, array.shape[1] // factor
    blocks = array[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    area = factor * factor
    return ((blocks.sum(axis=(1, 3), dtype=np.uint32) * 2 + area) // (2 * area)).astype(np.uint8)


def crop_boxes(width: int, height: int, *, size: int, mode: CropMode, count: int, seed: int) -> list[tuple[int, int]]:
    """Return the (x, y) corners of at most `count` square crops of `size` pixels; none when the image is smaller.

    random: distinct uniform corners; grid: disjoint cells spread over the image, a seeded choice when there are more
    than `count`; center: one. Equal arguments give equal boxes.
    """
    free_x, free_y = width - size, height - size
    if free_x < 0 or free_y < 0:
        return []
    if mode == "center":
        return [(free_x // 2, free_y // 2)]
    rng = np.random.default_rng(seed)
    if mode == "random":
        places = (free_x + 1) * (free_y + 1)
        picked = rng.choice(places, size=min(count, places), replace=False)
        return [(int(place % (free_x + 1)), int(place // (free_x + 1))) for place in picked]
    cells = [(x, y) for y in _spread(free_y, height // size) for x in _spread(free_x, width // size)]
    if len(cells) <= count:
        return cells
    return [cells[index] for index in sorted(rng.choice(len(cells), size=count, replace=False))]


def _spread(free: int, cells: int) -> list[int]:
    """Return the starts of `cells` cells that share the free pixels evenly, from edge to edge."""
    if cells == 1:
        return [free // 2]
    return [index * free // (cells - 1) for index in range(cells)]
