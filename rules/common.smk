import inspect
import json
import math
import shlex
import sys

from dp2osr import config_datasets, preempted, remote, stopping, weights
from dp2osr.plan import images_a_step


def weights_exports():
    """Every job takes weights from the cache folder, and its errors name the command that fills it."""
    if not cfg.weights:
        return ""
    files = shlex.join(map(str, workflow.overwrite_configfiles)) or "config/config.yaml"
    values = {
        weights.VARIABLE: str(Path(cfg.weights).absolute()),
        weights.CONFIGFILES: files,
    }
    return "".join(f" {name}={shlex.quote(value)}" for name, value in values.items())


# `python` in the rules is the one that runs Snakemake, whether or not its environment is activated. The shell around a
# stage outlives SIGTERM: the stage decides when it ends.
shell.prefix(
    "trap : TERM;"
    f" export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH{weights_exports()}; "
)

if workflow.remote_exec:  # Snakemake inside a cluster job
    stopping.forward()
else:
    preempted.count_as_cancelled(workflow)


wildcard_constraints:
    dataset="|".join(cfg.datasets),
    policy="|".join([*cfg.policies, *cfg.runs]),
    run="|".join(cfg.runs) or "(?!)",
    reward="|".join(cfg.rewards),
    metrics="|".join(cfg.iqa.groups),
    shard=r"\d{4}",
    block=r"\d{3}",


# Each job that takes `device` asks for one GPU, unless the config says that all run on the CPU. Locally this is a mere
# number: it bounds the jobs at a time where a profile says how many GPUs there are.
num_gpus = 0 if cfg.device == "cpu" else 1

images_per_block = cfg.limits.images_per_shard * cfg.rollout.rollouts_per_block


# `--cache` takes outputs of `rollout` and `score` from $SNAKEMAKE_OUTPUT_CACHE, where another workflow has left them
# (docs/storage.md). Snakemake knows an output by the shell commands, params and raw inputs of all jobs up to it.
caching = workflow.workflow_settings.cache is not None
if caching and workflow.remote_exec:
    raise WorkflowError(
        "--cache: found in a job of a cluster; wanted a run on one machine"
    )


def raw_files(path):
    """A given file or folder as an input; with `--cache` a folder's files, since their bytes are read."""
    if caching and Path(path).is_dir():
        return sorted(str(found) for found in Path(path).rglob("*") if found.is_file())
    return [path]


def own_shard(wildcards, input):
    """A param of rules that only a wildcard tells their shard, which a cache does not look at.

    It takes `input` so that Snakemake counts it as derived, and reruns nothing that was made without it.
    """
    return wildcards.shard


def without_benchmark(rule):
    """Snakemake caches no output of a rule with a benchmark."""
    if caching:
        workflow.get_rule(rule)._benchmark = None


def remember_signatures():
    """Let functions carry their signatures, which Snakemake asks for several times a job: an eighth of a dry run.

    A resource is evaluated by a method of Snakemake's own, whose signature is asked for as often.
    """
    asked = [part for each in workflow.rules for part in (*each.input, *each.params)]
    for resource in [
        part for each in workflow.rules for part in dict(each.resources).values()
    ]:
        asked += [
            getattr(resource, "_evaluator", None),
            getattr(type(resource), "evaluate", None),
        ]
    for function in filter(inspect.isfunction, asked):
        function.__signature__ = inspect.signature(function)


def growing(amount):
    """A resource of which the second and third try ask for as much again: memory, or minutes of work not known."""
    return lambda wildcards, attempt: amount * min(attempt, 3)


def time_limit(seconds, attempt):
    """Minutes for a job that works for some seconds; the tries grow alike, as far as the cluster goes."""
    minutes = cfg.limits.start_min + math.ceil(seconds / 60)
    return min(minutes * min(attempt, 3), cfg.limits.longest_min)


def params_json(section):
    """One line of JSON with sorted keys: what a stage takes as --config, and what Snakemake compares."""
    data = section if isinstance(section, dict) else section.model_dump()
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def shards(dataset):
    return [f"{number:04d}" for number in range(cfg.datasets[dataset].num_shards)]


def blocks(dataset):
    """Blocks of seeds that a data set needs: more rollouts only add blocks."""
    count = -(-cfg.num_rollouts(dataset) // cfg.rollout.rollouts_per_block)
    return [f"{number:03d}" for number in range(count)]


def control_input(policy):
    """The control weights as a workflow input; those of the package or of the weights cache are no input."""
    path = control_arg(policy)
    if policy in cfg.runs:
        return [path]
    return [] if path.startswith(("builtin:", "hub:")) else raw_files(path)


def model_input(policy):
    """A file that every given model has: with a wrong path the run stops before its first job."""
    path = cfg.policy(policy).model
    found = [] if path.startswith(("builtin:", "hub:")) else [path]
    return [f"{folder}/scheduler/scheduler_config.json" for folder in found]


def control_arg(policy):
    """The control branch as stages take it; of one behind an address the copy."""
    if policy in cfg.runs:
        return f"{R}/runs/{policy}/policy"
    control = cfg.policies[policy].control
    if remote.is_branch(control):
        return f"{R}/{remote.FOLDER}/{remote.copy_name(control)}"
    return control
