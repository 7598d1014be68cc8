"""Weights ahead of time: what a config needs, the manifest, a real fetch from a hub on the loopback, clear errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import stand_ins
from dp2osr import cli, config, fetch, weights
from dp2osr.errors import UserError

STORAGE = f"hub/models--owner--tiny/snapshots/{stand_ins.COMMIT}"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without a cache in use, and undo what the command line sets."""
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setenv(weights.CONFIGFILES, "config/c-sd2.yaml")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache with one item of two files, `a` and `b/c`, in its manifest."""
    folder = tmp_path / "cache"
    (folder / "b").mkdir(parents=True)
    (folder / "a").write_bytes(b"first")
    (folder / "b" / "c").write_bytes(b"second")
    weights.add_item(folder, "metric:lpips", ["b/c", "a"])
    return folder


@pytest.mark.parametrize(
    ("text", "repo", "revision", "inner"),
    [
        ("hub:owner/name", "owner/name", "main", ""),
        ("hub:owner/na.me-2@v1.0", "owner/na.me-2", "v1.0", ""),
        ("hub:owner/name/sub/file.safetensors", "owner/name", "main", "sub/file.safetensors"),
        ("hub:owner/name@abc/sub", "owner/name", "abc", "sub"),
    ],
)
def test_hub_names(text: str, repo: str, revision: str, inner: str) -> None:
    assert weights.parse_hub(text) == weights.HubName(repo, revision, inner)


@pytest.mark.parametrize(
    "text", ["hub:", "hub:name", "hub:o/n@", "hub:../n", "hub:o/..", "hub:o/n/../../x", "hub:o/n@../x", "hub:o/n//etc"]
)
def test_what_is_no_hub_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"wanted hub:OWNER/NAME"):
        weights.parse_hub(text)


def test_needs_of_a_config(config_dict: dict[str, Any]) -> None:
    assert weights.needs(config.load(config_dict)) == []
    config_dict["iqa"]["groups"]["heavy"] = ["musiq", "psnr", "lpips"]
    config_dict["policies"]["base"] = {"model": "hub:owner/sd@v1", "control": "hub:owner/control/model.safetensors"}
    config_dict["policies"]["bicubic"]["model"] = "hub:owner/never-loaded"
    config_dict["pretrain"]["backbone"] = "hub:owner/sd@v1"
    found = weights.needs(config.load(config_dict))
    hub = ["hub:owner/control/model.safetensors", "hub:owner/sd@v1"]
    assert found == [*hub, "metric:lpips", "metric:musiq"]
    config_dict["iqa"]["groups"]["tests"] = ["vqr1"]
    config_dict["iqa"]["vqr1"]["model"] = "hub:owner/vqr1"
    assert weights.needs(config.load(config_dict)) == [*hub, "hub:owner/vqr1", "metric:lpips", "metric:musiq"]
    config_dict["policies"]["base"]["model"] = "hub:sd"
    with pytest.raises(UserError, match="model hub:sd: wanted"):
        config.load(config_dict)


def test_what_is_taken_of_a_repository() -> None:
    pipeline = [
        ".gitattributes",
        "README.md",
        "512-base-ema.ckpt",
        "512-base-ema.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_2/spiece.model",
        "unet/code.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
    ]
    left = {0, 1, 2, 3, 7, 9, 16, 18, 20}
    assert fetch.choose(pipeline, "") == sorted(name for i, name in enumerate(pipeline) if i not in left)
    assert fetch.choose(pipeline, "512-base-ema.ckpt") == ["512-base-ema.ckpt"]
    assert fetch.choose(pipeline, "unet") == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    language = ["chat_template.jinja", "chat_template.json", "merges.txt", "model.safetensors.index.json", "vocab.json"]
    assert fetch.choose([*language, "model-00001-of-00002.safetensors", "trainer_state.pt"], "") == sorted(
        [*language, "model-00001-of-00002.safetensors"]
    )
    old = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"]
    assert fetch.choose(old, "") == old[:3]


def test_intact_cache_passes(cache: Path) -> None:
    assert weights.check(cache, ["metric:lpips"], sizes_only=False) == []
    facts = json.loads((cache / "manifest.json").read_text())["files"]["a"]
    sha256 = "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    assert facts == {"size": 5, "sha256": sha256}


def test_check_names_each_problem(cache: Path) -> None:
    (cache / "a").write_bytes(b"fIrst")
    assert weights.check(cache, [], sizes_only=True) == []
    assert weights.check(cache, [], sizes_only=False) == ["a: content differs from the manifest's sha256"]
    (cache / "b" / "c").write_bytes(b"half")
    (cache / "a").unlink()
    found = weights.check(cache, ["metric:lpips", "metric:musiq"], sizes_only=False)
    assert found == ["metric:musiq: not in the weights cache", "a: missing", "b/c: 4 bytes, wanted 6"]
    (cache / "manifest.json").unlink()
    assert weights.check(cache, [], sizes_only=True) == [f"manifest.json: missing in {cache}"]


def test_another_pyiqa_may_want_other_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "version", lambda name: "9.9")
    (problem,) = weights.check(cache, ["metric:lpips"], sizes_only=True)
    assert problem.startswith("metric:lpips: fetched with pyiqa ") and problem.endswith("installed is pyiqa 9.9")


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "b/../../a"])
def test_a_manifest_leads_nowhere_else(cache: Path, path: str) -> None:
    text = (cache / "manifest.json").read_text().replace('"b/c"', json.dumps(path))
    (cache / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: no manifest of this project .*fetch-weights"):
        weights.read_manifest(cache)


def test_an_interrupted_write_leaves_the_old_manifest(cache: Path) -> None:
    before = (cache / "manifest.json").read_bytes()
    with pytest.raises(FileNotFoundError):
        weights.add_item(cache, "metric:musiq", ["absent"])
    assert (cache / "manifest.json").read_bytes() == before


def test_the_error_of_a_stage_names_file_and_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.require("metric:lpips")  # no cache in use
    monkeypatch.setenv(weights.VARIABLE, str(cache))
    weights.require("metric:lpips")
    (cache / "b" / "c").unlink()
    command = f"dp2osr fetch-weights --configfile config/c-sd2.yaml --cache {cache}"
    with pytest.raises(UserError) as caught:
        weights.require("metric:lpips")
    told = f"metric 'lpips': b/c: missing (weights cache {cache}); on a machine with network run: {command}"
    assert str(caught.value) == told
    with pytest.raises(UserError, match="model hub:o/n: not in the weights cache"):
        weights.require("hub:o/n")


def test_a_model_of_the_hub_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dp2osr.models.backend import resolve

    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "config.json").write_text("{}")
    found = stand_ins.add_repository(tmp_path / "cache" / "hub", "owner/tiny", tmp_path / "model")
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "cache"))
    assert resolve("hub:owner/tiny") == found
    assert resolve(f"hub:owner/tiny@{stand_ins.COMMIT}/unet") == found / "unet"
    for absent in ("hub:owner/tiny/vae", "hub:owner/tiny@v2", "hub:owner/other"):
        with pytest.raises(UserError, match=f"model {absent}: not found in .*dp2osr fetch-weights"):
            resolve(absent)
    (tmp_path / "cache" / "hub" / "models--owner--tiny" / "refs" / "main").write_text("../../../..")
    with pytest.raises(UserError, match="wanted a commit"):
        resolve("hub:owner/tiny")


def test_libraries_are_sent_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    weights.use()
    assert dict(os.environ) == before
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    for name in weights.environment(tmp_path, offline=True):
        monkeypatch.setenv(name, "")
    weights.use()
    assert os.environ["TORCH_HOME"] == str(tmp_path / "torch")
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_what_was_opened_is_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    stand_ins.add_repository(tmp_path / "hub", "owner/tiny", tmp_path / "model")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "a.pth").write_bytes(b"x")
    opened = ["torch/a.pth", "torch/b.pth.partial", "hub/.locks/x", "hub/models--owner--tiny/refs/main", "../other"]
    found = fetch.recorded(tmp_path, [str(tmp_path / path) for path in opened] + [sys.executable])
    assert found == ["hub/models--owner--tiny/refs/main", f"{STORAGE}/model.safetensors", "torch/a.pth"]


def test_half_a_download_is_discarded(tmp_path: Path) -> None:
    names = ["x-a7937b64.pth", "x-00000000.pth", "plain.pth"]
    for name in names:
        (tmp_path / name).write_bytes(b"first")
    assert fetch._discard_broken(tmp_path, names) == ["x-00000000.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "x-a7937b64.pth"]


def test_whole_repositories_are_those_of_pyiqa() -> None:
    import pyiqa

    for module in ("qalign_arch.py", "q_align/modeling_mplug_owl2.py"):
        source = (Path(pyiqa.__file__).parent / "archs" / module).read_text()
        assert fetch.REPOSITORIES["qalign"].removeprefix("hub:") in source


def overlay(folder: Path, *metrics: str, **policy: str) -> Path:
    """Write an overlay whose policy and metrics need weights."""
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({"policy_defaults": policy, "iqa": {"groups": {"heavy": list(metrics)}}}))
    return path


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run `dp2osr fetch-weights` in the repository; returns its exit code."""
    monkeypatch.chdir(root)
    try:
        cli.main(["fetch-weights", *map(str, arguments)])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_fetch_from_a_hub(
    tmp_path: Path,
    root: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model and a metric arrive; once more asks for nothing; a damaged file is named, and fetched again."""
    cache = tmp_path / "cache"
    stand_ins.add_alexnet(cache / "torch")  # its host is torchvision's, which no test can stand in for
    pyiqa_weights = stand_ins.lpips_state(tmp_path / "pyiqa" / stand_ins.lpips_name()).parent
    overlaid = overlay(tmp_path, "lpips", model="hub:owner/tiny", control="hub:owner/tiny/controlnet")
    arguments = ["--configfile", overlaid, "--cache", cache]
    with stand_ins.hub_server({"owner/tiny": tiny_model, "chaofengc/IQA-PyTorch-Weights": pyiqa_weights}) as hub:
        address, requests = hub
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert run(root, monkeypatch, *arguments) == 0
        manifest = weights.read_manifest(cache)
        assert manifest is not None
        assert list(manifest.items) == ["hub:owner/tiny", "hub:owner/tiny/controlnet", "metric:lpips"]
        files = manifest.items["metric:lpips"].files
        assert [path.rpartition("/")[0] for path in files] == ["torch/hub/checkpoints", "torch/hub/pyiqa"]
        assert f"{STORAGE}/unet/diffusion_pytorch_model.safetensors" in manifest.items["hub:owner/tiny"].files
        assert all((cache / path).is_file() for path in manifest.files)
        capsys.readouterr()
        assert run(root, monkeypatch, *arguments, "--check") == 0
        assert "3 items needed" in capsys.readouterr().out

        done = len(requests)
        assert run(root, monkeypatch, *arguments) == 0
        assert len(requests) == done

        damaged = cache / STORAGE / "vae" / "diffusion_pytorch_model.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        assert run(root, monkeypatch, *arguments, "--check", "--quick") == 0
        capsys.readouterr()
        assert run(root, monkeypatch, *arguments, "--check") == 1
        shown = capsys.readouterr()
        assert shown.out.strip() == f"{damaged.relative_to(cache)}: content differs from the manifest's sha256"
        assert "1 problems; on a machine with network run: dp2osr fetch-weights --config" in shown.err
        assert run(root, monkeypatch, *arguments) == 0
        assert run(root, monkeypatch, *arguments, "--check") == 0


def test_a_failed_fetch_keeps_the_rest_and_goes_on(
    tmp_path: Path, root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    overlaid = overlay(tmp_path, model="hub:owner/tiny", control="hub:owner/other/controlnet")
    arguments = ["--configfile", overlaid, "--cache", cache]
    repositories = {"owner/tiny": tiny_model}
    with stand_ins.hub_server(repositories) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert run(root, monkeypatch, *arguments) == 1
        shown = capfd.readouterr().err
        assert "error: model hub:owner/other/controlnet: not downloaded (" in shown
        assert shown.splitlines()[-1].startswith(f"error: weights {cache}: hub:owner/other/controlnet: not fetched")
        assert weights.intact(cache, "hub:owner/tiny")
        repositories["owner/other"] = tiny_model
        assert run(root, monkeypatch, *arguments) == 0
    assert weights.intact(cache, "hub:owner/other/controlnet")


def test_a_killed_fetch_is_run_again(
    tmp_path: Path, root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL amid a file: no half of it under its name, no manifest; the second run asks for what had not arrived."""
    cache, stalled = tmp_path / "cache", {"vocab.json"}
    overlaid = overlay(tmp_path, model="hub:owner/tiny", control="hub:owner/tiny/controlnet")
    arguments = ["--configfile", overlaid, "--cache", cache]
    command = [sys.executable, "-m", "dp2osr.cli", "fetch-weights", *map(str, arguments)]
    with stand_ins.hub_server({"owner/tiny": tiny_model}, stalled) as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        process = subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        names = [path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*") if path.is_file()]
        wanted = len(fetch.choose(names, "")) - 1
        while "stalled" not in requests or len(list(cache.glob("hub/*/snapshots/*/**/*.*"))) < wanted:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (cache / "manifest.json").exists()
        assert not list(cache.glob("hub/*/snapshots/*/tokenizer/vocab.json"))
        (left,) = cache.glob("hub/*/blobs/*.incomplete")
        os.utime(left, (0, 0))
        stalled.clear()
        requests.clear()
        assert run(root, monkeypatch, *arguments) == 0
        asked = {request.rpartition("/")[2] for request in requests if request.startswith("GET")}
        assert "vocab.json" in asked and not asked & {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not left.exists()
    assert run(root, monkeypatch, *arguments, "--check") == 0


def test_a_cache_filled_by_hand_is_recorded(
    tmp_path: Path, root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    stand_ins.add_repository(cache / "hub", "owner/tiny", tiny_model)
    overlaid = overlay(tmp_path, model="hub:owner/tiny", control="hub:owner/tiny/controlnet")
    arguments = ["--configfile", overlaid, "--cache", cache]
    assert run(root, monkeypatch, *arguments, "--check") == 1
    assert run(root, monkeypatch, *arguments, "--offline") == 0
    assert run(root, monkeypatch, *arguments, "--check") == 0


def test_no_cache_folder_is_one_line(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, monkeypatch, "--check") == 1
    assert capsys.readouterr().err.strip().endswith("wanted --cache FOLDER or the config's `weights`")
