import hashlib
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp2osr import images
from dp2osr.errors import UserError

MAX = 10**6
RAMP = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def file_of(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_are_read_exactly(image_format: str, options: dict[str, object]) -> None:
    data = file_of(Image.fromarray(RAMP), image_format, **options)
    assert np.array_equal(images.decode(data, max_pixels=MAX), RAMP)


def test_jpeg_and_cmyk_are_close() -> None:
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    for data in (file_of(flat, "JPEG", quality=95), file_of(flat.convert("CMYK"), "JPEG", quality=95)):
        decoded = images.decode(data, max_pixels=MAX).astype(int)
        assert decoded.shape == (16, 16, 3) and np.abs(decoded - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(orientation: int, turn: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(RAMP), "PNG", exif=exif)
    assert np.array_equal(images.decode(data, max_pixels=MAX), turn(RAMP))  # type: ignore[operator]


def test_grey_palette_and_bilevel() -> None:
    grey = np.array([[0, 7], [128, 255]], dtype=np.uint8)
    found = images.decode(file_of(Image.fromarray(grey)), max_pixels=MAX)
    assert np.array_equal(found, np.stack([grey] * 3, axis=2))
    palette = Image.fromarray(RAMP).quantize(16)
    found = images.decode(file_of(palette), max_pixels=MAX)
    assert np.array_equal(found, np.array(palette.convert("RGB")))
    found = images.decode(file_of(Image.fromarray(grey > 100)), max_pixels=MAX)
    assert found[:, :, 0].tolist() == [[0, 0], [255, 255]]


def test_alpha_is_composited_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    found = images.decode(file_of(Image.fromarray(rgba)), max_pixels=MAX)
    # 51/255 = 0.2: 0.2 * 200 + 0.8 * 255 = 244 and 0.8 * 255 = 204
    assert found[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    found = images.decode(file_of(palette, transparency=1), max_pixels=MAX)
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(image_format: str) -> None:
    deep = np.array([[0, 128, 129, 257, 65535, 32896]], dtype=np.uint16)
    found = images.decode(file_of(Image.fromarray(deep), image_format), max_pixels=MAX)
    assert found[0, :, 1].tolist() == [0, 0, 1, 1, 255, 128]


def test_float_pixels_are_refused() -> None:
    data = file_of(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(images.BadImage, match="floating-point"):
        images.decode(data, max_pixels=MAX)


def test_truncated_foreign_and_huge_files_are_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        data = file_of(Image.fromarray(noise), image_format)
        with pytest.raises(images.BadImage, match=r"unreadable|not an image"):
            images.decode(data[: len(data) // 2], max_pixels=MAX)
    for data in (b"", b"no image at all", file_of(Image.fromarray(RAMP), "GIF")):
        with pytest.raises(images.BadImage, match="not an image"):
            images.decode(data, max_pixels=MAX)
    with pytest.raises(images.BadImage, match="too many pixels: 64x64"):
        images.decode(file_of(Image.fromarray(noise)), max_pixels=64 * 64 - 1)


def test_bomb_is_refused_from_its_header() -> None:
    bomb = file_of(Image.new("1", (20000, 20000)))  # 50 kB of file, 1.2 GB of RGB
    with pytest.raises(images.BadImage, match="too many pixels"):
        images.decode(bomb, max_pixels=10**8)


def test_first_page_of_a_tiff() -> None:
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = file_of(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert images.decode(data, max_pixels=MAX)[0, 0].tolist() == [255, 0, 0]


def test_area_downscale_averages_blocks_and_rounds_half_up() -> None:
    array = np.zeros((3, 5, 3), dtype=np.uint8)
    array[:2, :2, 0] = [[1, 2], [3, 4]]  # mean 2.5
    array[:2, 2:4, 1] = 255
    assert images.area_downscale(array, 2)[0].tolist() == [[3, 0, 0], [0, 255, 0]]
    assert images.area_downscale(array, 1) is array


def test_crop_boxes() -> None:
    assert images.crop_boxes(9, 30, size=10, mode="grid", count=4, seed=0) == []
    assert images.crop_boxes(21, 14, size=10, mode="center", count=4, seed=0) == [(5, 2)]
    grid = images.crop_boxes(35, 21, size=10, mode="grid", count=99, seed=0)
    assert grid == [(x, y) for y in (0, 11) for x in (0, 12, 25)]
    some = images.crop_boxes(100, 100, size=10, mode="grid", count=7, seed=3)
    assert len(set(some)) == 7 and some == images.crop_boxes(100, 100, size=10, mode="grid", count=7, seed=3)
    drawn = images.crop_boxes(12, 11, size=10, mode="random", count=50, seed=1)
    assert sorted(drawn) == [(x, y) for x in range(3) for y in range(2)], "distinct, all places, never outside"
    assert images.crop_boxes(90, 90, size=10, mode="random", count=2, seed=1) != images.crop_boxes(
        90, 90, size=10, mode="random", count=2, seed=2
    )


def test_builtin_images() -> None:
    assert images.expand_builtin("dead-leaves/3..5") == [f"dead-leaves/{seed}" for seed in (3, 4, 5)]
    assert images.expand_builtin("skimage/coffee") == ["skimage/coffee"]
    for name, shape in (("skimage/camera", (512, 512)), ("matplotlib/grace_hopper", (600, 512))):
        assert images.decode(images.load_builtin(name), max_pixels=MAX).shape[:2] == shape
    assert images.decode(images.load_builtin("pyiqa/I03"), max_pixels=MAX).shape == (384, 512, 3)
    assert images.decode(images.load_builtin("dead-leaves/3"), max_pixels=MAX).shape == (192, 192, 3)


@pytest.mark.parametrize("name", ["skimage/nothing", "skimage/../setup", "nowhere/x", "dead-leaves/x", "coffee"])
def test_unknown_builtin_names_what_there_is(name: str) -> None:
    with pytest.raises(UserError, match=f"builtin:{name}: .*wanted"):
        images.load_builtin(name)
    with pytest.raises(UserError, match="empty range"):
        images.expand_builtin("dead-leaves/5..3")


def test_lookup_of_packages_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys; from dp2osr import images; images.load_builtin('pyiqa/I03'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_find_and_read_back(tmp_path: Path) -> None:
    photo, other = file_of(Image.fromarray(RAMP)), file_of(Image.fromarray(RAMP[::-1].copy()))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.PNG").write_bytes(photo)
    (tmp_path / "notes.txt").write_bytes(b"x" * 100)
    (tmp_path / "large.png").write_bytes(b"x" * 5000)
    write_tar(tmp_path / "s.tar", [("../k.png", photo), ("k.json", b"{}"), ("k.png", photo), ("k.png", other)])
    found = list(images.find(str(tmp_path), max_bytes=4000))
    names = [item.source.removeprefix(f"{tmp_path}/") for item in found]
    assert names == [
        "large.png", "notes.txt", "s.tar::../k.png", "s.tar::k.json", "s.tar::k.png", "s.tar::k.png", "sub/a.PNG",
    ]  # fmt: skip
    problems = [item.problem.split(":")[0] for item in found]
    assert problems == ["file too large", "no image suffix", "", "no image suffix", "", "", ""]
    assert [item.is_image for item in found].count(True) == 5
    with images.Sources() as sources:
        for item in found:
            if not item.problem:
                assert sources.read(item.source, hashlib.sha256(item.data).hexdigest()) == item.data
        with pytest.raises(UserError, match="changed after ingest"):
            sources.read(found[-1].source, "0" * 64)
        with pytest.raises(UserError, match="not found"):
            sources.read(str(tmp_path / "gone.png"), "0" * 64)
    assert [item.source for item in images.find(f"{tmp_path}/**/*.PNG", max_bytes=4000)] == [found[-1].source]


def test_entries_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for entry, reason in ((tmp_path / "empty", "no image"), (tmp_path / "gone", "not found")):
        with pytest.raises(UserError, match=f"{entry}: {reason}"):
            list(images.find(str(entry), max_bytes=MAX))


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_truncated_tar_is_named(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "cut.tar"
    write_tar(path, [(f"{n}.png", file_of(Image.fromarray(noise))) for n in range(2)])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
    path.write_bytes(path.read_bytes()[: int(end * keep)])
    with pytest.raises(UserError, match=r"cut\.tar: truncated"):
        list(images.find(str(path), max_bytes=MAX))
