"""The paper's families, bold values and digits; Markdown, LaTeX and CSV that hold the same numbers, escaped."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from dp2osr.config import RewardSettings
from dp2osr.report import families, markup, text
from dp2osr.report.markup import Cell, Grid
from made_up_run import evaluation_row

TUNED_ON = RewardSettings(fr=["lpips"], nr=["musiq", "afine_nr"], weight_fr=0.5, num_rollouts=8)
WORDS = {"dataset": "realsr", "policy": "my_run", "reference": "base", "level": "95 %"}


def row(metric: str, reference: float, value: float, half: float, **other: object) -> dict[str, object]:
    """Return an evaluation row of a metric; `half` is half the width of the difference's interval."""
    ends = {"ci_low": value - reference - half, "ci_high": value - reference + half}
    return evaluation_row("my_run", metric, 8, reference, value - reference, **ends, **other)


def evaluation() -> pd.DataFrame:
    """Return two trained and three held-out metrics with the paper's RealSR values of C-SD2, and one made-up tie."""
    rows = [
        row("psnr", 23.61, 22.49, 0.2),
        row("lpips", 0.4146, 0.4045, 0.002, higher_better=False),
        row("musiq", 70.44, 73.16, 0.5),
        row("musiq__std", 1.79, 0.81, 0.1, higher_better=False),
        row("afine_nr", -1.0357, -1.1555, 0.2, higher_better=False),
        row("nima", 4.9914, 5.2324, 0.01),
        row("ssim", 0.65661, 0.65664, 0.00001),
    ]
    return families.mark_trained(pd.DataFrame(rows), TUNED_ON)


@pytest.fixture
def lines() -> list[families.Line]:
    """Return the lines of `evaluation`."""
    return families.lines(text.at_largest_m(evaluation(), "my_run"))


def test_families_are_in_the_papers_order(lines: list[families.Line]) -> None:
    assert [(line.family, line.metric) for line in lines] == [
        ("trained FR", "lpips"),
        ("trained NR", "musiq"),
        ("trained NR", "afine_nr"),
        ("untrained NR", "nima"),
        ("untrained FR", "psnr"),
        ("untrained FR", "ssim"),
    ]


def test_trained_is_what_the_run_was_tuned_on_not_what_judges_it() -> None:
    judged_by_psnr = evaluation().assign(in_reward=True)
    found = families.mark_trained(judged_by_psnr, TUNED_ON).set_index("statistic")["in_reward"]
    assert found["musiq"] and found["musiq__std"] and not found["psnr"] and found.dtype == bool
    other = pd.DataFrame([evaluation_row("my_run", "fr", 8, 0.5, 0.1, in_reward=True)])
    assert families.mark_trained(other, TUNED_ON)["in_reward"].all()  # what is no metric stays as it is


def test_the_better_by_direction_as_printed(lines: list[families.Line]) -> None:
    winners = {line.metric: line.winner for line in lines}
    assert winners == {
        "lpips": "policy",
        "musiq": "policy",
        "afine_nr": "policy",
        "nima": "policy",
        "psnr": "reference",
        "ssim": "",  # differs in the fifth decimal, and prints the same
    }


def test_digits_by_range(lines: list[families.Line]) -> None:
    shown = {line.metric: (line.number(line.row.reference), line.difference) for line in lines}
    assert shown["musiq"] == ("70.44", "+2.72†") and shown["psnr"] == ("23.61", "−1.12†")
    assert shown["afine_nr"] == ("−1.0357", "−0.1198")  # its interval holds zero: bold, but no mark
    assert shown["ssim"] == ("0.6566", "0.0000†")
    assert families.fixed(float("nan"), 2) == "–" and families.fixed(-0.00001, 4, signed=True) == "0.0000"


def test_markdown(lines: list[families.Line]) -> None:
    found = markup.markdown(families.metric_grid(lines, **WORDS)).splitlines()
    assert found[0].startswith("my\\_run against base on realsr: raw scores, mean over 8 seeds")
    assert found[2] == "| family | metric | base | my\\_run | difference | 95 % interval |"
    assert found[3] == "| --- | --- | ---: | ---: | ---: | ---: |"
    assert found[4] == "| trained FR | lpips ↓ | 0.4146 | **0.4045** | −0.0101† | \\[−0.0121, −0.0081\\] |"
    assert found[8] == "| untrained FR | psnr ↑ | **23.61** | 22.49 | −1.12† | \\[−1.32, −0.92\\] |"
    assert len(found) == 4 + len(lines)


def test_latex(lines: list[families.Line]) -> None:
    found = markup.latex(families.metric_grid(lines, **WORDS))
    assert "base & my\\_run & difference & 95 \\% interval \\\\" in found
    assert "\\multicolumn{5}{l}{\\emph{untrained NR}} \\\\" in found
    assert "psnr $\\uparrow$ & \\textbf{23.61} & 22.49 & $-$1.12$^{\\dagger}$ & {[}$-$1.32, $-$0.92{]} \\\\" in found
    assert found.isascii() and found.count("{") == found.count("}")
    body = found[found.index("\\toprule") : found.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert {line.count("&") for line in rows} == {4}


def test_stability(lines: list[families.Line]) -> None:
    grid = families.stability_grid(lines, **WORDS)
    assert [name for name, _ in grid.sections] == ["trained NR"]  # the only metric with a std
    cells = [cell.text for cell in grid.sections[0][1][0]]
    assert cells == ["musiq ↑", "70.44 ± 1.79", "73.16 ± 0.81", "−0.98†", "[−1.08, −0.88]"]
    assert "70.44 $\\pm$ 1.79" in markup.latex(grid)


def test_csv_has_full_precision(lines: list[families.Line]) -> None:
    frame = families.frame(lines).set_index("metric")
    assert frame.loc["ssim", "policy"] == 0.65664 and frame.loc["ssim", "better"] == ""
    assert frame.loc["musiq", "policy_std"] == pytest.approx(0.81) and frame["reference_std"].isna().sum() == 5
    assert frame.loc["psnr", ["family", "better", "judged"]].to_list() == ["untrained FR", "reference", "worse"]
    assert not frame.loc["psnr", "in_reward"] and frame.loc["lpips", "in_reward"]


def test_the_papers_layout_over_test_sets(lines: list[families.Line]) -> None:
    blind = [line for line in lines if line.metric in ("musiq", "nima")]  # a set without HR
    grid = families.paper_grid([("realsr", lines), ("wild", blind)], policy="my_run", reference="base")
    assert grid.spans == (("trained FR", 1), ("trained NR", 2), ("untrained NR", 1), ("untrained FR", 2))
    latex = markup.latex(grid)
    assert "\\cmidrule(lr){2-2}\\cmidrule(lr){3-4}\\cmidrule(lr){5-5}\\cmidrule(lr){6-7}" in latex
    assert "base & -- & 70.44 & -- & 4.9914 & -- & -- \\\\" in latex
    markdown = markup.markdown(grid)
    assert "| test set | model | lpips ↓ (trained FR) | musiq ↑ (trained NR) |" in markdown
    assert "| realsr | my\\_run | **0.4045** | **73.16** | **−1.1555** | **5.2324** | 22.49 | 0.6566 |" in markdown


def test_whatever_a_name_holds_is_escaped() -> None:
    name = "a|b_c&d%e#f{g}\\h~i^j<script>[k]$l`m*n\no"
    grid = Grid(name, "s", ["x", name], [(name, [[Cell(name), Cell(name, bold=True)]])])
    lines = markup.markdown(grid).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [0, 0, 4, 4, 4]
    assert not re.search(r"(?<!\\)[<`_]", "".join(lines))
    latex = markup.latex_text(name)
    assert latex.startswith(
        "a\\textbar{}b\\_c\\&d\\%e\\#f\\{g\\}\\textbackslash{}h\\textasciitilde{}i\\textasciicircum{}j"
    )
    assert "\n" not in latex and "\\textless{}script\\textgreater{}{[}k{]}\\$l" in latex


def test_a_metric_without_a_number_is_a_dash(lines: list[families.Line]) -> None:
    nothing = float("nan")
    bare = replace(
        lines[0], row=replace(lines[0].row, value=nothing, difference=nothing, ci_low=nothing, ci_high=nothing)
    )
    assert (bare.winner, bare.difference, bare.interval, bare.number(nothing)) == ("", "–", "–", "–")
