"""The configuration: what is accepted, and that what is not names its key."""

import itertools
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from dp2osr import config
from dp2osr.config_datasets import metric_groups
from dp2osr.errors import UserError

OVERLAYS = sorted(path.name for path in (Path(__file__).parents[2] / "config").glob("*.yaml"))


def rejected(raw: dict[str, Any], *words: str) -> None:
    """Check that `raw` is refused in one line that holds each of the words."""
    with pytest.raises(UserError) as found:
        config.load(raw)
    message = str(found.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def sections() -> list[type[config.Strict]]:
    """Return every section model of config.py."""
    found = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, config.Strict)]
    return [model for model in found if model is not config.Strict]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_file_in_config_loads_over_the_defaults(root: Path, name: str) -> None:
    config.read(root / "config" / "config.yaml", root / "config" / name)


@pytest.mark.parametrize("model", sections(), ids=lambda model: model.__name__)
def test_no_default_stands_in_code(model: type[config.Strict]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.is_required()] == []
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]


def test_settings_do_not_change_after_loading(config_dict: dict[str, Any]) -> None:
    loaded = config.load(config_dict)
    with pytest.raises(pydantic.ValidationError):
        loaded.seed = 1


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ((), "sede"),
        (("rollout",), "num_rolouts"),
        (("runs", "default"), "refrence"),
        (("dataset_defaults", "degradation", "first", "blur"), "sigmas"),
    ],
)
def test_unknown_key_is_named(config_dict: dict[str, Any], where: tuple[str, ...], key: str) -> None:
    section = config_dict
    for part in where:
        section = section[part]
    section[key] = 1
    rejected(config_dict, key, "unknown key")


def test_missing_key_is_named(config_dict: dict[str, Any]) -> None:
    del config_dict["run_defaults"]["train"]["beta"]
    rejected(config_dict, "runs.default.train.beta", "missing")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rollout", "batch_size", 0),
        ("rollout", "batch_size", "many"),
        ("rollout", "image_format", "jpeg"),
        ("evaluate", "confidence", 1.0),
        ("report", "zoom", 1.5),
    ],
)
def test_wrong_value_is_named_with_what_was_found(
    config_dict: dict[str, Any], section: str, key: str, value: object
) -> None:
    config_dict[section][key] = value
    rejected(config_dict, f"{section}.{key}", f"found {value!r}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(config_dict: dict[str, Any], value: float) -> None:
    config_dict["run_defaults"]["train"]["beta"] = value
    rejected(config_dict, "runs.default.train.beta")


def test_winners_and_losers_may_not_overlap(config_dict: dict[str, Any]) -> None:
    config_dict["rewards"]["default"]["num_rollouts"] = 15
    config_dict["run_defaults"]["pairs"]["top"] = 7
    config.load(config_dict)
    config_dict["run_defaults"]["pairs"]["top"] = 8
    rejected(config_dict, "runs.default.pairs.top", "found 8", "at most 7")


def test_misspelt_metric_is_named_with_those_that_exist(config_dict: dict[str, Any]) -> None:
    config_dict["iqa"]["groups"]["light"][0] = "fsmi"
    rejected(config_dict, "iqa.groups.light", "'fsmi'", "fsim")


def test_groups_of_test_sets_alone(config_dict: dict[str, Any]) -> None:
    config_dict["iqa"]["groups"]["evaluation"] = ["ms_ssim", "vif"]
    config_dict["iqa"]["test_only"] = ["evaluation"]
    found = config.load(config_dict)
    assert found.runs["default"].tests == ["holdout"]
    groups = {name: list(metric_groups(found, name)) for name in ("train", "val", "holdout")}
    assert groups == {"train": ["light"], "val": ["light"], "holdout": ["light", "evaluation"]}
    config_dict["rewards"]["default"]["fr"] = ["vif"]
    rejected(config_dict, "rewards.default", "found 'vif'", "iqa.test_only")
    config_dict["rewards"]["default"]["fr"] = ["gmsd"]
    config_dict["iqa"]["test_only"] = ["evalution"]
    rejected(config_dict, "iqa.test_only", "found 'evalution'", "evaluation, light")


def test_vqr1_needs_a_model_and_judges_test_sets_alone(config_dict: dict[str, Any]) -> None:
    config_dict["iqa"]["groups"]["evaluation"] = ["vqr1"]
    rejected(config_dict, "iqa.vqr1.model: found ''")
    config_dict["iqa"]["vqr1"]["model"] = "models/vqr1"
    config.load(config_dict)
    config_dict["rewards"]["default"]["nr"] = ["vqr1"]
    rejected(config_dict, "rewards.default: found 'vqr1'", "test sets alone")


def test_reward_takes_only_metrics_that_are_scored(config_dict: dict[str, Any]) -> None:
    config_dict["rewards"]["default"]["fr"] = ["vsi"]
    rejected(config_dict, "rewards.default.fr", "'vsi'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reference", "bass"),
        ("dataset", "trian"),
        ("reward", "defualt"),
        ("tests", ["holdout", "testset"]),
        ("controls", ["blured"]),
    ],
)
def test_a_name_that_does_not_exist_is_refused(config_dict: dict[str, Any], key: str, value: object) -> None:
    config_dict["runs"]["default"][key] = value
    wrong = value[-1] if isinstance(value, list) else value
    rejected(config_dict, f"runs.default.{key}", f"'{wrong}'", "wanted one of")


def test_guard_dataset_is_checked_where_the_guard_is_on(config_dict: dict[str, Any]) -> None:
    guard = config_dict["run_defaults"]["train"]["guard"]
    guard["dataset"] = "vall"
    rejected(config_dict, "runs.default.train.guard.dataset", "'vall'")
    guard["every"] = 0
    config.load(config_dict)


def test_runs_that_refer_to_each_other_in_a_circle(config_dict: dict[str, Any]) -> None:
    config_dict["runs"] = {"a": {"reference": "b"}, "b": {"reference": "a"}}
    rejected(config_dict, "circle", "a -> b -> a")


def test_a_run_may_follow_a_run(config_dict: dict[str, Any]) -> None:
    config_dict["runs"]["second"] = {"reference": "default"}
    assert config.load(config_dict).root_policy("second") == "base"


def test_a_run_cannot_start_from_a_derived_policy(config_dict: dict[str, Any]) -> None:
    config_dict["runs"]["default"]["reference"] = "blurred"
    rejected(config_dict, "runs.default.reference", "derived")


def test_a_run_and_a_policy_cannot_share_a_name(config_dict: dict[str, Any]) -> None:
    config_dict["runs"]["base"] = {}
    rejected(config_dict, "runs.base", "same name")


@pytest.mark.parametrize("name", ["../out", "a/b", "a.b", "", "-x", "a b"])
def test_names_that_would_be_paths_are_refused(config_dict: dict[str, Any], name: str) -> None:
    config_dict["datasets"][name] = {}
    rejected(config_dict, "datasets")


def test_a_section_of_the_wrong_kind(config_dict: dict[str, Any]) -> None:
    config_dict["runs"] = ["default"]
    rejected(config_dict, "runs", "list")


def test_num_rollouts_is_the_largest_wanted(config_dict: dict[str, Any]) -> None:
    config_dict["rewards"]["large"] = config_dict["rewards"]["default"] | {"num_rollouts": 32}
    config_dict["runs"]["more"] = {"reward": "large", "tests": []}
    loaded = config.load(config_dict)
    assert loaded.num_rollouts("train") == 32
    assert loaded.num_rollouts("holdout") == 16
    assert loaded.num_rollouts("base") == loaded.rollout.num_rollouts


def test_an_overlay_changes_what_it_names_and_nothing_else(root: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("run_defaults: {pairs: {top: 2}}\n")
    base = root / "config" / "config.yaml"
    before, after = config.read(base), config.read(base, overlay)
    assert after.runs["default"].pairs.top == 2
    assert after.runs["default"].pairs.weights == before.runs["default"].pairs.weights
    assert after.model_copy(update={"runs": before.runs}) == before


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        config.read(tmp_path / "nothing.yaml")


def photographs(entries: list[str]) -> set[str]:
    """Return the built-in photographs of a list; the two halves of a stereo pair count as one."""
    names = set()
    for entry in entries:
        if not entry.startswith("builtin:dead-leaves/"):
            names.add(entry.removesuffix("_left").removesuffix("_right"))
            continue
        first, _, last = entry.removeprefix("builtin:dead-leaves/").partition("..")
        names |= {f"dead-leaves/{number}" for number in range(int(first), int(last or first) + 1)}
    return names


def test_the_built_in_splits_do_not_meet(root: Path) -> None:
    datasets = yaml.safe_load((root / "config" / "config.yaml").read_text())["datasets"]
    splits = {name: photographs(datasets[name]["images"]) for name in ("base", "train", "val", "holdout")}
    assert all(splits.values())
    for one, other in itertools.combinations(splits, 2):
        assert splits[one] & splits[other] == set(), f"{one} and {other} share photographs"
    assert photographs(datasets["pristine"]["images"]) <= splits["base"] | splits["train"], (
        "NIQE saw a val or held-out one"
    )


def test_resshift_has_the_published_ranges(root: Path) -> None:
    """The first-order ranges of the paper's degradation, method.md; the second order's stand in config.yaml."""
    files = [root / "config" / name for name in ("config.yaml", "resshift.yaml")]
    found = config.read(*files).datasets["train"].degradation
    first, second, final = found.first, found.second, found.final
    assert (first.blur.size, first.blur.pad_to, first.blur.sigma) == ((3, 19), 21, (0.2, 3.0))
    assert (first.blur.probability, first.blur.sinc_probability) == (1.0, 0.1)
    assert (first.resize.up, first.resize.down, first.resize.keep, first.resize.scale) == (0.2, 0.7, 0.1, (0.15, 1.5))
    assert (first.noise.gaussian_sigma, first.noise.poisson_scale) == ((1.0, 30.0), (0.05, 3.0))
    assert (first.noise.gaussian_probability, first.noise.grey_probability) == (0.5, 0.4)
    assert first.jpeg_quality == final.jpeg_quality == (30, 95) and found.second_probability == 0
    assert (final.sinc_probability, final.sinc_size) == (0.8, (3, 13))
    assert (second.blur.probability, second.blur.size, second.blur.pad_to, second.blur.sigma) == (
        0.8,
        (3, 13),
        15,
        (0.2, 1.5),
    )
    assert (second.resize.up, second.resize.down, second.resize.keep, second.resize.scale) == (
        0.3,
        0.4,
        0.3,
        (0.3, 1.2),
    )
    assert (second.noise.gaussian_sigma, second.noise.poisson_scale) == ((1.0, 25.0), (0.05, 2.5))


def test_half_precision_policy_with_plain_training(config_dict: dict[str, Any]) -> None:
    config_dict["policy_defaults"]["sampling"]["dtype"] = "float16"
    rejected(config_dict, "runs.default.train.precision", "wanted precision fp16 or bf16")
    config_dict["run_defaults"]["train"]["precision"] = "bf16"
    config.load(config_dict)


@pytest.mark.parametrize(
    ("where", "value", "wanted"),
    [
        (("first", "blur", "sigma"), [3.0, 0.2], "a range is [low, high]"),
        (("first", "blur", "size"), [4, 8], "kernel sizes are odd"),
        (("first", "blur", "pad_to"), 9, "no less than the largest size 11"),
        (("first", "jpeg_quality"), [95, 30], "a range is [low, high]"),
        (("final", "jpeg_quality"), [30, 101], "less than or equal to 100"),
        (("second", "noise", "poisson_scale"), [0.0, 1.0], "greater than 0"),
        (("second", "jpeg_quality"), [30, 95], "unknown key"),
        (("final", "sinc_size"), [3, 23], "no less than the largest size 23"),
    ],
)
def test_degradation_range_is_named(
    config_dict: dict[str, Any], where: tuple[str, ...], value: Any, wanted: str
) -> None:
    section = config_dict["dataset_defaults"]["degradation"]
    for part in where[:-1]:
        section = section[part]
    section[where[-1]] = value
    with pytest.raises(UserError, match=f"degradation.{where[0]}") as found:
        config.load(config_dict)
    assert wanted in str(found.value)
