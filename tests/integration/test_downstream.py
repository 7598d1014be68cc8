"""The stages of a downstream benchmark from their command lines, on the embedded model: from photographs to figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_benchmarks as tiny
from dp2osr import config, images, sampling, shards, tables
from dp2osr.errors import UserError
from dp2osr.stages import benchmark, downstream, predict, restore

SOURCES = ("hr", "lr", "base", "tuned")
CONTROL = "builtin:tiny-sd/controlnet"


@pytest.fixture
def settings(config_dict: dict[str, Any]) -> config.Config:
    """Return the defaults with two sampling steps."""
    config_dict["policy_defaults"]["sampling"]["steps"] = 2
    return config.load(config_dict)


class Task:
    """A benchmark in a folder, and its stages as the rules call them."""

    def __init__(self, folder: Path, kind: str, settings: config.Config, **options: Any) -> None:
        self.folder, self.kind, self.settings, self.options = folder, kind, settings, options
        write = {"detection": tiny.coco, "segmentation": tiny.ade, "text": tiny.icdar}[kind]
        self.images, self.annotations = write(folder / kind, count=2)
        self.model = {"detection": self._detector, "segmentation": tiny.segformer, "text": tiny.text_detector}[kind](
            folder / "model"
        )
        self.lr, self.degradation = folder / "lr.tar", settings.datasets["holdout"].degradation

    @staticmethod
    def _detector(folder: Path) -> Path:
        return tiny.yolos(folder, {row["id"]: row["name"] for row in tiny.coco_categories()} | {0: "N/A"})

    def files(self) -> list[str]:
        return ["--annotations", str(self.annotations)]

    def make_lr(self, *extra: str, **options: Any) -> None:
        job = {"kind": self.kind, "max_images": 0, "max_pixels": 10**6, "max_rejected_share": 0.0, "num_shards": 1}
        job |= {"degradation": self.degradation.model_dump(), "seed": 0, **options}
        arguments = ["--images", str(self.images), *self.files(), "--shard", "0000", "--lr", str(self.lr), *extra]
        benchmark.main([*arguments, "--device", "cpu", "--config", json.dumps(job)])

    def restore(self, name: str, seed: int, num_seeds: int = 1) -> Path:
        policy = self.settings.policies["base"].model_dump()
        job = {"policy": policy, "prompt": {"source": "none"}, "scale": 4, "tile": 0, "num_seeds": num_seeds}
        path = self.folder / f"{name}.tar"
        arguments = ["--lr", str(self.lr), "--control", CONTROL, "--restored", str(path), "--device", "cpu"]
        restore.main([*arguments, "--config", json.dumps(job | {"seed": seed})])
        return path

    def predict(self, name: str, source: Path, *extra: str) -> str:
        job = {"kind": self.kind, "architecture": "", "scale": 4, "max_pixels": 10**6}
        path = self.folder / f"{name}.parquet"
        arguments = ["--source", str(source), *self.files(), "--model", str(self.model), "--predictions", str(path)]
        predict.main([*arguments, *extra, "--device", "cpu", "--config", json.dumps(job)])
        return f"{name}={path}"

    def compare(self, *named: str) -> Any:
        job = {"kind": self.kind, "reference": "base", "bootstrap": 20, "confidence": 0.95, "seed": 0}
        path = self.folder / "figures.parquet"
        arguments = ["--predictions", *named, *self.files(), "--table", str(path)]
        downstream.main([*arguments, "--config", json.dumps(job)])
        assert path.with_suffix(".csv").read_text().startswith("source,statistic,value,")
        return tables.read(path, tables.DOWNSTREAM).set_index(["source", "statistic"])


@pytest.mark.parametrize(
    ("kind", "statistics"),
    [
        ("detection", {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}),
        ("segmentation", {"miou", "mean_accuracy", "pixel_accuracy"}),
        ("text", {"precision", "recall", "hmean"}),
    ],
)
def test_from_photographs_to_figures(tmp_path: Path, settings: config.Config, kind: str, statistics: set[str]) -> None:
    task = Task(tmp_path, kind, settings)
    task.make_lr()
    tuned, base = task.restore("tuned", 1), task.restore("base", 0, num_seeds=2 if kind == "segmentation" else 1)
    restored = shards.decode_image(dict(shards.read_shard(base))["000000-r0000"]["png"])
    assert restored.shape == (3, tiny.SIZE[1], tiny.SIZE[0])
    named = [task.predict("hr", task.lr, "--images", str(task.images)), task.predict("lr", task.lr)]
    named += [task.predict("base", base), task.predict("tuned", tuned)]
    found = task.compare(*named)
    assert set(found.index) == {(source, name) for source in SOURCES for name in statistics}
    assert (found["num_images"] == 2).all() and (found["num_rejected"] == 0).all()
    assert (found.loc["base"]["difference"].dropna() == 0).all()
    assert found.loc["base"]["num_seeds"].unique() == (2 if kind == "segmentation" else 1)
    known = found["value"].dropna()
    assert len(known) and known.between(0, 1).all()


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list that images go to instead of a model, which finds nothing in them."""
    seen: list[Any] = []
    spy = type("Spy", (), {"see": lambda self, image, _: seen.append(image) or "[]"})()
    monkeypatch.setattr("dp2osr.downstream.seers.load", lambda *_, **__: spy)
    return seen


def test_what_the_model_sees(
    tmp_path: Path, settings: config.Config, monkeypatch: pytest.MonkeyPatch, spied: list[Any]
) -> None:
    """HR cut to whole LR pixels, LR enlarged by bicubic: all sources have one size and their upper left corner."""
    monkeypatch.setattr(tiny, "SIZE", (95, 74))
    task = Task(tmp_path, "text", settings)
    task.make_lr()
    task.predict("hr", task.lr, "--images", str(task.images))
    task.predict("lr", task.lr)
    assert [image.shape for image in spied] == [(72, 92, 3)] * 4
    whole = images.decode((task.images / "img_1.png").read_bytes(), max_pixels=10**6)
    assert np.array_equal(spied[0], whole[:72, :92])
    lr = shards.decode_image(dict(shards.read_shard(task.lr))["000000"]["lr.png"])
    assert np.array_equal(spied[2], shards.to_uint8(sampling.images_control(lr[None], 4)[0]))


def test_a_killed_job_goes_on(tmp_path: Path, settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from dp2osr.upscale import Upscaler

    task = Task(tmp_path, "text", settings)
    task.make_lr()
    wanted = task.restore("once", 0, num_seeds=2).read_bytes()
    real, calls = Upscaler.restore, []

    def dying(self: Upscaler, lr: torch.Tensor, seed: int) -> torch.Tensor:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, lr, seed)

    monkeypatch.setattr(Upscaler, "restore", dying)
    with pytest.raises(KeyboardInterrupt):
        task.restore("killed", 0, num_seeds=2)
    assert not (tmp_path / "killed.tar").exists()
    assert task.restore("killed", 0, num_seeds=2).read_bytes() == wanted
    assert len(calls) == 5 and len(set(calls)) == 4  # of four restorations two were kept
    assert not (tmp_path / "killed.tar.parts").exists()


def test_a_photograph_that_cannot_be_used_is_a_row(tmp_path: Path, settings: config.Config, spied: list[Any]) -> None:
    task = Task(tmp_path, "text", settings)
    path = task.images / "img_2.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"1 of 2 photographs cannot be used, wanted at most a share of 0 "):
        task.make_lr()
    task.make_lr(max_rejected_share=0.5)
    named = [task.predict("hr", task.lr, "--images", str(task.images)), task.predict("lr", task.lr)]
    named += [task.predict("base", task.restore("restored", 0))]
    rows = tables.read(tmp_path / "base.parquet", tables.PREDICTIONS).set_index("image_id")
    assert rows["status"].tolist() == ["ok", "rejected"]
    assert rows.loc["img_2", "reason"].startswith("unreadable")
    assert len(spied) == 3  # the one photograph in each source
    found = task.compare(*named)
    assert (found["num_images"] == 1).all() and (found["num_rejected"] == 1).all()


def test_given_lr_images(tmp_path: Path, settings: config.Config) -> None:
    task = Task(tmp_path, "text", settings)
    given = tmp_path / "given"
    size, colour = (tiny.SIZE[0] // 4, tiny.SIZE[1] // 4), (10, 200, 30)
    from PIL import Image

    given.mkdir()
    Image.new("RGB", size, colour).save(given / "img_1.png")
    with pytest.raises(UserError, match="lr: no image 'img_2' there"):
        task.make_lr("--given", str(given))
    Image.new("RGB", (9, 9)).save(given / "img_2.png")
    task.make_lr("--given", str(given), max_rejected_share=0.5)
    samples = dict(shards.read_shard(task.lr))
    assert shards.to_uint8(shards.decode_image(samples["000000"]["lr.png"]))[0, 0].tolist() == list(colour)
    assert "is 9x9 px, wanted 24x18" in json.loads(samples["000001"]["json"])["reason"]


def test_a_photograph_of_another_size_than_annotated(tmp_path: Path, settings: config.Config) -> None:
    task = Task(tmp_path, "detection", settings)
    data = json.loads(task.annotations.read_text())
    data["images"][0]["width"] = 95
    task.annotations.write_text(json.dumps(data))
    task.make_lr(max_rejected_share=0.5)
    told = json.loads(dict(shards.read_shard(task.lr))["000000"]["json"])
    assert told["reason"] == "96x72 px, annotated as 95x72"


def test_shards_share_the_photographs(tmp_path: Path, settings: config.Config) -> None:
    task = Task(tmp_path, "text", settings)
    task.make_lr()
    whole = dict(shards.read_shard(task.lr))
    task.make_lr(num_shards=2)
    assert dict(shards.read_shard(task.lr)) == {"000000": whole["000000"]}


def test_a_source_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'base', found hr, lr"):
        downstream.read([("hr", tmp_path), ("lr", tmp_path)], "base")
