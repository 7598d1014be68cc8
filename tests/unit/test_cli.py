import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_shards
from dp2osr import cli
from dp2osr.errors import UserError


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


def test_export_writes_a_bare_state_dict(tiny_model: Path, tmp_path: Path) -> None:
    cli.dispatch(
        ["export", str(tiny_model / "controlnet"), "-o", str(tmp_path / "model.safetensors"), "--dtype", "float16"]
    )
    found = load_file(tmp_path / "model.safetensors")
    wanted = load_file(tiny_model / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value.half()) for name, value in wanted.items())


def test_export_refuses_what_it_cannot_write(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    for policy, target, message in (
        (tmp_path, out, "no diffusion_pytorch_model.safetensors in it"),
        (tiny_model / "controlnet", tmp_path / "model.bin", "found '.bin', wanted a .safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            cli.dispatch(["export", str(policy), "-o", str(target)])
    save_file({"weight": torch.full((2,), 1e9)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="'weight' holds no finite numbers as float16; choose another --dtype"):
        cli.dispatch(["export", str(tmp_path), "-o", str(out), "--dtype", "float16"])
    assert not out.exists()
