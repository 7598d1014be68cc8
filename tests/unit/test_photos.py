"""Which photographs a benchmark has, as its annotations name them."""

from pathlib import Path

import pytest
from PIL import Image

import tiny_benchmarks as tiny
from dp2osr.downstream import photos
from dp2osr.errors import UserError


def names(kind: str, images: Path, annotations: Path, max_images: int = 0) -> list[str]:
    return [photo.name for photo in photos.find(kind, images, annotations, max_images=max_images)]


def test_annotations_name_the_photographs(tmp_path: Path) -> None:
    found = photos.find("detection", *tiny.coco(tmp_path / "coco"), max_images=2)
    assert [(photo.name, photo.size) for photo in found] == [(f"{n:012d}", tiny.SIZE) for n in (1, 2)]
    found = photos.find("segmentation", *tiny.ade(tmp_path / "ade"), max_images=0)
    assert [photo.path.name for photo in found] == [f"ADE_val_{n:08d}.jpg" for n in (1, 2, 3)]
    assert found[0].size == tiny.SIZE
    images, annotations = tiny.icdar(tmp_path / "icdar")
    tiny.photo(images / "img_99.png")  # one that the annotations do not name
    assert names("text", images, annotations) == ["img_1", "img_2", "img_3"]


@pytest.mark.parametrize("kind", ["detection", "segmentation", "text"])
def test_a_missing_photograph_is_named(tmp_path: Path, kind: str) -> None:
    images, annotations = {"detection": tiny.coco, "segmentation": tiny.ade, "text": tiny.icdar}[kind](tmp_path)
    sorted(images.iterdir())[1].unlink()
    with pytest.raises(UserError, match=r"names the photograph '.*2', which is not in .*\(1 of 3 are not there\)"):
        names(kind, images, annotations)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    images, annotations = tiny.icdar(tmp_path)
    Image.new("RGB", (9, 9)).save(images / "img_1.jpg")
    with pytest.raises(UserError, match=r"img_1\.jpg and img_1\.png have one name"):
        names("text", images, annotations)


@pytest.mark.parametrize(("kind", "message"), [("segmentation", "a PNG of labels"), ("text", r"gt_img_1\.txt")])
def test_no_annotations(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=f"no annotations, wanted .*{message}"):
        names(kind, tmp_path, tmp_path)
