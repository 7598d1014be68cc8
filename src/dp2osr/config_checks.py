"""What one section of the configuration says of another: names exist, N fits M, metrics are scored, no circles."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp2osr import config_datasets, config_downstream, metrics, published, remote, weights
from dp2osr.errors import UserError

if TYPE_CHECKING:
    from dp2osr.config import Config, PolicySettings, PromptSettings, RunSettings, TrainSettings

RESERVED = frozenset({"benchmarks", "downstream", "fetched", "logs", "pretrain", "report", "runs"})
PROMPT_FILES = {
    "tags.ram": "RAM's weights (ram_swin_large_14m.pth)",
    "tags.dape": "DAPE's weights (DAPE.pth), or an empty one",
    "tags.tag_list": "RAM's list of tags (ram_tag_list.txt)",
    "tags.thresholds": "a file with a threshold a tag (ram_tag_list_threshold.txt), or an empty one",
    "caption.model": "the folder of an image-to-text model of transformers",
}


def known(key: str, value: str, names: Mapping[str, Any] | set[str]) -> None:
    if value not in names:
        raise UserError(f"config: {key}: found '{value}', wanted one of {', '.join(sorted(names))}")


def check_precision(key: str, train: "TrainSettings", policy: "PolicySettings") -> None:
    """Half-precision networks are trained under mixed precision; `key` is where the settings of `train` stand."""
    if train.precision == "no" and policy.sampling.dtype != "float32":
        raise UserError(
            f"config: {key}.precision: found 'no' with the policy's sampling.dtype '{policy.sampling.dtype}'; "
            "wanted precision fp16 or bf16, or dtype float32"
        )


def check_references(config: "Config") -> None:
    """Check what one section says of another: names exist, N fits M, metrics are scored, no circles."""
    models = {*config.policies, *config.runs}
    for name, dataset in config.datasets.items():
        if name in RESERVED:
            raise UserError(f"config: datasets.{name}: the results tree uses this name itself; wanted another")
        _check_prompt(f"datasets.{name}.prompt", dataset.prompt)
    if twice := set(config.policies) & set(config.runs):
        raise UserError(f"config: runs.{sorted(twice)[0]}: a policy has the same name")
    for group, members in config.iqa.groups.items():
        for metric in members:
            known(f"iqa.groups.{group}", metric, metrics.METRICS)
    _check_judges(config)
    scored = {metric for members in config.iqa.groups.values() for metric in members}
    for name, reward in config.rewards.items():
        for side in ("fr", "nr"):
            for metric in getattr(reward, side):
                known(f"rewards.{name}.{side}", metric, metrics.METRICS)
                known(f"rewards.{name}.{side} (metrics in iqa.groups)", metric, scored)
    known("iqa.niqe.dataset", config.iqa.niqe.dataset, config.datasets)
    known("pretrain.dataset", config.pretrain.dataset, config.datasets)
    known("pretrain.policy", config.pretrain.policy, config.policies)
    for name, policy in config.policies.items():
        if policy.backend == "sd" and policy.sampling.true_guidance > 1:
            raise UserError(
                f"config: policies.{name}.sampling.true_guidance: found {policy.sampling.true_guidance:g}, wanted 1 "
                "for backend sd, whose classifier-free guidance is sampling.guidance"
            )
        if policy.derive:
            known(f"policies.{name}.derive_from", policy.derive_from, models)
    for name, run in config.runs.items():
        _check_run(config, name, run, models)
    config_datasets.check_config(config)
    for kind, named in (("datasets", set(config.datasets)), ("policies", models)):
        for name, there in getattr(config.report.published, kind).items():
            known(f"report.published.{kind}", name, named)
            known(f"report.published.{kind}.{name}", there, published.names(kind))
    _check_downstream(config, models)
    weights.needs(config)  # stops at a `hub:` name that is none
    remote.check_local(config)


def _check_judges(config: "Config") -> None:
    """Groups that only test sets are scored with hold no metric of a reward, and VisualQuality-R1 has a model."""
    groups = config.iqa.groups
    for group in config.iqa.test_only:
        known("iqa.test_only", group, groups)
    everywhere = {
        metric for group, members in groups.items() if group not in config.iqa.test_only for metric in members
    }
    alone = {metric for members in groups.values() for metric in members} - everywhere
    for name, reward in config.rewards.items():
        for metric in (*reward.fr, *reward.nr):
            if metric in alone:
                raise UserError(
                    f"config: rewards.{name}: found '{metric}', which the groups of iqa.test_only alone have; "
                    "wanted it in a group that training data are scored with"
                )
            if metric == "vqr1":
                raise UserError(f"config: rewards.{name}: found 'vqr1', wanted none: it judges test sets alone")
    if any("vqr1" in members for members in groups.values()) and not config.iqa.vqr1.model:
        raise UserError("config: iqa.vqr1.model: found '', wanted VisualQuality-R1's folder or hub: name")


def prompt_files(prompt: "PromptSettings") -> dict[str, str]:
    """Return the paths of the model that describes a data set's images, by their keys; some may be empty."""
    if prompt.source == "tags":
        return {f"tags.{name}": getattr(prompt.tags, name) for name in ("ram", "dape", "tag_list", "thresholds")}
    return {"caption.model": prompt.caption.model} if prompt.source == "caption" else {}


def _check_prompt(key: str, prompt: "PromptSettings") -> None:
    for part, path in prompt_files(prompt).items():
        if not path and "or an empty one" not in PROMPT_FILES[part]:
            raise UserError(f"config: {key}.{part}: found '', wanted {PROMPT_FILES[part]}")


def check_prompt_files(config: "Config") -> None:
    """Check that the files of models that describe images are there: for a workflow, not where it is only planned."""
    for name, dataset in config.datasets.items():
        for part, path in prompt_files(dataset.prompt).items():
            if path and not path.startswith("hub:") and not Path(path).exists():
                key = f"datasets.{name}.prompt.{part}"
                raise UserError(f"config: {key}: '{path}' does not exist, wanted {PROMPT_FILES[part]}")


def _check_downstream(config: "Config", models: set[str]) -> None:
    for name, task in config.downstream.items():
        known(f"downstream.{name}.dataset", task.dataset, config.datasets)
        if taken := models & set(config_downstream.SOURCES):
            raise UserError(
                f"config: downstream.{name}: the policy or run '{sorted(taken)[0]}' has the name of a source "
                f"({', '.join(config_downstream.SOURCES)}); wanted another name for it"
            )
        if task.architecture and task.kind != "detection":
            raise UserError(
                f"config: downstream.{name}.architecture: found '{task.architecture}' with kind {task.kind}; wanted "
                "an empty one, and in `model` a folder in transformers' layout"
            )
        if config.datasets[task.dataset].prompt.source == "table":
            raise UserError(
                f"config: downstream.{name}.dataset: the prompts of '{task.dataset}' are from a table, which does not "
                "know the benchmark's photographs; wanted a data set with prompt.source none, text, tags or caption"
            )


def check_downstream_files(config: "Config") -> None:
    """Check that what benchmarks need is there, packages too: for a workflow, not where it is only planned."""
    for name, task in config.downstream.items():
        wanted = {"images": "the folder of photographs", "annotations": "the annotations", "model": "a model"}
        for key, what in (wanted | ({"lr": "the folder of LR images"} if task.lr else {})).items():
            path = getattr(task, key)
            if not path or not Path(path).exists():
                found = f"'{path}' does not exist" if path else "found ''"
                raise UserError(f"config: downstream.{name}.{key}: {found}, wanted {what}")
        need_extra(task.kind)


def need_extra(kind: str) -> None:
    """Raise UserError where the package that measures a kind of benchmark is not installed."""
    package = config_downstream.EXTRA.get(kind)
    if package and find_spec(package) is None:
        raise UserError(
            f"downstream benchmarks of kind {kind} need the package {package}, which is not installed; "
            "wanted the extra `downstream`: pip install 'dp2o-sr[downstream]'"
        )


def _check_run(config: "Config", name: str, run: "RunSettings", models: set[str]) -> None:
    known(f"runs.{name}.reference", run.reference, models)
    known(f"runs.{name}.dataset", run.dataset, config.datasets)
    known(f"runs.{name}.reward", run.reward, config.rewards)
    known(f"runs.{name}.judge", config.judge(name), config.rewards)
    if run.train.guard.every:
        known(f"runs.{name}.train.guard.dataset", run.train.guard.dataset, config.datasets)
    for test in run.tests:
        known(f"runs.{name}.tests", test, config.datasets)
    for control in run.controls:
        known(f"runs.{name}.controls", control, models)
    num_rollouts = config.rewards[run.reward].num_rollouts
    if run.pairs.top > num_rollouts / 2:
        raise UserError(
            f"config: runs.{name}.pairs.top: found {run.pairs.top}, wanted at most {num_rollouts // 2} "
            f"(half of rewards.{run.reward}.num_rollouts = {num_rollouts})"
        )
    judged = config.rewards[config.judge(name)].num_rollouts
    if run.train.guard.every and run.train.guard.num_rollouts > judged:
        found = run.train.guard.num_rollouts
        raise UserError(f"config: runs.{name}.train.guard.num_rollouts: found {found}, wanted at most M = {judged}")
    seen = [name]
    while run.reference in config.runs:
        seen.append(run.reference)
        if run.reference in seen[:-1]:
            raise UserError(f"config: runs.{name}.reference: a circle: {' -> '.join(seen)}")
        run = config.runs[run.reference]
    if config.policies[run.reference].derive:
        raise UserError(f"config: runs.{name}.reference: '{run.reference}' is derived, wanted a policy with a model")
    check_precision(f"runs.{name}.train", config.runs[name].train, config.policies[run.reference])
