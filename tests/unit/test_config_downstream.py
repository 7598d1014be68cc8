"""The section `downstream`: what is accepted, and that what is not names its key."""

from pathlib import Path
from typing import Any

import pytest

from dp2osr import config, config_checks
from dp2osr.errors import UserError

TASK = {"kind": "detection", "images": "i", "annotations": "a.json", "model": "m"}


def load(raw: dict[str, Any], **task: Any) -> config.Config:
    raw["downstream"] = {"coco": TASK | task}
    return config.load(raw)


def test_nothing_is_configured(config_dict: dict[str, Any]) -> None:
    assert config.load(config_dict).downstream == {}


def test_a_task_takes_its_defaults(config_dict: dict[str, Any]) -> None:
    task = load(config_dict, num_seeds=3).downstream["coco"]
    assert (task.kind, task.num_seeds, task.bootstrap, task.dataset) == ("detection", 3, 200, "holdout")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "pose"}, "downstream.coco.kind: .*'detection', 'segmentation' or 'text'.*found 'pose'"),
        ({"kind": ""}, "downstream.coco.kind: .*found ''"),
        ({"modle": "x"}, "downstream.coco.modle: unknown key"),
        ({"dataset": "holdoout"}, "downstream.coco.dataset: found 'holdoout', wanted one of"),
        ({"kind": "text", "architecture": "x"}, "downstream.coco.architecture: found 'x' with kind text"),
        ({"num_seeds": 0}, "downstream.coco.num_seeds"),
    ],
)
def test_wrong_settings_are_named(config_dict: dict[str, Any], task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"config: {message}"):
        load(config_dict, **task)


def test_sources_keep_their_names(config_dict: dict[str, Any]) -> None:
    config_dict["policies"]["lr"] = {}
    config.load(config_dict)
    with pytest.raises(UserError, match="the policy or run 'lr' has the name of a source"):
        load(config_dict)


def test_prompts_of_a_table_are_of_other_photographs(config_dict: dict[str, Any]) -> None:
    config_dict["datasets"]["holdout"]["prompt"] = {"source": "table", "table": "prompts.csv"}
    with pytest.raises(UserError, match=r"downstream\.coco\.dataset: the prompts of 'holdout' are from a table"):
        load(config_dict)


def test_files_must_be_there(config_dict: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("i", "m"):
        Path(name).mkdir()
    known = load(config_dict)
    with pytest.raises(
        UserError, match=r"downstream.coco.annotations: 'a\.json' does not exist, wanted the annotations"
    ):
        config_checks.check_downstream_files(known)
    Path("a.json").touch()
    config_checks.check_downstream_files(known)
    with pytest.raises(UserError, match=r"downstream\.coco\.lr: 'given' does not exist"):
        config_checks.check_downstream_files(load(config_dict, lr="given"))
    with pytest.raises(UserError, match=r"downstream\.coco\.model: found '', wanted a model"):
        config_checks.check_downstream_files(load(config_dict, model=""))


@pytest.mark.parametrize(("kind", "package"), [("detection", "pycocotools"), ("segmentation", "torchmetrics")])
def test_a_missing_package_names_the_extra(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf"{package}, which is not installed; .*pip install 'dp2o-sr\[downstream\]'"):
        config_checks.need_extra(kind)
    config_checks.need_extra("text")
