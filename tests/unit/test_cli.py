import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import tiny_shards
from dp2osr import cli


def save(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def config_file(tmp_path: Path, config_dict: dict[str, Any], tiny_model: Path) -> Path:
    settings = tiny_shards.policy(config_dict, tiny_model)
    config_dict["policies"]["base"] = settings.model_dump()
    config_dict["results"] = str(tmp_path / "results")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


def test_version_and_help_are_quick_to_load() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dp2osr.cli", "--version"], capture_output=True, text=True, timeout=60
    )
    assert found.stdout.startswith("dp2osr 0.")
    code = "import sys, dp2osr.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_upscale_writes_a_lossless_image(tmp_path: Path, config_file: Path) -> None:
    source = save(tmp_path / "in.png")
    arguments = ["upscale", str(source), "--config", str(config_file), "--device", "cpu", "--seed", "3"]
    cli.main([*arguments, "-o", str(tmp_path / "a.png")])
    cli.main([*arguments, "-o", str(tmp_path / "folder")])
    assert Image.open(tmp_path / "a.png").size == (28, 36)
    assert (tmp_path / "folder" / "in.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_all_candidates_are_written_where_no_metric_chooses(tmp_path: Path, config_file: Path) -> None:
    source = save(tmp_path / "in.png")
    arguments = ["upscale", str(source), "--config", str(config_file), "--device", "cpu", "-o", str(tmp_path / "out")]
    cli.main([*arguments, "--candidates", "2"])
    first, second = sorted((tmp_path / "out").iterdir())
    assert (first.name, second.name) == ("in-0000.png", "in-0001.png")
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--best-of", "psnr"], "wanted a no-reference metric"),
        (["--best-of", "niqe"], "niqe.mat not found"),
        (["--config", "absent.yaml"], "config file absent.yaml: not found"),
        (["--policy", "absent"], "model absent: not found"),
        (["--model", "absent"], "model absent: not found"),
        (["-o", "{tmp}/in.png"], "is an input"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    source = save(tmp_path / "in.png")
    arguments = ["upscale", str(source), "--config", str(config_file), "-o", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, *(part.format(tmp=tmp_path) for part in change)])
    assert stopped.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_missing_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["upscale", str(tmp_path / "absent.png"), "-o", str(tmp_path / "out")])
    assert "absent.png: not found" in capsys.readouterr().err


def test_show_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp2osr.show")
    import pandas as pd

    from dp2osr import tables

    frame = pd.DataFrame({"group_id": ["a", "b"], "prompt": ["x", ""], "status": ["ok", "missing"]})
    tables.write(frame, tmp_path / "prompts.parquet", tables.PROMPTS)
    cli.main(["show", str(tmp_path / "prompts.parquet")])
    assert "prompt" in capsys.readouterr().out


def test_best_of_a_real_metric(tmp_path: Path, config_file: Path) -> None:
    source = save(tmp_path / "in.png")
    arguments = ["upscale", str(source), "--config", str(config_file), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    cli.main([*arguments, "--candidates", "2", "--best-of", "entropy"])
    assert Image.open(tmp_path / "a.png").size == (28, 36)
