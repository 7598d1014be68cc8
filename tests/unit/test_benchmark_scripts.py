"""The scripts of tests/benchmarks still run, and what fullsize.py counts is what is computed."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dp2osr.iqa import pretrained
from dp2osr.models.footprint import META

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
# The smallest call of each that does its work; of the others (minutes, a browser, or a test below) the command line.
CALLS = {
    "reward_pairs.py": "--groups 4 --rollouts 4 --metrics 2 --top 1 --shards 2 --blocks 2 --subset 2",
    "rollout.py": "--images 1 --seeds 2",
    "row_groups.py": "--groups 10 --rollouts 4",
    "scoring.py": "--groups 1 --rollouts 2 --repeats 1 --metrics psnr gmsd --files",
    "training.py": "--top 1 --size 32 --rounds 1",
}
TINY = {"size": 64, "batch": 2, "top": 2}  # pixels, candidates, N
WIDTH = 16
SHALLOW: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 1, "num_single_layers": 1},
    "unet": {
        "layers_per_block": 1,
        "block_out_channels": [20, 40],
        "attention_head_dim": [1, 2],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {"layers_per_block": 1},
}


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts find their neighbours, and leave nothing of them behind."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(pretrained, "create", pretrained.create)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a script with arguments, and fails where it does."""

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code

    return run


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """Return an overlay under which FLUX reads 8 tokens of text instead of 512."""
    path = tmp_path / "short.yaml"
    path.write_text("policy_defaults: {sampling: {text_tokens: 8}}\n")
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name: str, call: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    call(name, *CALLS.get(name, "--help").split())
    assert capsys.readouterr().out


def test_rows_are_kept_as_they_come(
    call: Callable[..., None], short_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    sizes = f"--device cpu --width {WIDTH} --size 64 --steps 1 --batch 2 --output {output}".split()
    sizes += ["--architecture", "sd2-base", "--configfile", str(short_text)]
    call("fullsize.py", *sizes, "--repeats", "2", "--stages", "rollout")
    call("fullsize.py", *sizes, "--repeats", "1", "--stages", "decode", "encode")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["stage"], row["unit"], row["card"]) for row in rows] == [
        ("rollout", "image", "CPU"),
        ("decode", "image", "CPU"),
        ("encode", "image", "CPU"),
    ]
    ours, plain = rows[0]["ours"], rows[0]["plain"]
    assert len(ours["seconds"]) == len(plain["seconds"]) == 2 and min(ours["seconds"]) > 0
    ratios = [p / o for o, p in zip(ours["seconds"], plain["seconds"], strict=True)]
    assert rows[0]["ratio"] == pytest.approx(sum(ratios) / 2)
    assert ours["count"]["flops"] < plain["count"]["flops"]  # the control image is embedded once for both candidates
    assert "images/s" in capsys.readouterr().out


def test_memory_that_is_short_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import fullsize
    import ways

    def short() -> Any:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(fullsize, "timed", lambda work, device: (2.0, 1.5))
    contest = ways.Contest("DPO, groups", "pair", (lambda: list, short), (4, 2))
    row = fullsize.measure(contest, torch.device("cuda"), repeats=3)
    assert row.ours.seconds == [0.5] * 3 and row.ours.gib == 1.5 and row.plain.seconds == []
    device = fullsize.Device(torch.device("cuda"), "card", rate=1e12, memory=1e9)
    assert row.ratio is None and "no memory" in row.line(device) and "2 " in row.line(device)


def test_operations_and_bytes_by_hand() -> None:
    import counting

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5)).to(META)
    images = torch.empty(2, 3, 4, 4, device=META)
    with torch.no_grad():
        forward = counting.counted(lambda: net(images))
    products = 2 * 16 * 8 * 3 * 9 + 2 * 128 * 5  # of two images: pixels, outputs, inputs, taps; inputs, outputs
    weights = 4 * (8 * 3 * 9 + 8 + 128 * 5 + 5)
    outputs, inputs = 4 * 2 * (8 * 16 + 5), 4 * 2 * (3 * 16 + 8 * 16)
    assert forward.flops == 2 * products
    assert forward.weights == weights and forward.moved == weights + outputs + inputs
    # the images want no gradient: the convolution's weights alone, the linear layer's weights and input
    trained = counting.counted(lambda: net(images).sum().backward())
    assert trained.flops == 2 * (2 * products + 2 * 128 * 5)


def test_flux_at_true_size_by_hand(tmp_path: Path) -> None:
    """What a candidate takes in 25 steps: 19 double and 38 single blocks, and 4 of the branch, on 512 + 1024 tokens."""
    import counting
    import random_model

    found = random_model.settings("flux-dev")
    policy = random_model.policy(found.policies["base"], "flux-dev", 1, tmp_path / "model")
    setup = counting.hollow(policy, found.runs["default"].train, size=512, batch=1, top=4)
    sampled, _ = counting.rollout(setup)
    d, text, image = 3072, 512, 1024
    tokens = text + image

    def embedded() -> int:  # image, text, and of the whole image: time, guidance, pooled text, each by two layers
        return image * 64 * d + text * 4096 * d + 2 * (256 * d + d * d) + 768 * d + d * d

    def double(blocks: int) -> int:  # queries, keys, values, output and the four times wider layers; modulation
        return blocks * (12 * d * d * tokens + 2 * 6 * d * d + 2 * tokens * tokens * d)

    single = 38 * (12 * d * d * tokens + 3 * d * d + 2 * tokens * tokens * d)
    backbone = embedded() + double(19) + single + 2 * d * d + image * d * 64
    branch = embedded() + image * 64 * d + double(4) + 4 * image * d * d  # its own embedder, and a layer a residual
    assert sampled.flops == 25 * 2 * (backbone + branch)
    assert counting.CARDS[0].seconds(sampled) == pytest.approx(sampled.flops / 790e12)


def both_setups(architecture: str, overlays: list[Path], folder: Path) -> tuple[Any, Any]:
    """Return a narrow and shallow model on the CPU, in float32, and the same on `meta`."""
    import counting
    import fullsize
    import random_model

    found = random_model.settings(architecture, overlays)
    base = found.policies["base"]
    base = base.model_copy(update={"sampling": base.sampling.model_copy(update={"steps": 1})})
    policy = random_model.policy(base, architecture, WIDTH, folder / "model")
    for part, changes in SHALLOW.items():
        path = folder / "model" / part / "config.json"
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    policy, train = fullsize.in_float32(policy, found.runs["default"].train)
    args: Any = type("Args", (), TINY | {"speed": found.rollout.speed})
    return fullsize.make_setup(policy, train, args, torch.device("cpu")), counting.hollow(policy, train, **TINY)


@pytest.mark.parametrize("architecture", ["sd2-base", "flux-dev"])
def test_counts_on_meta_are_those_of_a_run(architecture: str, short_text: Path, tmp_path: Path) -> None:
    import counting
    import ways

    real, hollow = both_setups(architecture, [short_text] if architecture == "flux-dev" else [], tmp_path)
    (contest,) = ways.rollout(real)
    sampled, pixels = counting.rollout(hollow)
    assert counting.counted(contest.make[0]()).flops == TINY["batch"] * (sampled + pixels).flops
    (contest,) = ways.encode(real)
    assert counting.counted(contest.make[0]()).flops == TINY["batch"] * counting.encode(hollow).flops
    groups, pairs = ways.train(real)
    assert counting.counted(groups.make[0]()).flops == pytest.approx(4 * counting.dpo(hollow, "groups").flops)
    step = pairs.make[1]()
    with FlopCounterMode(display=False) as torchs:
        step()
    assert torchs.get_total_flops() == pytest.approx(2 * counting.dpo(hollow, "textbook").flops)


@pytest.mark.parametrize("architecture", ["sd2-base", "flux-dev"])
def test_plain_pipeline_runs_in_half_precision(architecture: str, short_text: Path, tmp_path: Path) -> None:
    import ways

    real, _ = both_setups(architecture, [short_text] if architecture == "flux-dev" else [], tmp_path)
    (contest,) = ways.rollout(replace(real, plain_dtype=torch.float16))
    image = contest.make[1]()()
    assert image.shape == (1, 3, TINY["size"], TINY["size"]) and bool(image.isfinite().all())


def test_scores_of_both_ways_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scoring
    import ways

    monkeypatch.setattr(scoring, "DEFAULT", ["gmsd", "psnr"])
    monkeypatch.setattr(scoring, "TRAINED", ["lpips"])
    real, _ = both_setups("sd2-base", [], tmp_path)
    for contest, names in zip(ways.score(real), (scoring.DEFAULT, scoring.TRAINED), strict=True):
        ours, plain = (make()() for make in contest.make)
        assert contest.units == (ways.SCORED_GROUPS * TINY["batch"],) * 2
        assert [list(ours[name]) for name in names] == [pytest.approx(each.tolist(), abs=1e-5) for each in plain]
