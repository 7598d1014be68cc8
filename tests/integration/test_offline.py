"""Every stage that loads weights, on a cache of stand-ins, with the network cut: no library tries to connect."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import dp2osr
import stand_ins
import tiny_ram
import tiny_shards
from dp2osr import fetch, stage, tables, weights
from dp2osr.config import PolicySettings
from training_rig import DEFAULTS, make_pairs, train_settings

CUT = """
import os, socket

def refuse(*arguments, **options):
    with open(os.environ["ATTEMPTS"], "a") as log:
        log.write(f"{arguments[1:]}\\n")
    raise OSError("the network is cut")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
"""
METRICS = ["lpips", "topiq_nr"]
GROUPS = tiny_shards.names(2)
MODELS = {"sd": "hub:owner/tiny", "flux": "hub:owner/tiny-flux"}
TAGS = {"ram": "hub:owner/ram/ram.pth", "dape": "hub:owner/ram/dape.pth", "tag_list": "hub:owner/ram/tags.txt"}
SAMPLING: dict[str, dict[str, Any]] = {"sd": {}, "flux": {"scheduler": "FlowMatchEulerDiscreteScheduler"}}
STAGES = {"sd": ["prompt", "embed", "rollout", "score", "encode", "train"], "flux": ["rollout", "encode", "train"]}
FILES = {
    **{name: f"{name}.parquet" for name in ("images", "prompts", "pairs", "scores", "scales", "train-log")},
    **{"lr": "lr.tar", "candidates": "candidates.tar", "encoded": "encoded.tar", "policy": "policy"},
    **{"embeddings": "embeddings.safetensors", "validation": "validation.parquet"},
}


def no_interface() -> list[str]:
    """Return what runs a command without any network interface, where this machine allows that."""
    command = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


NO_INTERFACE = no_interface()
pytestmark = pytest.mark.timeout(1800)  # many processes, each of which imports torch: long on a busy machine


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds both tiny models, a tagger and two metrics, with its manifest."""
    folder, ram = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("ram")
    tiny_ram.write(ram)
    for repo, source in (("owner/tiny", tiny_model), ("owner/tiny-flux", tiny_flux), ("owner/ram", ram)):
        stand_ins.add_repository(folder / "hub", repo, source)
    stand_ins.add_alexnet(folder / "torch")
    stand_ins.lpips_state(folder / "torch" / "hub" / "pyiqa" / stand_ins.lpips_name())
    stand_ins.add_topiq_nr(folder)
    items = [*MODELS.values(), *(f"{model}/controlnet" for model in MODELS.values()), *TAGS.values()]
    fetch.fetch([*items, *(f"metric:{name}" for name in METRICS)], folder, offline=True)
    return folder


class Cut:
    """Runs the stages of one backend in a folder, on a cache, without network."""

    def __init__(self, folder: Path, cache: Path, kind: str) -> None:
        self.folder, self.cache, self.attempts = folder, cache, folder / "attempts.log"
        self.policy = settings(MODELS[kind], kind)
        self.metrics = METRICS if kind == "sd" else []
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(CUT)

    def run(self, stage: str) -> subprocess.CompletedProcess[str]:
        """Run one stage as a rule does."""
        told = {weights.VARIABLE: str(self.cache), weights.CONFIGFILES: "config/c-sd2.yaml", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join([str(self.folder / "site"), str(Path(dp2osr.__file__).parents[1])])
        told |= {"HOME": str(self.folder), "PYTHONPATH": path, "ATTEMPTS": str(self.attempts), "OMP_NUM_THREADS": "1"}
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        command = [*NO_INTERFACE, sys.executable, "-m", f"dp2osr.stages.{stage}", *self.arguments(stage)]
        return subprocess.run(command, env=kept | told, capture_output=True, text=True, timeout=300, check=False)

    def files(self, *names: str, prefix: str = "") -> list[str]:
        """Return the options of some files, which are called as the files are."""
        return [part for name in names for part in (f"--{prefix}{name}", str(self.folder / FILES[name]))]

    def arguments(self, stage: str) -> list[str]:
        """Return a stage's command line."""
        policy, metrics = self.policy.model_dump(), self.metrics
        job: dict[str, Any] = {
            "prompt": {"source": "tags", "tags": {**TAGS, "thresholds": "", "threshold": 0.5}},
            "rollout": {"policy": policy, "seed": 7, "first": 0, "count": 6, "scale": 4, "image_format": "png"},
            "score": {"metrics": [*metrics, "psnr"], "niqe_block": 32},
            "train": {"run": "test", "policy": policy, "train": self.training(), "reward": reward(metrics)}
            | {"niqe_block": 32, "seed": 1, "base_seed": 7},
        }.get(stage, policy)
        control = ["--reference" if stage == "train" else "--control", str(self.policy.control)]
        val = self.files("lr", "embeddings", "scales", prefix="val-")
        paths = {
            "prompt": [*self.files("images", "lr", "prompts"), "--shard", "0"],
            "embed": self.files("prompts", "embeddings"),
            "rollout": [
                *self.files("lr", "embeddings", "candidates"),
                *control,
                *("--batch-size", "6"),
                *tiny_shards.speed(),
            ],
            "score": self.files("candidates", "lr", "scores"),
            "encode": self.files("pairs", "candidates", "lr", "encoded"),
            "train": [
                *self.files("pairs", "encoded", "embeddings", "policy", "train-log", "validation"),
                *control,
                *val,
            ],
        }
        return [*paths[stage], "--device", "cpu", "--config", json.dumps(job)]

    def training(self) -> dict[str, Any]:
        """Two steps; where there are metrics, the guard looks after each and never stops the training."""
        guard = {"every": int(bool(self.metrics)), "min_diversity": 0.0, "max_reward_drop": 9.0, "patience": 9}
        return train_settings(steps=2, guard=guard).model_dump()


def settings(model: str, kind: str) -> PolicySettings:
    """Return a policy on a tiny model of a kind, whose control branch is a folder of it."""
    base = {"policy_defaults": DEFAULTS["policy_defaults"] | {"backend": kind, "native_size": 32}}
    found: PolicySettings = tiny_shards.policy(base, Path("unused"), text_tokens=16, **SAMPLING[kind])
    return found.model_copy(update={"model": model, "control": f"{model}/controlnet"})


def reward(metrics: list[str]) -> dict[str, Any]:
    fr, nr = (metrics[:1], metrics[1:]) if metrics else (["psnr"], [])
    return {"fr": fr, "nr": nr, "weight_fr": 0.5 if nr else 1.0, "num_rollouts": 6}


def write_inputs(folder: Path) -> None:
    """Write what stages without weights make: the table of images, LR images, pairs and scales."""
    tiny_shards.write_lr(folder / FILES["lr"], GROUPS)
    table = {field.name: "" if field.type == "string" else 0 for field in tables.IMAGES}
    images = pd.DataFrame({"image_id": GROUPS}).assign(**{k: v for k, v in table.items() if k != "image_id"})
    small = {name: "int32" for name in ("width", "height", "crop_x", "crop_y", "crop_size", "shard")}
    tables.write(images.assign(status="ok").astype(small), folder / FILES["images"], tables.IMAGES)
    tables.write(make_pairs(tuple(GROUPS)), folder / FILES["pairs"], tables.PAIRS)
    scales = [{"group_id": group, "metric": name, "min": 0.0, "max": 1.0} for group in GROUPS for name in METRICS]
    tables.write(pd.DataFrame(scales), folder / FILES["scales"], tables.SCALES)


@pytest.fixture(scope="module")
def done(cache: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cut]:
    """Return what gives, by backend, a folder in which all stages that load weights have run without network."""

    @lru_cache
    def ran(kind: str) -> Cut:
        cut = Cut(tmp_path_factory.mktemp(kind), cache, kind)
        write_inputs(cut.folder)
        if "embed" not in STAGES[kind]:
            tiny_shards.write_embeddings(cut.folder / FILES["embeddings"], GROUPS, settings(str(tiny_flux), "flux"))
        for name in STAGES[kind]:
            finished = cut.run(name)
            assert finished.returncode == 0, f"{name}: {finished.stderr[-3000:]}"
        return cut

    return ran


@pytest.mark.parametrize("kind", STAGES)
def test_stages_run_with_the_network_cut(kind: str, done: Callable[[str], Cut]) -> None:
    cut = done(kind)
    assert not cut.attempts.exists(), cut.attempts.read_text()
    log = tables.read(cut.folder / FILES["train-log"], tables.TRAIN_LOG)
    assert log["step"].tolist() == [1, 2] and log["loss"].notna().all()
    assert (cut.folder / FILES["policy"] / "config.json").is_file()


def test_what_they_wrote(done: Callable[[str], Cut]) -> None:
    folder = done("sd").folder
    prompts = tables.read(folder / FILES["prompts"], tables.PROMPTS)
    named = {tag for text in prompts["prompt"] for tag in text.split(", ") if tag}
    assert set(prompts["group_id"]) == set(GROUPS) and named <= set(tiny_ram.TAGS)
    scores = tables.read(folder / FILES["scores"], tables.SCORES)
    assert set(scores["metric"]) == {*METRICS, "psnr"} and set(scores["status"]) == {"ok"}
    made = tables.read_origins(folder / FILES["scores"])
    known = {fact.sha256 for fact in weights.read_manifest(done("sd").cache).files.values()}
    assert {name: line.count("sha256:") for name, line in made.items()} == {"lpips": 2, "topiq_nr": 2, "psnr": 0}
    assert all(found in known for line in made.values() for found in re.findall(r"sha256:(\w+)", line))
    validation = tables.read(folder / FILES["validation"], tables.VALIDATION)
    assert validation["step"].tolist() == [0, 1, 2] and validation["reward"].notna().all()


@contextmanager
def without(path: Path) -> Iterator[None]:
    """Take a file away for a while."""
    aside = path.rename(path.with_name("aside"))
    try:
        yield
    finally:
        aside.rename(path)


LOST = [  # backend, stage, what its error names, a file of the cache
    ("sd", "prompt", "model hub:owner/ram/dape.pth", "hub/models--owner--ram/snapshots/*/dape.pth"),
    ("sd", "embed", "model hub:owner/tiny", "hub/models--owner--tiny/snapshots/*/text_encoder/model.safetensors"),
    ("sd", "rollout", "model hub:owner/tiny", "hub/models--owner--tiny/snapshots/*/unet/*.safetensors"),
    ("sd", "score", "metric 'lpips'", f"torch/hub/pyiqa/{stand_ins.lpips_name()}"),
    ("sd", "encode", "model hub:owner/tiny", "hub/models--owner--tiny/snapshots/*/vae/*.safetensors"),
    ("sd", "train", "metric 'lpips'", "torch/hub/checkpoints/alexnet*"),
    (
        "flux",
        "rollout",
        "model hub:owner/tiny-flux",
        "hub/models--owner--tiny-flux/snapshots/*/transformer/*.safetensors",
    ),
    ("flux", "encode", "model hub:owner/tiny-flux", "hub/models--owner--tiny-flux/snapshots/*/scheduler/*.json"),
    ("flux", "train", "model hub:owner/tiny-flux", "hub/models--owner--tiny-flux/snapshots/*/controlnet/*.safetensors"),
]


@pytest.mark.parametrize(("kind", "name", "what", "pattern"), LOST, ids=[f"{kind}-{name}" for kind, name, *_ in LOST])
def test_what_is_missing_is_one_line_with_the_command(
    kind: str,
    name: str,
    what: str,
    pattern: str,
    cache: Path,
    done: Callable[[str], Cut],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut, told = done(kind), {weights.VARIABLE: str(cache), weights.CONFIGFILES: "config/c-sd2.yaml"}
    for variable, value in (told | weights.environment(cache, offline=True)).items():
        monkeypatch.setenv(variable, value)
    for way in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, way, lambda *_: pytest.fail("the stage tried to connect"))
    main, (lost,) = importlib.import_module(f"dp2osr.stages.{name}").main, cache.glob(pattern)
    with without(lost), pytest.raises(SystemExit) as stopped:
        stage.run(lambda: main(cut.arguments(name)))
    assert stopped.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    told_where = f"{lost.relative_to(cache)}: missing (weights cache {cache})"
    command = f"on a machine with network run: dp2osr fetch-weights --configfile config/c-sd2.yaml --cache {cache}"
    assert errors == [f"error: {what}: {told_where}; {command}"]
