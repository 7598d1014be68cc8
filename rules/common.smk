import json
import shlex
import sys

# `python` in the rules is the one that runs Snakemake, whether or not its environment is activated.
shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")


wildcard_constraints:
    dataset="|".join(cfg.datasets),
    policy="|".join([*cfg.policies, *cfg.runs]),
    run="|".join(cfg.runs) or "(?!)",
    reward="|".join(cfg.rewards),
    metrics="|".join(cfg.iqa.groups),
    shard=r"\d{4}",
    block=r"\d{3}",


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
    """The control weights as a workflow input; those that ship with the package are no input."""
    if policy in cfg.runs:
        return [f"{R}/runs/{policy}/policy"]
    path = cfg.policies[policy].control
    return [] if path.startswith("builtin:") else [path]


def control_arg(policy):
    return next(iter(control_input(policy)), cfg.policy(policy).control)
