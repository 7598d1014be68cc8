import json
import logging
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dp2osr import prompts, tables
from dp2osr.config import PromptSettings
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


def settings(source: str = "none", text: str = "", table: Path | str = "") -> PromptSettings:
    return PromptSettings(source=source, text=text, table=str(table))


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


def test_stage_needs_no_torch() -> None:
    code = "import sys, dp2osr.stages.prompt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
