"""The jobs of a workflow by name: where each leaves its output and its log, and which ones a configuration asks for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dp2osr.config import Config
from dp2osr.config_datasets import metric_groups
from dp2osr.plan import Wanted, prompt_stage

# stage -> its last output below the results, and its log below logs/ without suffix, as in rules/*.smk.
# Beside benchmarks/ the timing of a job has the name of its log.
_CELL = "shard-{shard}.block-{block}"
PATTERNS: dict[str, tuple[str, str]] = {
    "pretrain": ("pretrain/pretrain_log.parquet", "pretrain"),
    "ingest": ("{dataset}/images.parquet", "{dataset}/ingest"),
    "degrade": ("{dataset}/lr/shard-{shard}.tar", "{dataset}/degrade-{shard}"),
    "niqe": ("{dataset}/niqe.mat", "{dataset}/niqe"),
    "prompt": ("{dataset}/prompts/shard-{shard}.parquet", "{dataset}/prompt/shard-{shard}"),
    "describe": ("{dataset}/prompts/shard-{shard}.parquet", "{dataset}/prompt/shard-{shard}"),
    "embed": ("{dataset}/{policy}/embeddings/shard-{shard}.safetensors", "{dataset}/{policy}/embed/shard-{shard}"),
    "rollout": (f"{{dataset}}/{{policy}}/candidates/{_CELL}.tar", f"{{dataset}}/{{policy}}/rollout/{_CELL}"),
    "derive": (f"{{dataset}}/{{policy}}/candidates/{_CELL}.tar", f"{{dataset}}/{{policy}}/derive/{_CELL}"),
    "score": (
        f"{{dataset}}/{{policy}}/scores/{{metrics}}/{_CELL}.parquet",
        f"{{dataset}}/{{policy}}/score/{{metrics}}/{_CELL}",
    ),
    "reward": ("{dataset}/{policy}/rewards/{reward}.parquet", "{dataset}/{policy}/reward/{reward}"),
    "select_pairs": ("runs/{run}/pairs.parquet", "runs/{run}/pairs"),
    "prune_candidates": ("{dataset}/{policy}/pruned.json", "{dataset}/{policy}/prune"),
    "encode": ("runs/{run}/encoded/shard-{shard}.tar", "runs/{run}/encode/shard-{shard}"),
    "train": ("runs/{run}/policy", "runs/{run}/train"),
    "evaluate": ("runs/{run}/evaluation/{dataset}.parquet", "runs/{run}/evaluate/{dataset}"),
    "report": ("runs/{run}/report/index.html", "runs/{run}/report"),
    "compare": ("report/compare.html", "compare"),
}


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    digits = {"shard": r"\d{4}", "block": r"\d{3}"}
    named = [f"(?P<{part}>{digits.get(part, '[^/]+')})" if at % 2 else re.escape(part) for at, part in enumerate(parts)]
    return re.compile("".join(named))


_OUTPUTS = {stage: _regex(output) for stage, (output, _) in PATTERNS.items()}
_LOGS = {stage: _regex(log) for stage, (_, log) in PATTERNS.items()}


@dataclass(frozen=True)
class Job:
    """A job. name: path of its log below logs/, without suffix; output: below the results; wildcards: of its rule."""

    stage: str
    name: str
    output: str
    wildcards: Mapping[str, str]

    @property
    def log(self) -> str:
        """Return the path of the log below the results."""
        return f"logs/{self.name}.log"

    @property
    def benchmark(self) -> str:
        """Return the path of the timing below the results."""
        return f"benchmarks/{self.name}.tsv"


def make(stage: str, **wildcards: str) -> Job:
    """Return the job of a stage for these wildcards."""
    output, log = PATTERNS[stage]
    return Job(stage, log.format(**wildcards), output.format(**wildcards), wildcards)


def _match(text: str, regexes: Mapping[str, re.Pattern[str]]) -> Job | None:
    for stage, regex in regexes.items():
        if found := regex.fullmatch(text):
            return make(stage, **found.groupdict())
    return None


def from_log(path: str) -> Job | None:
    """Return the job that writes this log (a path below the results), or None."""
    if not (path.startswith("logs/") and path.endswith(".log")):
        return None
    return _match(path[len("logs/") : -len(".log")], _LOGS)


def from_output(path: str) -> Job | None:
    """Return the job that makes this path below the results, or None. Candidates count as sampled, not derived."""
    return _match(path, _OUTPUTS)


def planned(config: Config) -> dict[str, Job]:
    """Return the jobs that the reports of all runs need, by name, in the order of the stages."""
    wanted = Wanted.of(config)
    found = [*_data_jobs(wanted), *_candidate_jobs(wanted), *_run_jobs(config)]
    order = list(PATTERNS)
    return {job.name: job for job in sorted(found, key=lambda job: order.index(job.stage))}


def _shards(config: Config, dataset: str) -> list[str]:
    return [f"{number:04d}" for number in range(config.datasets[dataset].num_shards)]


def _data_jobs(wanted: Wanted) -> Iterator[Job]:
    config = wanted.config
    for dataset in sorted(wanted.lr):
        yield make("ingest", dataset=dataset)
        yield from (make("degrade", dataset=dataset, shard=shard) for shard in _shards(config, dataset))
    if wanted.niqe:
        yield make("niqe", dataset=config.iqa.niqe.dataset)
    for dataset in sorted({name for name, _ in wanted.embedded}):
        stage = prompt_stage(config.datasets[dataset])
        yield from (make(stage, dataset=dataset, shard=shard) for shard in _shards(config, dataset))
    for dataset, root in sorted(wanted.embedded):
        yield from (make("embed", dataset=dataset, policy=root, shard=shard) for shard in _shards(config, dataset))


def _candidate_jobs(wanted: Wanted) -> Iterator[Job]:
    config = wanted.config

    def cells(dataset: str, policy: str, blocks: set[int]) -> Iterator[dict[str, str]]:
        for shard in _shards(config, dataset):
            for block in sorted(blocks):
                yield {"dataset": dataset, "policy": policy, "shard": shard, "block": f"{block:03d}"}

    for (dataset, policy), blocks in sorted(wanted.blocks.items()):
        stage = "derive" if wanted.derive(policy) else "rollout"
        yield from (make(stage, **cell) for cell in cells(dataset, policy, blocks))
    for (dataset, policy), blocks in sorted(wanted.scored.items()):
        for metrics in metric_groups(config, dataset):
            yield from (make("score", metrics=metrics, **cell) for cell in cells(dataset, policy, blocks))
    for dataset, policy, reward in sorted(wanted.rewards):
        yield make("reward", dataset=dataset, policy=policy, reward=reward)


def _run_jobs(config: Config) -> Iterator[Job]:
    for name, run in config.runs.items():
        yield make("select_pairs", run=name)
        yield from (make("encode", run=name, shard=shard) for shard in _shards(config, run.dataset))
        yield make("train", run=name)
        yield from (make("evaluate", run=name, dataset=dataset) for dataset in run.tests)
        yield make("report", run=name)


def images_of(job: Job, *, groups: Mapping[str, Mapping[str, int]], config: Config | None) -> int | None:
    """Return how many images a job reads or makes; None where that is unknown or means nothing.

    groups: images of each shard, by data set, of those that were ingested. For `encode` it is the most there can be.
    """
    names = job.wildcards
    dataset, policy, shard = names.get("dataset", ""), names.get("policy", ""), names.get("shard", "")
    if job.stage == "encode" and config is not None and names["run"] in config.runs:
        run = config.runs[names["run"]]
        return groups[run.dataset].get(shard, 0) * 2 * run.pairs.top if run.dataset in groups else None
    if dataset not in groups:
        return None
    if job.stage in ("ingest", "niqe"):
        return sum(groups[dataset].values())
    if job.stage in ("degrade", "prompt", "describe"):
        return groups[dataset].get(shard, 0)
    if config is None or "block" not in names or dataset not in config.datasets:
        return None
    if policy not in config.policies and policy not in config.runs:
        return None
    return groups[dataset].get(shard, 0) * max(Wanted(config).candidates(dataset, policy, {int(names["block"])}), 0)
