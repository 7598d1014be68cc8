import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tiny_ram
import tiny_shards
from dp2osr import config, config_checks, prompts, tables
from dp2osr.errors import UserError
from dp2osr.stages import prompt as stage_prompt


def images(count: int = 3) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image_id": [f"{index:016x}-000" for index in range(count)],
            "photo_id": [f"{index:016x}" for index in range(count)],
            "source": [f"folder/{index}.png" for index in range(count)],
        }
    )
    for field in tables.IMAGES:
        if field.name not in frame.columns:
            frame[field.name] = "" if field.type == "string" else 0
    frame["status"] = "ok"
    return frame.astype({name: "int32" for name in ("width", "height", "crop_x", "crop_y", "crop_size", "shard")})


def settings(source: str = "none", text: str = "", table: Path | str = "") -> prompts.PromptJob:
    return prompts.PromptJob(source=source, text=text, table=str(table))


def test_no_prompt_and_fixed_text() -> None:
    assert prompts.assign(images(), settings(text="unused"))["prompt"].tolist() == ["", "", ""]
    assert prompts.assign(images(2), settings("text", "a cat"))["prompt"].tolist() == ["a cat", "a cat"]


@pytest.mark.parametrize("key", ["image_id", "photo_id", "source"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_table_by_each_key_and_format(tmp_path: Path, key: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    frame = images()
    table = pd.DataFrame({key: frame[key][:2], "prompt": ["sea, sand", "null"]})
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")) + "\n\n")
    else:
        table.to_csv(path, index=False)
    with caplog.at_level(logging.INFO):
        found = prompts.assign(frame, settings("table", table=path))
    assert found["prompt"].tolist() == ["sea, sand", "null", ""]
    assert found["status"].tolist() == ["ok", "ok", "missing"]
    assert f"keyed by {key}; 1 of 3 images have no prompt" in caplog.text


def test_empty_prompt_in_the_table_is_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"image_id,prompt\n{images().image_id[0]},\n")
    assert prompts.assign(images(1), settings("table", table=path))["status"].tolist() == ["ok"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "name,prompt\na,b\n", "no column image_id, photo_id, source; found name, prompt"),
        ("t.csv", "image_id,text\na,b\n", "column 'prompt' is missing"),
        ("t.csv", "", "no readable CSV"),
        ("t.jsonl", '{"image_id": 1\n', "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is no object"),
        ("t.jsonl", '{"image_id": "a", "prompt": 3}\n', "values that are no text"),
        ("t.csv", "image_id,prompt\na,b\na,c\n", "image_id 'a' has several prompts"),
        ("t.txt", "a", "found '.txt', wanted .parquet, .jsonl, .csv"),
        ("t.parquet", "a", "no readable parquet"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=r".*".join(part for part in [name, message])):
        prompts.assign(images(), settings("table", table=path))


def test_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: not found"):
        prompts.assign(images(), settings("table", table=tmp_path / "absent.csv"))


def test_stage_writes_the_shard_alone(tmp_path: Path) -> None:
    frame = images(4)
    frame["shard"] = pd.Series([0, 1, 1, -1], dtype="int32")
    frame.loc[2, "status"] = "rejected"
    tables.write(frame, tmp_path / "images.parquet", tables.IMAGES)
    config = settings("text", "x").model_dump_json()
    out = tmp_path / "prompts.parquet"
    stage_prompt.main(
        ["--images", str(tmp_path / "images.parquet"), "--shard", "1", "--config", config, "--prompts", str(out)]
    )
    assert tables.read(out, tables.PROMPTS)["group_id"].tolist() == [frame.image_id[1]]


class Sizes:
    """Says of an image how wide it is; of the smallest it says nothing."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def describe(self, images: Sequence[Any]) -> list[str]:
        self.batches.append(len(images))
        return [f"{image.shape[2]} px" if image.shape[2] > 4 else "" for image in images]


def test_images_are_described_in_batches_by_their_names() -> None:
    import torch

    frame, sizes = images(5), Sizes()
    pictures = {group: torch.zeros(3, 4, 4 + index) for index, group in enumerate(frame["image_id"])}
    shuffled = [("0" * 16 + "-001", torch.zeros(3, 4, 4)), *reversed(list(pictures.items()))]  # one is not in use
    found = prompts.describe(frame, shuffled, sizes, batch=2)
    assert found["group_id"].tolist() == frame["image_id"].tolist()
    assert found["prompt"].tolist() == ["", "5 px", "6 px", "7 px", "8 px"]
    assert found["status"].tolist() == ["empty", "ok", "ok", "ok", "ok"]
    assert sizes.batches == [2, 2, 1]
    with pytest.raises(UserError, match=f"no image {frame.image_id[4]}"):
        prompts.describe(frame, list(pictures.items())[:4], Sizes())


def run_stage(tmp_path: Path, frame: pd.DataFrame, job: prompts.PromptJob, *options: str) -> pd.DataFrame:
    """Run the stage on shard 0 of `frame` and read what it wrote."""
    tables.write(frame, tmp_path / "images.parquet", tables.IMAGES)
    out = tmp_path / "prompts.parquet"
    paths = ["--images", str(tmp_path / "images.parquet"), "--prompts", str(out), "--shard", "0"]
    stage_prompt.main([*paths, *options, "--config", job.model_dump_json(exclude_defaults=True)])
    return tables.read(out, tables.PROMPTS)


def tag_job(folder: Path, **changes: Any) -> prompts.PromptJob:
    files = {"thresholds": "", "threshold": 0.0} | tiny_ram.write(folder)
    return prompts.PromptJob(source="tags", tags=config.TagSettings(**{**files, **changes}))


def test_stage_tags_the_lr_images(tmp_path: Path) -> None:
    frame = images(3)
    lr = ["--lr", str(tiny_shards.write_lr(tmp_path / "lr.tar", frame["image_id"])), "--device", "cpu"]
    found = run_stage(tmp_path, frame, tag_job(tmp_path), *lr)
    assert found["prompt"].tolist() == ["bird, sea, stone wall, night, car"] * 3
    assert found["status"].tolist() == ["ok"] * 3
    (tmp_path / "thresholds.txt").write_text("1\n0\n1\n1.0\n0.0\n")
    found = run_stage(tmp_path, frame, tag_job(tmp_path, thresholds=str(tmp_path / "thresholds.txt")), *lr)
    assert found["prompt"].tolist() == ["sea, car"] * 3
    found = run_stage(tmp_path, frame, tag_job(tmp_path, threshold=1.0), *lr)
    assert found["prompt"].tolist() == [""] * 3
    assert found["status"].tolist() == ["empty"] * 3
    plain = run_stage(tmp_path, frame, tag_job(tmp_path, dape="", threshold=0.5), *lr)
    tuned = run_stage(tmp_path, frame, tag_job(tmp_path, threshold=0.5), *lr)
    assert plain["prompt"].tolist() != tuned["prompt"].tolist()


def test_an_empty_shard_loads_no_model(tmp_path: Path) -> None:
    frame = images(1)
    frame["shard"] = pd.Series([1], dtype="int32")
    job = prompts.PromptJob(source="caption", caption=config.CaptionSettings(model="absent", question="", max_tokens=3))
    assert run_stage(tmp_path, frame, job, "--lr", "absent.tar").empty


def test_lr_images_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lr: missing; prompts of source 'tags'"):
        run_stage(tmp_path, images(1), tag_job(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tag_list", "bird\n\nsea\n", "tag list .*tag_list.txt: line 2 is empty"),
        ("tag_list", "bird\nsea\n", "config: tags.tag_list: found 2 tags, wanted 5"),
        ("thresholds", "0.5\nhalf\n", "thresholds .*: line 2: found 'half', wanted a number in"),
        ("thresholds", "0.5\nnan\n", "line 2: found 'nan'"),
        ("thresholds", "0.5\n1.5\n", "line 2: found '1.5'"),
        ("thresholds", "0.5\n0.5\n", "found 2, wanted 5, one a tag"),
    ],
)
def test_wrong_lists_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    import torch

    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        prompts.load_describer(tag_job(tmp_path, **{name: str(tmp_path / f"{name}.txt")}), torch.device("cpu"))


def test_the_model_of_another_source_is_no_describer() -> None:
    import torch

    for job in (settings("text"), prompts.PromptJob(source="tags")):
        with pytest.raises(UserError, match="wanted tags or caption"):
            prompts.load_describer(job, torch.device("cpu"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"source": "tags"}, "datasets.train.prompt.tags.ram: found '', wanted RAM's weights"),
        ({"source": "tags", "tags": {"ram": "x"}}, "datasets.train.prompt.tags.tag_list: found '', wanted RAM's list"),
        ({"source": "caption"}, "datasets.train.prompt.caption.model: found '', wanted the folder of"),
        ({"source": "tags", "tags": {"treshold": 0.5}}, "datasets.train.prompt.tags.treshold: unknown key"),
        ({"source": "label"}, "datasets.train.prompt.source"),
    ],
)
def test_config_wants_the_models_of_a_source(prompt: dict[str, Any], message: str, config_dict: dict[str, Any]) -> None:
    config_dict["datasets"]["train"]["prompt"] = prompt
    with pytest.raises(UserError, match=message):
        config.load(config_dict)


def test_files_of_models_are_looked_for_before_a_workflow(config_dict: dict[str, Any], tmp_path: Path) -> None:
    tags = tiny_ram.write(tmp_path)
    config_dict["datasets"]["train"]["prompt"] = {"source": "tags", "tags": tags}
    config_checks.check_prompt_files(config.load(config_dict))
    for changes, message in (
        ({"dape": str(tmp_path / "absent.pth")}, r"prompt.tags.dape: '.*absent.pth' does not exist, wanted DAPE's"),
        ({"thresholds": "absent.txt"}, "prompt.tags.thresholds: 'absent.txt' does not exist"),
    ):
        config_dict["datasets"]["train"]["prompt"]["tags"] = tags | changes
        with pytest.raises(UserError, match=message):
            config_checks.check_prompt_files(config.load(config_dict))
    config_dict["datasets"]["train"]["prompt"]["tags"] = tags | {"dape": "hub:someone/weights/DAPE.pth"}
    config_checks.check_prompt_files(config.load(config_dict))  # the weights cache has checks of its own


def test_stage_needs_no_torch() -> None:
    code = "import sys, dp2osr.stages.prompt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
