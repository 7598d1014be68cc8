"""Published figures: the file's shape, single values against the paper's table, and the table beside ours."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from dp2osr import published
from dp2osr.config_datasets import PublishedSettings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.report.page import render
from dp2osr.report.published import beside, section

MODELS = ("C-SD2", "DP2O (SD2)", "C-FLUX", "DP2O (FLUX)")


def test_shape_of_the_file() -> None:
    found = published.figures()
    assert len({(f.dataset, f.model, f.metric, f.statistic) for f in found}) == len(found) == 138
    table = Counter((f.dataset, f.model) for f in found if "comparison of models" in f.source)
    assert table == {(dataset, model): 14 for dataset in ("Syn-Test", "RealSR") for model in MODELS}
    assert all(f.source for f in found)
    unknown = {f.metric for f in found if "comparison" in f.source} - set(METRICS)
    assert unknown <= {"vq_r1", "nima", "topiq_iaa"}


@pytest.mark.parametrize(
    ("dataset", "model", "metric", "value"),
    [
        ("Syn-Test", "C-SD2", "lpips", 0.4332),
        ("Syn-Test", "DP2O (SD2)", "afine_fr", -0.8962),
        ("Syn-Test", "DP2O (FLUX)", "ssim", 0.5143),
        ("RealSR", "C-FLUX", "qalign", 3.6499),
        ("RealSR", "DP2O (SD2)", "psnr", 22.49),
        ("RealSR", "DP2O (FLUX)", "topiq_nr", 0.7416),
        ("RealSR", "C-SD2", "vq_r1", 4.08),
        ("old-films", "DP2O, as others report", "niqe", 5.42),
    ],
)
def test_single_values(dataset: str, model: str, metric: str, value: float) -> None:
    assert published.means(dataset, model)[metric].value == value


def test_seeds_have_a_deviation_and_are_no_means_over_images() -> None:
    (musiq,) = (f for f in published.figures() if (f.model, f.metric) == ("C-SD2", "musiq") and f.std is not None)
    assert (musiq.value, musiq.std, musiq.statistic) == (70.34, 1.79, "mean over 10 seeds")
    assert published.means("RealSR", "C-SD2")["musiq"].value == 70.44


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset,model\na,b\n", "found columns"),
        ("dataset,model,metric,statistic,value,std,source\nA,B,lpips,mean,.4,,\n", "line 2: 'source' is empty"),
        ("dataset,model,metric,statistic,value,std,source\nA,B,lpips,mean,high,,S\n", "line 2: value 'high'"),
    ],
)
def test_a_wrong_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "figures.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        published.read(tmp_path / "figures.csv")


def evaluation(policy: str, **values: float) -> pd.DataFrame:
    """Return rows of tables.EVALUATION for the mean of some metrics."""
    frame = pd.DataFrame({"policy": policy, "statistic": list(values), "value": list(values.values())})
    for name in ("value_low", "value_high", "reference", "difference", "ci_low", "ci_high"):
        frame[name] = 0.0
    return frame.assign(m=32, in_reward=True, higher_better=True, num_groups=100, num_photos=100)


def test_difference_is_ours_less_the_published_one() -> None:
    frame = pd.concat([evaluation("base", lpips=0.4246, musiq=70.0, gmsd=0.1), evaluation("default", lpips=0.4)])
    settings = PublishedSettings(datasets={"mine": "RealSR"}, policies={"base": "C-SD2", "default": "DP2O (SD2)"})
    found = beside(frame, "mine", settings)
    assert found[["policy", "metric", "published", "here"]].to_numpy().tolist() == [
        ["base", "lpips", 0.4146, 0.4246],
        ["base", "musiq", 70.44, 70.0],
        ["default", "lpips", 0.4045, 0.4],
    ]
    assert found["difference"].tolist() == pytest.approx([0.01, -0.44, -0.0045])
    assert found["better"].tolist() == [False, False, True]
    page = render("published.html.j2", {"test": {"name": "mine", "published": section(found, "RealSR")}})
    for text in ("C-SD2", "lpips ↓", "0.4146", "0.4246", "+0.0100", "−0.4400", "2510.18851"):
        assert text in page
    assert "100 images, 32 candidates each" in page


def test_nothing_is_shown_unless_the_config_names_both() -> None:
    frame = evaluation("base", lpips=0.4)
    for datasets, policies in (({}, {"base": "C-SD2"}), ({"mine": "RealSR"}, {}), ({}, {})):
        found = beside(frame, "mine", PublishedSettings(datasets=datasets, policies=policies))
        assert found.empty and section(found, "") is None
    assert render("published.html.j2", {"test": {"name": "mine", "published": None}}).strip() == ""
