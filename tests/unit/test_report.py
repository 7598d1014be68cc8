"""The report on a made-up run (tests/made_up_run.py): every figure, sentence and image comes from its files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dp2osr import config, tables
from dp2osr.report import comparison, figures, sheets, text
from dp2osr.stages import compare, report
from made_up_run import SCORED, evaluation_table, job, train_log, validation_table, write_run


class Links(HTMLParser):
    """Collects every address that the page would fetch, and every script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep src, href and xlink:href, and the tag of a script."""
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.found += ["script"] if tag == "script" else []


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Return the report folder of a made-up run."""
    tmp_path = tmp_path_factory.mktemp("run")
    argv = write_run(tmp_path, verdict="diversity fell under 0.25 of the reference's")
    report.main([*argv, "--config", job(root), "--report", str(tmp_path / "report" / "index.html")])
    return tmp_path / "report"


def test_page_is_self_contained_escaped_and_complete(rendered: Path) -> None:
    page = (rendered / "index.html").read_text()
    links = Links()
    links.feed(page)
    away = [link for link in links.found if not link.startswith(("#", "data:image/"))]
    assert links.found and away == ["../../../train/base/explorer/default/index.html"]  # a link, fetched by nobody
    assert "<script" not in page and "&lt;script&gt;cannot be read (1)" in page and "photo &lt;0&gt;.png" in page
    assert "0.800 against 0.500, a difference of +0.300 (95 % interval [+0.250, +0.350])" in page
    assert '<td>metric fsim</td><td class="left wrap">pyiqa 9.9, score 1</td>' in page
    assert "The guard stopped the training at step 80: diversity fell under 0.25" in page
    assert page.count("data:image/png") == 3 * 12
    assert page.count("<svg") == 5
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    stylesheet = page[: page.index("</style>")]
    assert "prefers-color-scheme: dark" in stylesheet


def test_files_beside_the_page(rendered: Path) -> None:
    from PIL import Image

    names = {path.relative_to(rendered).as_posix() for path in rendered.rglob("*") if path.is_file()}
    assert {"contact_sheet.png", "figures/at_m-holdout.png", "figures/training.png"} <= names
    timings = pd.read_csv(rendered / "tables" / "timings.csv")
    assert timings.to_dict("records") == [
        {"job": f"{rendered.parent.name}/benchmarks/score-*", "jobs": 2, "seconds": 20.0, "max_rss": 310.2}
    ]
    with Image.open(rendered / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 4 * 64
    metrics = pd.read_csv(rendered / "tables" / "metrics-holdout.csv").set_index("metric")
    assert metrics.loc["piqe", "judged"] == "worse" and metrics.loc["piqe", "better"] == "reference"
    assert metrics.loc["niqe", "better"] == "policy" and metrics.loc["niqe", "family"] == "trained NR"
    assert (metrics["reference_std"] == 0.1).all()
    kinds = {path.suffix: path.read_text() for path in (rendered / "tables").glob("metrics-*")}
    assert "| untrained NR | piqe ↓ | **0.40** | 0.70 | +0.30† |" in kinds[".md"]
    assert "piqe $\\downarrow$ & \\textbf{0.40} & 0.70 & +0.30$^{\\dagger}$" in kinds[".tex"]
    assert "0.40 ± 0.10" in (rendered / "tables" / "stability-holdout.md").read_text()
    assert "\\emph{holdout}" in (rendered / "tables" / "paper.tex").read_text()


def test_metrics_on_the_page_are_in_families(rendered: Path) -> None:
    page = (rendered / "index.html").read_text()
    assert re.findall(r'rowgroup">(\w+ \w+): ([\w ]+)<', page) == [
        ("trained FR", "in the reward"),
        ("trained NR", "in the reward"),
        ("untrained NR", "held out"),
        ("untrained FR", "held out"),
    ]
    table = page[page.index('class="families"') : page.index('id="controls-holdout"')]
    assert re.sub(r"\s+", "", table).count('<bclass="win">') == len(SCORED)


def test_missing_option_is_one_clear_line(tmp_path: Path, root: Path) -> None:
    from dp2osr.errors import UserError

    argv = write_run(tmp_path)
    at = argv.index("--scales")
    with pytest.raises(UserError, match="--scales: found 0 files for data set 'holdout', wanted one"):
        report.main([*argv[:at], *argv[at + 2 :], "--config", job(root), "--report", str(tmp_path / "i.html")])


def test_verdict_follows_the_numbers() -> None:
    words = {"dataset": "holdout", "policy": "default", "reference": "base", "confidence": 0.95}
    good = " ".join(text.verdict(evaluation_table(gain=0.3), **words))
    assert (
        "It is better than base: the interval excludes 0" in good and "worst candidate of an image gained most" in good
    )
    assert "Both the full-reference and the no-reference part rose" in good
    assert "psnr and ssim better; piqe worse" in good and "rough guide" in good
    bad = " ".join(text.verdict(evaluation_table(gain=-0.3), **words))
    assert (
        "It is worse than base" in bad and "did not gain most" in bad and "part fell, the no-reference part fell" in bad
    )
    flat = " ".join(text.verdict(evaluation_table(gain=0.02), **words))
    assert "It is not clearly different from base: the interval includes 0" in flat and "did not gain most" in flat


def test_guard_sentences() -> None:
    assert text.training_sentence(validation_table(), train_log()) == (
        "The guard did not fire in 60 steps. The policy is the checkpoint of step 40, the best so far.",
        False,
    )
    sentence, fired = text.training_sentence(validation_table().iloc[:0], train_log())
    assert "The guard was off; the policy is the last step, 60" in sentence and not fired


@pytest.mark.parametrize(
    ("value", "signed", "wanted"),
    [
        (0.1234, True, "+0.123"),
        (-0.5, False, "−0.500"),
        (23.456, False, "23.46"),
        (float("nan"), True, "–"),
        (0.0, False, "0.000"),
        (0.00123, False, "0.00123"),
    ],
)
def test_numbers_as_text(value: float, signed: bool, wanted: str) -> None:
    assert text.number(value, signed=signed) == wanted


def test_groups_are_spread_over_gain_and_photographs() -> None:
    rows = [{"group_id": group, "rollout": 0, "reward": 0.0} for group in "abcdef"]
    reference = pd.DataFrame(rows)
    policy = reference.assign(reward=[0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    photos = {"f": "p", "e": "p", "d": "q", "c": "q", "b": "r", "a": "r"}
    assert sheets.choose_groups(reference, policy, photos, 3) == ["f", "d", "a"]
    assert sheets.choose_groups(reference, policy, photos, 9) == list("fedcba")


def test_picks_same_seeds_and_own_extremes_without_missing_rewards() -> None:
    reference = pd.DataFrame({"rollout": range(5), "reward": [0.5, np.nan, 0.1, 0.9, 0.5]})
    policy = pd.DataFrame({"rollout": [0, 2, 3], "reward": [0.2, 0.8, 0.4]})
    rows = [[(found.role, found.rollout, found.reward) for found in row] for row in sheets.pick(reference, policy)]
    assert rows[0] == [("worst", 2, 0.1), ("median", 4, 0.5), ("best", 3, 0.9)]
    assert rows[1] == [("same seed", 2, 0.8), ("same seed", 3, 0.4)]  # the policy has no candidate 4
    assert rows[2] == [("worst", 0, 0.2), ("median", 3, 0.4), ("best", 2, 0.8)]


def test_block_without_an_original_has_a_plain_tile_in_its_place() -> None:
    import torch

    from dp2osr.shards import encode_image

    picks = [[sheets.Pick("reference", "worst", 0, 0.1)], [], [sheets.Pick("policy", "best", 1, 0.9)]]
    candidates = {("g", number): encode_image(torch.full((3, 20, 28), 0.5)) for number in range(2)}
    sample = {"lr.png": encode_image(torch.rand(3, 5, 7))}
    found = sheets.block("g", "wild.png", picks, sample=sample, reference=candidates, policy=candidates)
    assert [[tile.title for tile in row] for row in found.rows] == [
        ["LR", "reference, worst"],
        ["LR, bicubic"],
        ["no HR", "policy, best"],
    ]
    assert {tile.image.size for row in found.rows for tile in row} == {(28, 20)}


def test_a_setting_is_compared_on_equal_terms() -> None:
    grid = pd.DataFrame([{"M": m, "N/M": share} for m in (8, 16, 32) for share in (1 / 16, 1 / 8, 1 / 4)])
    grid = grid[(grid["M"] > 8) | (grid["N/M"] > 1 / 16)]  # one candidate in sixteen of eight cannot be
    settings = ["M", "N/M"]
    assert set(comparison.balanced(grid, "M", settings)["N/M"]) == {1 / 8, 1 / 4}
    assert set(comparison.balanced(grid, "N/M", settings)["M"]) == {16, 32}
    assert len(comparison.balanced(grid[["M"]], "M", ["M"])) == len(grid)


def test_figures_are_the_same_bytes_twice() -> None:
    words = {"dataset": "holdout", "policy": "default", "reference": "base"}
    first, second = (figures.at_m(evaluation_table(), **words) for _ in range(2))
    assert first == second and "currentColor" in first.svg and first.png.startswith(b"\x89PNG")


def compare_job(root: Path, variants: dict[str, dict[str, Any]]) -> str:
    """Return the settings of a comparison: the default run with `variants` of its pairs and seed."""
    loaded = config.read(root / "config" / "config.yaml")
    base = loaded.runs["default"].model_dump()
    runs = {}
    for name, change in variants.items():
        pairs = base["pairs"] | {key: value for key, value in change.items() if key != "seed"}
        runs[name] = base | {"pairs": pairs, "seed": change.get("seed", 0)}
    rewards = {"default": loaded.rewards["default"].model_dump()}
    return json.dumps({"runs": runs, "rewards": rewards, "evaluate": loaded.evaluate.model_dump()})


def compare_argv(folder: Path, gains: dict[str, float]) -> list[str]:
    """Write the tables of runs with these gains; return the command line without --config and --report."""
    argv = []
    for name, gain in gains.items():
        tables.write(evaluation_table(gain=gain, policy=name), folder / f"{name}.parquet", tables.EVALUATION)
        tables.write(train_log(), folder / f"{name}.log.parquet", tables.TRAIN_LOG)
        tables.write(validation_table(), folder / f"{name}.val.parquet", tables.VALIDATION)
        argv += ["--evaluation", f"{name}/holdout={folder}/{name}.parquet"]
        argv += ["--train-log", f"{name}={folder}/{name}.log.parquet"]
        argv += ["--validation", f"{name}={folder}/{name}.val.parquet"]
    return argv


def test_comparison_of_a_sweep(tmp_path: Path, root: Path) -> None:
    variants = {
        "default": {},
        "again": {"seed": 1},
        "few": {"top": 1},
        "many": {"top": 8},
        "plain": {"weights": "none"},
        "random": {"selection": "random"},
    }
    gains = {"default": 0.30, "again": 0.31, "few": 0.15, "many": 0.32, "plain": 0.29, "random": 0.01}
    argv = compare_argv(tmp_path, gains)
    settings = compare_job(root, variants)
    compare.main([*argv, "--config", settings, "--report", str(tmp_path / "out" / "compare.html")])
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "N/M: mean gain 0.0625: +0.150, 0.25: +0.305, 0.5: +0.320 (range 0.170; two seeds" in page
    assert "most gain at 0.5" in page
    assert re.search(r"HPO weights: mean gain both: \+0\.305, none: \+0\.290 .*: too small a change to tell\.", page)
    table = pd.read_csv(tmp_path / "out" / "compare.csv").set_index("run")
    assert table.loc["few", "mean_difference"] == pytest.approx(0.15) and table.loc["few", "N/M"] == 1 / 16
    assert table.loc["default", "kept_step"] == 40 and (table["guard"] == "ok").all()
    assert (tmp_path / "out" / "figures" / "sweep-holdout.png").is_file()
