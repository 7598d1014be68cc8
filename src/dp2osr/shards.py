"""WebDataset shards: plain tar files of samples, byte-identical for identical content.

A sample is a key and its fields; its members are `key.field`. Keys hold no dot and no slash, so that any
WebDataset reader finds the same samples. Only fields that this project wrote are decoded.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dp2osr.errors import UserError
from dp2osr.resume import atomic

Sample = tuple[str, dict[str, bytes]]

_MEMBER = re.compile(r"([A-Za-z0-9_-]+)\.([a-z0-9.]+)")


def write_shard(path: Path | str, samples: Iterable[Sample]) -> None:
    """Write samples in the given order; members carry no time, owner or mode of this machine."""
    with atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in samples:
            for field, data in fields.items():
                name = f"{key}.{field}"
                if not _MEMBER.fullmatch(name):
                    raise ValueError(f"shard {path}: member name {name!r}, wanted letters, digits, '_' and '-'")
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def read_shard(path: Path | str) -> Iterator[Sample]:
    """Yield the samples in order. Raises UserError naming the file when it is truncated or holds foreign names."""
    key, fields = "", dict[str, bytes]()
    try:
        with tarfile.open(path) as tar:
            end = 0
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                handle = tar.extractfile(member) if member.isfile() else None
                if match is None or handle is None:
                    raise UserError(f"shard {path}: unexpected member {member.name!r}")
                if match[1] != key and fields:
                    yield key, fields
                    fields = {}
                key = match[1]
                fields[match[2]] = handle.read()
                end = member.offset_data + member.size
            _check_end(path, end)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {path}: truncated or damaged ({error}); delete it and run again") from None
    if fields:
        yield key, fields


def count_samples(path: Path | str) -> int:
    """Return the number of samples, from the members' headers alone. Raises UserError where the file is truncated."""
    try:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        _check_end(path, max((member.offset_data + member.size for member in members), default=0))
        return len({member.name.partition(".")[0] for member in members})
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {path}: truncated or damaged ({error}); delete it and run again") from None


def _check_end(path: Path | str, end: int) -> None:
    """A tar that was cut between two members reads without an error: the two zero blocks at its end are missing."""
    with Path(path).open("rb") as handle:
        handle.seek((end + 511) // 512 * 512)
        if handle.read(1024) != bytes(1024):
            raise UserError(f"shard {path}: truncated (no end-of-archive mark); delete it and run again")


def encode_image(image: torch.Tensor, image_format: str = "png") -> bytes:
    """Encode (3, H, W) RGB in [0, 1] without loss after rounding to 8 bit; `image_format` is png or webp."""
    return encode_array(to_uint8(image), image_format)


def encode_array(array: np.ndarray, image_format: str = "png") -> bytes:
    """Encode (H, W, 3) uint8 RGB without loss; `image_format` is png or webp."""
    buffer = io.BytesIO()
    options = {"compress_level": 1} if image_format == "png" else {"lossless": True, "quality": 0, "method": 0}
    Image.fromarray(array).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Return (3, H, W) in [0, 1] as (H, W, 3) uint8, rounded and clamped."""
    return image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def decode_image(data: bytes) -> torch.Tensor:
    """Decode bytes that `encode_image` wrote to (3, H, W) float32 RGB in [0, 1]."""
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float().div(255)
