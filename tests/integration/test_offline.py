"""The stages on a weights cache of stand-ins, with the network cut: no library so much as tries to connect."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import stand_ins
import tiny_shards
from dp2osr import config, fetch, tables, weights
from dp2osr.stages.rollout import RolloutJob

CUT = """
import os, socket

def refuse(*arguments, **options):
    with open(os.environ["ATTEMPTS"], "a") as log:
        log.write(f"{arguments[1:]}\\n")
    raise OSError("the network is cut")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
"""
METRICS = ["lpips", "topiq_nr"]


def no_interface() -> list[str]:
    """Return what runs a command without any network interface, where this machine allows that."""
    command = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


NO_INTERFACE = no_interface()


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds the tiny model and two metrics, with its manifest."""
    folder = tmp_path_factory.mktemp("weights")
    stand_ins.add_repository(folder / "hub", "owner/tiny", tiny_model)
    stand_ins.add_alexnet(folder / "torch")
    stand_ins.lpips_state(folder / "torch" / "hub" / "pyiqa" / stand_ins.lpips_name())
    stand_ins.add_topiq_nr(folder)
    items = ["hub:owner/tiny", "hub:owner/tiny/controlnet", *(f"metric:{name}" for name in METRICS)]
    fetch.fetch(items, folder, offline=True)
    return folder


class Cut:
    """Runs stages in a folder, on a cache, without network."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.attempts = folder, cache, folder / "attempts.log"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(CUT)

    def run(self, stage: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one stage as a rule does."""
        told = {weights.VARIABLE: str(self.cache), weights.CONFIGFILES: "config/c-sd2.yaml", "HF_HUB_OFFLINE": "1"}
        told |= {"HOME": str(self.folder), "PYTHONPATH": str(self.folder / "site"), "ATTEMPTS": str(self.attempts)}
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        command = [*NO_INTERFACE, sys.executable, "-m", f"dp2osr.stages.{stage}", *map(str, arguments)]
        environment = {**kept, **told, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def score(self, *metrics: str) -> subprocess.CompletedProcess[str]:
        """Score the candidates."""
        paths = ["--candidates", self.folder / "candidates.tar", "--lr", self.folder / "lr.tar"]
        job = json.dumps({"metrics": metrics, "niqe_block": 32})
        return self.run("score", *paths, "--device", "cpu", "--config", job, "--scores", self.folder / "scores.parquet")


def settings(config_dict: dict[str, Any]) -> config.PolicySettings:
    found = tiny_shards.policy(config_dict, Path("unused"))
    return found.model_copy(update={"model": "hub:owner/tiny", "control": "hub:owner/tiny/controlnet"})


def test_stages_run_with_the_network_cut(tmp_path: Path, cache: Path, config_dict: dict[str, Any]) -> None:
    cut, policy, groups = Cut(tmp_path, cache), settings(config_dict), tiny_shards.names(2)
    tiny_shards.write_lr(tmp_path / "lr.tar", groups)
    prompts = pd.DataFrame({"group_id": groups, "prompt": ["a bird", ""], "status": ["ok", "missing"]})
    tables.write(prompts, tmp_path / "prompts.parquet", tables.PROMPTS)
    embeddings = ["--embeddings", tmp_path / "embeddings.safetensors"]
    how = ["--device", "cpu", "--config"]
    done = [cut.run("embed", "--prompts", tmp_path / "prompts.parquet", *how, policy.model_dump_json(), *embeddings)]
    job = RolloutJob(policy=policy, seed=7, first=0, count=2, scale=4, image_format="png").model_dump_json()
    paths = ["--lr", tmp_path / "lr.tar", *embeddings, "--control", policy.control]
    done.append(cut.run("rollout", *paths, *how, job, "--batch-size", "2", "--candidates", tmp_path / "candidates.tar"))
    done.append(cut.score(*METRICS, "psnr"))
    assert [each.returncode for each in done] == [0, 0, 0], "\n".join(each.stderr[-2000:] for each in done)
    scores = tables.read(tmp_path / "scores.parquet", tables.SCORES)
    assert set(scores["metric"]) == {*METRICS, "psnr"} and set(scores["status"]) == {"ok"}
    made = tables.read_origins(tmp_path / "scores.parquet")
    known = {fact.sha256 for fact in weights.read_manifest(cache).files.values()}
    assert {name: line.count("sha256:") for name, line in made.items()} == {"lpips": 2, "topiq_nr": 2, "psnr": 0}
    assert all(found in known for line in made.values() for found in re.findall(r"sha256:(\w+)", line))
    assert not cut.attempts.exists(), cut.attempts.read_text()


def test_what_is_missing_is_one_line_with_the_command(tmp_path: Path, cache: Path, config_dict: dict[str, Any]) -> None:
    broken = tmp_path / "weights"
    shutil.copytree(cache, broken, symlinks=True)
    cut, policy = Cut(tmp_path, broken), settings(config_dict)
    lost = broken / "torch" / "hub" / "pyiqa" / stand_ins.lpips_name()
    lost.unlink()
    unet = next(broken.glob("hub/models--owner--tiny/snapshots/*/unet/diffusion_pytorch_model.safetensors"))
    unet.unlink()
    command = f"on a machine with network run: dp2osr fetch-weights --configfile config/c-sd2.yaml --cache {broken}"
    tiny_shards.write_lr(tmp_path / "lr.tar", tiny_shards.names(1))
    shutil.copyfile(tmp_path / "lr.tar", tmp_path / "candidates.tar")
    groups = pd.DataFrame({"group_id": ["a"], "prompt": [""], "status": ["ok"]})
    tables.write(groups, tmp_path / "prompts.parquet", tables.PROMPTS)
    paths = ["--prompts", tmp_path / "prompts.parquet", "--embeddings", tmp_path / "embeddings.safetensors"]
    embed = cut.run("embed", *paths, "--device", "cpu", "--config", policy.model_dump_json())
    for done, what, path in (
        (cut.score("lpips"), "metric 'lpips'", lost),
        (embed, "model hub:owner/tiny", unet),
    ):
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        told = f"{path.relative_to(broken)}: missing (weights cache {broken})"
        assert errors == [f"error: {what}: {told}; {command}"], done.stderr[-2000:]
    assert "Traceback" not in embed.stderr
    assert not cut.attempts.exists()
