"""The photographs of a benchmark, as its annotations name them."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dp2osr import images
from dp2osr.downstream import coco, icdar
from dp2osr.errors import UserError

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Photo:
    """A photograph: its file's name without suffix, its file, and the size that the annotations say, px."""

    name: str
    path: Path
    size: Size | None


def find(kind: str, folder: Path, annotations: Path, *, max_images: int) -> list[Photo]:
    """Return the photographs that the annotations name, sorted; the first `max_images` of them, 0 for all.

    Raises UserError where one is missing: a figure on half a benchmark is none of that benchmark.
    """
    sizes = {"detection": _detection, "segmentation": _segmentation, "text": _text}[kind](annotations)
    names = sorted(sizes)[: max_images or None]
    files = by_name(folder)
    if missing := [name for name in names if name not in files]:
        raise UserError(
            f"{annotations} names the photograph '{missing[0]}', which is not in {folder} "
            f"({len(missing)} of {len(names)} are not there)"
        )
    return [Photo(name, files[name], sizes[name]) for name in names]


def by_name(folder: Path) -> dict[str, Path]:
    """Return the image files directly in a folder by their names without suffix."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of photographs")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in images.SUFFIXES:
            if path.stem in found:
                raise UserError(f"{folder}: {found[path.stem].name} and {path.name} have one name, wanted one of them")
            found[path.stem] = path
    return found


def _detection(path: Path) -> dict[str, Size | None]:
    return {Path(image["file_name"]).stem: (image["width"], image["height"]) for image in coco.read(path)["images"]}


def _segmentation(folder: Path) -> dict[str, Size | None]:
    found: dict[str, Size | None] = {}
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path, formats=("PNG",)) as image:
                found[path.stem] = image.size
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"annotation {path}: no readable PNG ({error})") from None
    if not found:
        raise UserError(f"{folder}: no annotations, wanted a PNG of labels a photograph (ADE_val_00000001.png)")
    return found


def _text(folder: Path) -> dict[str, Size | None]:
    return {icdar.photo(path): None for path in icdar.files(folder)}
