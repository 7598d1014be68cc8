"""The catalogue of test sets, on small folders in the layouts that it names, by the command that a user runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dp2osr import cli, config, published, testsets
from dp2osr.errors import UserError

SMALL = {"RealSR": (3, (512, 512)), "RealLQ250": (2, (256, 256)), "RealSet65": (2, None), "DIV2K-val": (2, None)}


def write(path: Path, seed: int, width: int, height: int) -> None:
    """Write a picture of blocks of 16 px, which is small as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    Image.fromarray(np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8))).save(path, compress_level=1)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Want few images of each set, and stand where the config is."""
    monkeypatch.chdir(root)
    for name, (count, _) in SMALL.items():
        entry = replace(testsets.TESTSETS[name], num_images=count)
        monkeypatch.setitem(testsets.TESTSETS, name, entry)


@pytest.fixture
def realsr(tmp_path: Path) -> Path:
    """Return a folder in the layout of RealSR's crops, with three pairs."""
    for number in range(3):
        write(tmp_path / "RealSRVal_crop128" / "test_HR" / f"Nikon_00{number}_HR.png", number, 512, 512)
        write(tmp_path / "RealSRVal_crop128" / "test_LR" / f"Nikon_00{number}_LR4.png", 10 + number, 128, 128)
    (tmp_path / "RealSRVal_crop128" / "test_HR" / "readme.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Return a function that runs `dp2osr datasets NAME --path FOLDER`: its output, and its error or nothing."""

    def run(name: str, folder: Path) -> tuple[str, str]:
        error = ""
        try:
            cli.dispatch(["datasets", name, "--path", str(folder)])
        except UserError as found:
            error = str(found)
        return capsys.readouterr().out, error

    return run


def test_the_right_folder_gives_a_config_that_names_it(
    realsr: Path, tmp_path: Path, check: Callable[..., tuple[str, str]]
) -> None:
    told, error = check("RealSR", realsr)
    assert error == "" and "#" not in told
    (tmp_path / "mine.yaml").write_text(told)
    loaded = config.read("config/config.yaml", "config/c-sd2.yaml", tmp_path / "mine.yaml")
    dataset = loaded.datasets["RealSR"]
    assert dataset.lr.source == "given" and dataset.hr_size == 512 and dataset.crop == "center"
    assert dataset.images == [f"{realsr}/RealSRVal_crop128/test_HR"] and loaded.runs["default"].tests == ["RealSR"]
    assert loaded.report.published.datasets == {"RealSR": "RealSR"}
    assert dataset.prompt.source == "tags"  # what an overlay before it sets stays


def test_every_fault_is_a_line_and_an_error(realsr: Path, check: Callable[..., tuple[str, str]]) -> None:
    hr, lr = (realsr / "RealSRVal_crop128" / side for side in ("test_HR", "test_LR"))
    (hr / "Nikon_000_HR.png").write_bytes((hr / "Nikon_000_HR.png").read_bytes()[:500])
    write(lr / "Nikon_001_LR4.png", 11, 144, 128)
    write(hr / "Canon_000_HR.png", 5, 512, 512)
    write(lr / "Canon_009_LR4.png", 6, 128, 128)
    write(hr / "big_HR.png", 7, 1024, 512)
    write(lr / "big_LR4.png", 8, 256, 128)
    told, error = check("RealSR", realsr)
    lines = [line.removeprefix("# ").replace(f"{realsr}/RealSRVal_crop128/", "") for line in told.splitlines()]
    lines = lines[: lines.index("datasets:")]
    assert error.endswith("differs from RealSR of the catalogue in 8 points (listed)")
    assert sorted(lines)[0] == "2 images can be used, wanted 3"
    assert lines[-1] == "test_HR/big_HR.png: HR is 1024x512, wanted 512x512"
    assert sum(line.startswith("test_HR/Nikon_000_HR.png: unreadable") for line in lines) == 1
    assert "test_LR/Nikon_000_LR4.png: its HR file test_HR/Nikon_000_HR.png is not used" in [
        line.replace(f"{realsr}/RealSRVal_crop128/", "") for line in lines
    ]
    assert "test_HR/Nikon_001_HR.png: wrong scale: HR 512x512, LR 144x128, wanted LR 128x128 (scale 4)" in lines
    assert "test_HR/Canon_000_HR.png: no LR file of its pair name" in lines
    assert "test_LR/Canon_009_LR4.png: no HR file of the pair name 'Canon_009'" in lines
    assert yaml.safe_load(told)["datasets"].keys() == {"RealSR"}, "the findings are comments of the YAML"


def test_duplicates_and_sizes_of_lr_alone(tmp_path: Path, check: Callable[..., tuple[str, str]]) -> None:
    write(tmp_path / "lq" / "1.png", 1, 256, 256)
    write(tmp_path / "lq" / "2.png", 2, 256, 240)
    (tmp_path / "lq" / "3.png").write_bytes((tmp_path / "lq" / "1.png").read_bytes())
    told, error = check("RealLQ250", tmp_path)
    lq = f"{tmp_path}/lq"
    wanted = [f"# {lq}/3.png: same bytes as {lq}/1.png", f"# {lq}/2.png: LR is 256x240, wanted 256x256"]
    assert told.splitlines()[:2] == wanted and "in 2 points" in error


def test_images_of_any_size_and_kind(tmp_path: Path, check: Callable[..., tuple[str, str]]) -> None:
    """A 16-bit grey and an image with alpha are read by the rule of images.py."""
    (tmp_path / "RealSet65").mkdir()
    grey = np.arange(48 * 33, dtype=np.uint16).reshape(33, 48) * 40
    Image.fromarray(grey).save(tmp_path / "RealSet65" / "grey.png")
    Image.new("RGBA", (20, 31), (10, 200, 30, 128)).save(tmp_path / "RealSet65" / "alpha.png")
    assert check("RealSet65", tmp_path)[1] == ""


def test_hr_smaller_than_the_crop(tmp_path: Path, check: Callable[..., tuple[str, str]]) -> None:
    write(tmp_path / "DIV2K_valid_HR" / "0801.png", 1, 528, 512)
    write(tmp_path / "DIV2K_valid_HR" / "0802.png", 2, 528, 496)
    told, error = check("DIV2K-val", tmp_path)
    assert "0802.png: too small: 528x496, wanted at least 512 px" in told and "in 2 points" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RealSr"], "test set 'RealSr': unknown, wanted one of RealSR, DRealSR"),
        (["RealSR", "--path", "gone"], "gone: no such folder"),
        (["RealSR", "--path", "config"], "config: no folder of RealSR in it, wanted RealSRVal_crop128/test_HR and "),
        (["--path", "config"], "wanted the name of a test set before it"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as found:
        cli.dispatch(["datasets", *argv])
    assert message in str(found.value)


def test_listing_and_details_name_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    cli.dispatch(["datasets"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(testsets.TESTSETS)
    for name, entry in testsets.TESTSETS.items():
        assert entry.name == name and entry.paper and entry.licence and entry.home and entry.evaluated
        assert (entry.source == "given") == all(layout.lr for layout in entry.layouts)
        assert all(text in testsets.details(entry) for text in (entry.paper, entry.licence, entry.evaluated))


def test_overlay_in_config_is_the_catalogue(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the true numbers of images
    places = {name: (Path("datasets") / name, entry.layouts[-1]) for name, entry in testsets.TESTSETS.items()}
    found = yaml.safe_load((root / "config" / "testsets.yaml").read_text())
    assert found == testsets.overlay(places, tests=testsets.TESTED)


@pytest.mark.parametrize("model", ["c-sd2", "c-flux"])
def test_overlay_stands_on_the_models(root: Path, model: str) -> None:
    loaded = config.read(*(root / "config" / f"{name}.yaml" for name in ("config", model, "testsets")))
    assert loaded.runs["default"].tests == list(testsets.TESTED)
    assert loaded.datasets["RealLQ250"].prompt.source == "tags" and loaded.datasets["train"].crop == "random"
    there = loaded.report.published
    assert there.datasets == {"RealSR": "RealSR"} and there.policies["base"] == model.upper()
    assert published.means("RealSR", there.policies["default"])["lpips"].value in (0.4045, 0.4024)
