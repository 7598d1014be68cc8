"""The metric table against pyiqa's registry."""

import re

import pytest

from dp2osr.metrics import METRICS, arrow, sign

REWARD = ["lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]


@pytest.fixture(scope="module")
def registry() -> dict:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return DEFAULT_CONFIGS


@pytest.mark.parametrize("name", METRICS)
def test_kind_and_direction_are_pyiqas(registry: dict, name: str) -> None:
    assert registry[name]["metric_mode"] == METRICS[name].kind.upper()
    assert registry[name].get("lower_better", False) == METRICS[name].lower_better


@pytest.mark.parametrize("name", METRICS)
def test_upper_end_of_the_range_is_within_pyiqas(registry: dict, name: str) -> None:
    """pyiqa states the range as prose, "0, 1" or "~0, ~1"; where we state both ends they are its."""
    metric = METRICS[name]
    stated = [float(number) for number in re.findall(r"-?\d+\.?\d*", registry[name].get("score_range", ""))]
    if metric.low is not None and metric.high is not None and len(stated) == 2:
        assert [metric.low, metric.high] == stated


def test_the_papers_reward_is_known() -> None:
    assert all(METRICS[name].needs_weights for name in REWARD)
    assert [name for name in REWARD if METRICS[name].lower_better] == ["lpips", "afine_fr", "afine_nr"]


def test_sign_and_arrow_agree() -> None:
    assert (sign("psnr"), arrow("psnr")) == (1.0, "↑")
    assert (sign("gmsd"), arrow("gmsd")) == (-1.0, "↓")
    assert all((sign(name) < 0) == (arrow(name) == "↓") for name in METRICS)
