"""The LR files that a data set is given beside its HR files: which of them belongs to which, by name."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dp2osr import images


def pair_name(source: str, endings: Iterable[str]) -> str:
    """Return the name that both files of a pair have: the stem, less the longest of `endings` that it ends with."""
    stem = Path(source.rpartition(images.IN_TAR)[2]).stem
    fitting = [ending for ending in endings if ending and stem.endswith(ending) and stem != ending]
    return stem.removesuffix(max(fitting, key=len, default=""))


@dataclass(frozen=True)
class LrFile:
    """An LR file without its bytes; `found` says what is wrong with it, `sha256` is empty where it was not read.

    copies: the folder with the copies of sources that are addresses (remote.py).
    """

    found: images.Found
    sha256: str
    copies: Path | None = None


@dataclass
class Partners:
    """LR files by pair name. `spare` holds those that no HR file can get, each with the reason."""

    endings: Sequence[str]
    waiting: dict[str, LrFile] = field(default_factory=dict)
    spare: list[tuple[LrFile, str]] = field(default_factory=list)

    @classmethod
    def find(
        cls, entries: Iterable[str], endings: Sequence[str], *, max_bytes: int, copies: Path | None = None
    ) -> "Partners":
        """List the LR files of all entries; their bytes are read once for the hash and not kept."""
        partners = cls(endings)
        for entry in entries:
            for item in images.find(entry, max_bytes=max_bytes, copies=copies):
                sha256 = "" if item.problem else hashlib.sha256(item.data).hexdigest()
                partners._add(LrFile(images.Found(item.source, b"", item.problem, item.is_image), sha256, copies))
        return partners

    def _add(self, file: LrFile) -> None:
        name = pair_name(file.found.source, self.endings)
        if not file.found.is_image:
            self.spare.append((file, file.found.problem))
        elif name in self.waiting:
            self.spare.append((file, f"same pair name '{name}' as {self.waiting[name].found.source}"))
        else:
            self.waiting[name] = file

    def take(self, hr_source: str) -> LrFile | None:
        """Return the partner of an HR file, which no other gets then; None where there is none."""
        return self.waiting.pop(pair_name(hr_source, self.endings), None)

    def left(self) -> Iterator[tuple[LrFile, str]]:
        """Yield the LR files that no HR file took, each with the reason."""
        yield from self.spare
        for name, file in self.waiting.items():
            yield file, f"no HR file of the pair name '{name}'"


def misfit(hr: images.Pixels, lr: images.Pixels, scale: int) -> str:
    """Return why an LR image is not `scale` times as small as its HR image; empty where it is.

    Up to scale - 1 rows and columns that HR has beyond are no misfit: they are cut at the bottom and at the right.
    """
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    if lr.shape[:2] == (height, width):
        return ""
    found = f"HR {hr.shape[1]}x{hr.shape[0]}, LR {lr.shape[1]}x{lr.shape[0]}"
    return f"wrong scale: {found}, wanted LR {width}x{height} (scale {scale})"
