"""Given LR files: which HR file each belongs to, and what becomes of pairs that are none, from folder to shard."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dp2osr import shards, tables
from dp2osr.errors import UserError
from dp2osr.partners import misfit, pair_name
from dp2osr.stages import degrade, ingest
from dp2osr.strict import parse

ENDINGS = ["_HR", "_LR", "_LR4", "_x1", "_x4", "x4"]
LR, HR = 16, 64  # pixels of a whole LR and HR file; crops are 8 and 32


def pixels(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int, width: int, height: int | None = None) -> Path:
    Image.fromarray(pixels(seed, width, height or width)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with HR and LR: a good pair, and one of each fault."""
    for side in ("HR", "LR"):
        (tmp_path / side).mkdir()
    hr, lr = tmp_path / "HR", tmp_path / "LR"
    save(hr / "Canon_001_HR.png", 1, HR)
    save(lr / "Canon_001_LR4.png", 101, LR)
    save(hr / "0801.png", 2, HR + 3)  # three columns and rows more than 4 x LR: cut
    save(lr / "0801x4.png", 102, LR)
    save(hr / "scale_x1.png", 3, HR)
    save(lr / "scale_x4.png", 103, LR + 1)
    save(hr / "lonely.png", 4, HR)
    save(lr / "orphan.png", 105, LR)
    save(hr / "cut.png", 6, HR)
    save(lr / "cut.png", 106, LR)
    (lr / "cut.png").write_bytes((lr / "cut.png").read_bytes()[:300])
    shutil.copy(hr / "Canon_001_HR.png", hr / "twice.png")
    save(lr / "twice.png", 107, LR)
    save(lr / "Canon_001_LR.png", 108, LR)  # second file of the pair name Canon_001
    (lr / "notes.txt").write_text("no image")
    return tmp_path


def ingest_job(folder: Path, **changes: Any) -> ingest.IngestJob:
    settings = {
        "images": [str(folder / "HR")],
        "lr": {"source": "given", "images": [str(folder / "LR")], "endings": ENDINGS},
        "scale": 4,
        "split": "test",
        "hr_size": 32,
        "crop": "center",
        "crops_per_image": 1,
        "downscale": 1,
        "min_std": 0.0,
        "max_pixels": 10**6,
        "max_rejected_share": 1.0,
        "num_shards": 1,
        "seed": 0,
    }
    return parse(ingest.IngestJob, settings | changes)


def samples(folder: Path, table: pd.DataFrame, source: str, config_dict: dict[str, Any]) -> dict[str, dict[str, bytes]]:
    """Run the degrade stage on an ingested table."""
    tables.write(table, folder / "images.parquet", tables.IMAGES)
    degradation = config_dict["dataset_defaults"]["degradation"]
    job = {"source": source, "downscale": 1, "max_pixels": 10**6, "degradation": degradation, "seed": 0}
    argv = ["--images", f"{folder}/images.parquet", "--shard", "0", "--device", "cpu", "--lr", f"{folder}/0.tar"]
    degrade.main([*argv, "--config", json.dumps(job)])
    return dict(shards.read_shard(folder / "0.tar"))


def image(fields: dict[str, bytes], name: str) -> np.ndarray:
    return shards.to_uint8(shards.decode_image(fields[name]))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/Canon_001_HR.png", "Canon_001"),
        ("b/Canon_001_LR4.png", "Canon_001"),
        ("data.tar::lr/0801x4.png", "0801"),
        ("a/plain.jpg", "plain"),
        ("a/x4.png", "x4"),  # nothing would be left
    ],
)
def test_pair_name(source: str, name: str) -> None:
    assert pair_name(source, ENDINGS) == name


def test_misfit() -> None:
    assert misfit(pixels(0, 67, 64), pixels(0, 16, 16), 4) == ""
    assert misfit(pixels(0, 68, 64), pixels(0, 16, 16), 4) == (
        "wrong scale: HR 68x64, LR 16x16, wanted LR 17x16 (scale 4)"
    )


def test_every_file_of_both_folders_is_one_row_with_its_fate(folder: Path) -> None:
    table = ingest.ingest(ingest_job(folder))
    assert table["image_id"].is_unique and not table["source"].duplicated().any()
    names = table["source"].map(lambda source: "/".join(Path(source).parts[-2:]))
    fate = {name: (status, reason.replace(f"{folder}/", "")) for name, status, reason in zip(
        names, table["status"], table["reason"], strict=True
    )}  # fmt: skip
    assert fate == {
        "HR/Canon_001_HR.png": ("ok", ""),
        "LR/Canon_001_LR.png": ("partner", ""),
        "LR/Canon_001_LR4.png": ("rejected", "same pair name 'Canon_001' as LR/Canon_001_LR.png"),
        "HR/0801.png": ("ok", ""),
        "LR/0801x4.png": ("partner", ""),
        "HR/scale_x1.png": ("rejected", "wrong scale: HR 64x64, LR 17x17, wanted LR 16x16 (scale 4)"),
        "LR/scale_x4.png": ("rejected", "its HR file HR/scale_x1.png is not used"),
        "HR/lonely.png": ("rejected", "no LR file of its pair name"),
        "LR/orphan.png": ("rejected", "no HR file of the pair name 'orphan'"),
        "HR/cut.png": ("rejected", fate["HR/cut.png"][1]),
        "LR/cut.png": ("rejected", "its HR file HR/cut.png is not used"),
        "HR/twice.png": ("duplicate", "same bytes as HR/Canon_001_HR.png"),
        "LR/twice.png": ("rejected", "its HR file HR/twice.png is not used"),
        "LR/notes.txt": ("rejected", "no image suffix: .txt"),
    }
    assert fate["HR/cut.png"][1].startswith("its LR file LR/cut.png: unreadable")
    sizes = table.set_index(names)[["width", "height", "shard"]]
    assert sizes.loc["HR/0801.png"].tolist() == [67, 67, 0] and sizes.loc["LR/0801x4.png"].tolist() == [16, 16, -1]


def test_share_of_rejected_files_counts_a_pair_once(folder: Path) -> None:
    # used: Canon_001, 0801; not: scale, lonely, orphan, cut and the second LR file of Canon_001, which is its own
    with pytest.raises(UserError, match="71% of 7 files rejected, at most 50% wanted"):
        ingest.ingest(ingest_job(folder, max_rejected_share=0.5))


@pytest.mark.parametrize("crop", ["center", "random", "grid", "full"])
def test_pairs_are_taken_as_they_are(folder: Path, crop: str, config_dict: dict[str, Any]) -> None:
    table = ingest.ingest(ingest_job(folder, crop=crop, crops_per_image=2))
    found = samples(folder, table, "given", config_dict)
    rows = table[table["status"] == "ok"].set_index("image_id")
    assert list(found) == rows.index.tolist() and len(found) == {"center": 2, "full": 2}.get(crop, 4)
    lr_seed = {"Canon_001_HR.png": 108, "0801.png": 102}
    for image_id, fields in found.items():
        notes, row = json.loads(fields["json"]), rows.loc[image_id]
        x, y, side = row["crop_x"], row["crop_y"], row["crop_size"] or HR
        assert x % 4 == y % 4 == 0, "both crops begin on whole LR pixels"
        hr = np.asarray(Image.open(row["source"]))[y : y + side, x : x + side]
        lr = pixels(lr_seed[Path(row["source"]).name], LR, LR)[y // 4 : (y + side) // 4, x // 4 : (x + side) // 4]
        assert np.array_equal(image(fields, "hr.png"), hr) and np.array_equal(image(fields, "lr.png"), lr)
        assert Path(notes["lr_source"]).parent.name == "LR" and notes["crop"] == [x, y, row["crop_size"]]


def test_center_crop_of_an_odd_number_of_free_lr_pixels(tmp_path: Path, config_dict: dict[str, Any]) -> None:
    """LR 13 px, crop 8: the LR crop begins at floor(5 / 2) = 2, the HR crop at 8."""
    for side, size, seed in (("HR", 52, 1), ("LR", 13, 2)):
        (tmp_path / side).mkdir()
        save(tmp_path / side / "a.png", seed, size)
    table = ingest.ingest(ingest_job(tmp_path))
    assert table.loc[0, ["crop_x", "crop_y", "crop_size"]].tolist() == [8, 8, 32]
    (fields,) = samples(tmp_path, table, "given", config_dict).values()
    assert np.array_equal(image(fields, "lr.png"), pixels(2, 13, 13)[2:10, 2:10])


@pytest.mark.parametrize(("crop", "sides"), [("center", (8, 8)), ("full", (16, 13))])
def test_lr_alone_makes_samples_without_hr(
    tmp_path: Path, crop: str, sides: tuple[int, int], config_dict: dict[str, Any]
) -> None:
    (tmp_path / "LR").mkdir()
    save(tmp_path / "LR" / "a.png", 1, 16, 13)
    Image.fromarray(pixels(2, 16, 13)[..., 0]).save(tmp_path / "LR" / "grey.png")
    save(tmp_path / "LR" / "tiny.png", 3, 7)
    job = ingest_job(tmp_path, images=[str(tmp_path / "LR")], crop=crop)
    job = job.model_copy(update={"lr": job.lr.model_copy(update={"source": "alone", "images": []})})
    table = ingest.ingest(job)
    reasons = dict(zip(table["source"].map(lambda source: Path(source).name), table["reason"], strict=True))
    wanted = "" if crop == "full" else "too small: 7x7, wanted at least 8 px (hr_size / scale)"
    assert reasons == {"a.png": "", "grey.png": "", "tiny.png": wanted}
    found = samples(tmp_path, table, "alone", config_dict)
    assert [set(fields) for fields in found.values()] == [{"lr.png", "json"}] * (3 if crop == "full" else 2)
    first = image(next(iter(found.values())), "lr.png")
    width, height = sides
    y, x = (2, 4) if crop == "center" else (0, 0)
    assert np.array_equal(first, pixels(1, 16, 13)[y : y + height, x : x + width])


def test_lr_file_that_changed_or_lost_its_row_is_an_error(folder: Path, config_dict: dict[str, Any]) -> None:
    table = ingest.ingest(ingest_job(folder))
    with pytest.raises(UserError, match="has no row of its LR file"):
        samples(folder, table[table["status"] == "ok"], "given", config_dict)
    save(folder / "LR" / "0801x4.png", 1, LR)
    with pytest.raises(UserError, match=r"0801x4\.png: the file changed after ingest"):
        samples(folder, table, "given", config_dict)
