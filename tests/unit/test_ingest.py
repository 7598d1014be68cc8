import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dp2osr import tables
from dp2osr.errors import UserError
from dp2osr.stages import ingest
from dp2osr.strict import parse


def job(*entries: object, **changes: Any) -> ingest.IngestJob:
    settings = {
        "images": [str(entry) for entry in entries],
        "split": "train",
        "hr_size": 16,
        "crop": "grid",
        "crops_per_image": 4,
        "downscale": 1,
        "min_std": 0.01,
        "max_pixels": 10_000,
        "max_rejected_share": 1.0,
        "num_shards": 1,
        "seed": 0,
    }
    return parse(ingest.IngestJob, settings | changes)


def photo(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one file of each fate."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    photo(0).save(root / "a.png")
    shutil.copy(root / "a.png", root / "sub" / "copy.png")
    photo(1).save(root / "sub" / "b.tif")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:900])
    shutil.copy(root / "cut.png", root / "cut2.png")
    Image.new("1", (400, 400)).save(root / "bomb.png")
    photo(2, 15, 40).save(root / "tiny.webp", lossless=True)
    Image.new("RGB", (16, 16), "grey").save(root / "flat.bmp")
    (root / "notes.txt").write_text("not an image")
    return root


def test_every_file_is_a_row_with_its_fate(folder: Path) -> None:
    table = ingest.ingest(job(folder))
    fate = {
        Path(source).name: (status, reason.split(":")[0].split(" as ")[0])
        for source, status, reason in zip(table["source"], table["status"], table["reason"], strict=True)
    }
    assert fate == {
        "a.png": ("ok", ""),
        "copy.png": ("duplicate", "same bytes"),
        "b.tif": ("ok", ""),
        "cut.png": ("rejected", "unreadable"),
        "cut2.png": ("duplicate", "same bytes"),
        "bomb.png": ("rejected", "too many pixels"),
        "tiny.webp": ("rejected", "too small"),
        "flat.bmp": ("rejected", "flat"),
        "notes.txt": ("rejected", "no image suffix"),
    }
    assert table["image_id"].is_unique
    assert (table["shard"] == -1).sum() == (table["status"] != "ok").sum()
    ok = table[table["status"] == "ok"]
    assert len(ok) == 8 and (ok["crop_size"] == 16).all()
    assert ok["image_id"].tolist()[:2] == [f"{ok['sha256'].iloc[0][:16]}-{n:03d}" for n in (0, 1)]
    assert (ok["width"] == 40).all() and (ok["height"] == 32).all()


def test_table_fits_its_schema_and_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "images.parquet"
    ingest.main(["--config", job(folder).model_dump_json(), "--images", str(out)])
    found = tables.read(out, tables.IMAGES)
    assert len(found) == len(ingest.ingest(job(folder)))
    first = out.read_bytes()
    ingest.main(["--config", job(folder).model_dump_json(), "--images", str(out)])
    assert out.read_bytes() == first


def test_ids_and_crops_stay_when_the_folder_moves(folder: Path, tmp_path: Path) -> None:
    before = ingest.ingest(job(folder, crop="random"))
    moved = folder.rename(tmp_path / "elsewhere")
    after = ingest.ingest(job(moved, crop="random"))
    used = before["sha256"] != ""
    columns = [name for name in before.columns if name not in ("source", "reason")]
    pd.testing.assert_frame_equal(before.loc[used, columns], after.loc[used, columns])


def test_crops_depend_on_the_seed_and_lie_inside(folder: Path) -> None:
    one, two = (ingest.ingest(job(folder, crop="random", seed=seed)) for seed in (0, 1))
    assert one["crop_x"].tolist() != two["crop_x"].tolist()
    ok = one[one["status"] == "ok"]
    assert (ok["crop_x"] + 16 <= ok["width"]).all() and (ok["crop_y"] + 16 <= ok["height"]).all()


def test_downscale_comes_before_the_crop(tmp_path: Path) -> None:
    photo(0, 64, 65).save(tmp_path / "a.png")
    photo(1, 31, 64).save(tmp_path / "b.png")
    table = ingest.ingest(job(tmp_path, downscale=2, max_rejected_share=0.5))
    ok = table[table["status"] == "ok"]
    assert sorted(zip(ok["crop_x"], ok["crop_y"], strict=True)) == [(0, 0), (0, 16), (16, 0), (16, 16)]
    assert table["reason"].iloc[-1] == "too small: 31x64, wanted at least 32 px (hr_size x downscale)"


def test_shards_are_contiguous_and_change_nothing_else(folder: Path) -> None:
    one, four = (ingest.ingest(job(folder, num_shards=count)) for count in (1, 4))
    pd.testing.assert_frame_equal(one.drop(columns="shard"), four.drop(columns="shard"))
    assert four.loc[four["status"] == "ok", "shard"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UserError, match="num_shards: found 9, wanted at most the 8 crops"):
        ingest.ingest(job(folder, num_shards=9))


def test_webdataset_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for seed in range(2):
            buffer = io.BytesIO()
            photo(seed).save(buffer, "PNG")
            for name, data in ((f"{seed}.png", buffer.getvalue()), (f"{seed}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = ingest.ingest(job(tmp_path / "s.tar", crop="center", max_rejected_share=0.0))
    ok = table[table["status"] == "ok"]
    assert [source.split("s.tar")[1] for source in ok["source"]] == ["::0.png", "::1.png"]
    assert (table["reason"] == "no image suffix: .json").sum() == 2, "side files are rows, and no rejected images"


def test_builtin_images_and_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0, 40, 20).save(tmp_path / "turned.jpg", exif=exif)
    table = ingest.ingest(
        job(tmp_path, "builtin:dead-leaves/1..2", "builtin:dead-leaves/2", crop="center", max_pixels=10**6)
    )
    assert table[["width", "height"]].iloc[0].tolist() == [20, 40]
    assert table["source"].tolist()[1:] == [f"builtin:dead-leaves/{seed}" for seed in (1, 2, 2)]
    assert table["status"].tolist() == ["ok", "ok", "ok", "duplicate"]


def test_too_many_rejected_files_stop_the_stage(folder: Path, tmp_path: Path) -> None:
    # a.png and b.tif are used; cut, bomb, tiny and flat are not; duplicates and notes.txt do not count
    with pytest.raises(UserError, match=r"67% of 6 files rejected, at most 50% wanted .* e\.g\. .*bomb\.png"):
        ingest.ingest(job(folder, max_rejected_share=0.5))
    ingest.ingest(job(folder, max_rejected_share=0.67))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match="100% of 1 files rejected"):
        ingest.ingest(job(tmp_path / "bad"))


def test_no_images_is_an_error_that_names_the_entry(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image there"):
        ingest.ingest(job(tmp_path / "empty"))
    with pytest.raises(UserError, match="gone: not found"):
        ingest.ingest(job(tmp_path / "gone"))
    with pytest.raises(UserError, match="found an empty list"):
        ingest.ingest(job())
