"""The metric table against pyiqa's registry."""

import re

import pytest

from dp2osr.metrics import METRICS, arrow, sign

REWARD = ["lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]


@pytest.fixture(scope="module")
def registry() -> dict:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return DEFAULT_CONFIGS


# What a name stands for: an update of pyiqa that takes another model or another colour space must not go unseen.
OPTIONS = {
    "psnr": {"type": "PSNR", "test_y_channel": False},
    "ssim": {"type": "SSIM", "downsample": False, "test_y_channel": True},
    "lpips": {"type": "LPIPS", "net": "alex", "version": "0.1"},
    "topiq_fr": {
        "type": "CFANet",
        "semantic_model_name": "resnet50",
        "model_name": "cfanet_fr_kadid_res50",
        "use_ref": True,
    },
    "topiq_nr": {
        "type": "CFANet",
        "semantic_model_name": "resnet50",
        "model_name": "cfanet_nr_koniq_res50",
        "use_ref": False,
    },
    "afine_fr": {"type": "AFINE", "model_type": "afine_fr", "pretrained": True},
    "afine_nr": {"type": "AFINE", "model_type": "afine_nr", "pretrained": True},
    "maniqa": {"type": "MANIQA", "train_dataset": "koniq", "scale": 0.8},
    "musiq": {"type": "MUSIQ", "pretrained": "koniq10k"},
    "clipiqa+": {"type": "CLIPIQA", "model_type": "clipiqa+"},
    "qalign": {"type": "QAlign"},
    "nima": {"type": "NIMA", "num_classes": 10, "base_model_name": "inception_resnet_v2"},
    "topiq_iaa": {
        "type": "CFANet",
        "semantic_model_name": "swin_base_patch4_window12_384",
        "model_name": "cfanet_iaa_ava_swin",
        "use_ref": False,
        "inter_dim": 512,
        "num_heads": 8,
        "num_class": 10,
    },
}
PYIQA = [name for name, metric in METRICS.items() if not metric.own]


@pytest.mark.parametrize("name", PYIQA)
def test_kind_and_direction_are_pyiqas(registry: dict, name: str) -> None:
    found = registry[METRICS[name].of or name]
    assert found["metric_mode"] == METRICS[name].kind.upper()
    assert found.get("lower_better", False) == METRICS[name].lower_better


@pytest.mark.parametrize("name", PYIQA)
def test_upper_end_of_the_range_is_within_pyiqas(registry: dict, name: str) -> None:
    """pyiqa states the range as prose, "0, 1" or "~0, ~1"; where we state both ends they are its."""
    metric = METRICS[name]
    prose = registry[metric.of or name].get("score_range", "")
    stated = [float(number) for number in re.findall(r"-?\d+\.?\d*", prose)]
    if metric.low is not None and metric.high is not None and len(stated) == 2:
        assert [metric.low, metric.high] == stated


def test_names_stand_for_the_same_models(registry: dict) -> None:
    assert {name: dict(registry[name]["metric_opts"]) for name in OPTIONS} == OPTIONS
    assert set(OPTIONS) >= {name for name, metric in METRICS.items() if metric.needs_weights}


def test_what_pyiqa_does_not_know_is_our_own(registry: dict) -> None:
    assert [name for name, metric in METRICS.items() if metric.own] == ["vqr1"]
    assert not {"vqr1", "psnr_y", "ssim_y"} & set(registry)  # else the name would have two meanings


def test_sizes_and_memory() -> None:
    afine = METRICS["afine_fr"]
    assert [afine.misfit(*size) for size in ((64, 96), (64, 100), (31, 32))] == ["", "wrong_size", "too_small"]
    assert METRICS["psnr"].misfit(1, 7) == ""
    assert METRICS["musiq"].temporary(10, 20) == 256 * 200 + 15 * 2**20
    assert METRICS["vqr1"].named("nan", 64, 64) == "unparsed"


def test_the_papers_reward_is_known() -> None:
    assert all(METRICS[name].needs_weights for name in REWARD)
    assert [name for name in REWARD if METRICS[name].lower_better] == ["lpips", "afine_fr", "afine_nr"]


def test_sign_and_arrow_agree() -> None:
    assert (sign("psnr"), arrow("psnr")) == (1.0, "↑")
    assert (sign("gmsd"), arrow("gmsd")) == (-1.0, "↓")
    assert all((sign(name) < 0) == (arrow(name) == "↓") for name in METRICS)
