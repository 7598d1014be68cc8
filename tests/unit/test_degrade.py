import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dp2osr import seeds, shards, tables
from dp2osr.errors import UserError
from dp2osr.stages import degrade
from dp2osr.strict import parse

SIZE = 32


@pytest.fixture
def job(config_dict: dict[str, Any]) -> degrade.DegradeJob:
    degradation = config_dict["dataset_defaults"]["degradation"]
    degradation["first"]["blur"]["size"], degradation["final"]["sinc_size"] = [3, 7], [3, 3]
    settings = {"downscale": 2, "max_pixels": 10**6, "degradation": degradation, "seed": 7}
    return parse(degrade.DegradeJob, settings)


def table_of(folder: Path, num_shards: int) -> pd.DataFrame:
    """Write three photographs of 128 px and return their table: two crops each."""
    import hashlib

    rows = []
    for number in range(3):
        path = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for crop in range(2):
            row = {"image_id": f"{sha256[:16]}-{crop:03d}", "photo_id": sha256[:16], "source": str(path)}
            row |= {"sha256": sha256, "width": 128, "height": 128, "crop_x": 3 * crop, "crop_y": 5, "crop_size": SIZE}
            rows.append(row | {"split": "train", "shard": len(rows) * num_shards // 6, "status": "ok", "reason": ""})
    rows.append(rows[0] | {"image_id": "x-bad", "status": "rejected", "shard": -1, "source": "gone"})
    return pd.DataFrame(rows)


def run(folder: Path, table: pd.DataFrame, job: degrade.DegradeJob, shard: int) -> dict[str, dict[str, bytes]]:
    tables.write(table, folder / "images.parquet", tables.IMAGES)
    out = folder / f"shard-{shard}.tar"
    options = ["--images", str(folder / "images.parquet"), "--shard", str(shard), "--device", "cpu", "--lr", str(out)]
    degrade.main([*options, "--config", job.model_dump_json()])
    return dict(shards.read_shard(out))


def test_sample_holds_hr_lr_and_how_it_was_made(tmp_path: Path, job: degrade.DegradeJob) -> None:
    found = run(tmp_path, table_of(tmp_path, 1), job, 0)
    assert list(found) == sorted(found) and len(found) == 6
    for image_id, fields in found.items():
        notes = json.loads(fields["json"])
        assert notes["photo_id"] == image_id[:16] and notes["seed"] == seeds.derive(7, "degrade", image_id)
        hr, lr = shards.decode_image(fields["hr.png"]), shards.decode_image(fields["lr.png"])
        assert hr.shape == (3, SIZE, SIZE) and lr.shape == (3, SIZE // 4, SIZE // 4)
        x, y, size = notes["crop"]
        photo = np.asarray(Image.open(notes["source"])).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        expected = np.floor(photo[y : y + size, x : x + size] + 0.5)  # halves are rounded up
        assert np.array_equal(shards.to_uint8(hr), expected), "HR is the crop after downscaling, without loss"
        from dp2osr.degradation import pipeline

        assert torch.equal(pipeline.apply(hr[None], [notes["degradation"]])[0], lr), "the notes remake the LR image"


def test_one_shard_equals_three_and_batches_do_not_matter(
    tmp_path: Path, job: degrade.DegradeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(tmp_path, table_of(tmp_path, 1), job, 0)
    again = (tmp_path / "shard-0.tar").read_bytes()
    assert run(tmp_path, table_of(tmp_path, 1), job, 0) == one and (tmp_path / "shard-0.tar").read_bytes() == again
    monkeypatch.setattr(degrade, "BATCH_SIZE", 1)
    three: dict[str, dict[str, bytes]] = {}
    for shard in range(3):
        three |= run(tmp_path, table_of(tmp_path, 3), job, shard)
    assert three == one


def test_changed_or_missing_source_is_an_error(tmp_path: Path, job: degrade.DegradeJob) -> None:
    table = table_of(tmp_path, 1)
    Image.new("RGB", (128, 128)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png: the file changed after ingest"):
        run(tmp_path, table, job, 0)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png: not found"):
        run(tmp_path, table, job, 0)
    assert not (tmp_path / "shard-0.tar").exists(), "no half-written shard stands"


def test_crop_outside_the_photograph_is_an_error(tmp_path: Path, job: degrade.DegradeJob) -> None:
    table = table_of(tmp_path, 1)
    table["crop_x"] = 60
    with pytest.raises(UserError, match="does not fit; run ingest again"):
        run(tmp_path, table, job, 0)
