# What people ask for by name. `default` is the report of each run.
def each_run(pattern):
    return [
        pattern.format(run=name, dataset=dataset, reward=run.reward)
        for name, run in cfg.runs.items()
        for dataset in run.tests
    ]


def each_training_set(pattern):
    return [
        pattern.format(
            dataset=run.dataset,
            policy=run.reference,
            reward=run.reward,
            shard=shard,
            block=block,
        )
        for run in cfg.runs.values()
        for shard in shards(run.dataset)
        for block in blocks(run.dataset)
    ]


localrules:
    all,
    rollouts,
    rewards,
    pairs,
    policy,
    evaluation,
    figures,
    explorer,
    downstream,
    prune,


rule rollouts:
    input:
        each_training_set(
            f"{R}/{{dataset}}/{{policy}}/candidates/shard-{{shard}}.block-{{block}}.tar"
        ),


rule rewards:
    input:
        each_training_set(f"{R}/{{dataset}}/{{policy}}/rewards/{{reward}}.parquet"),


rule pairs:
    input:
        each_run(f"{R}/runs/{{run}}/pairs.parquet"),


rule policy:
    input:
        each_run(f"{R}/runs/{{run}}/policy"),


rule evaluation:
    input:
        each_run(f"{R}/runs/{{run}}/evaluation/{{dataset}}.parquet"),


rule figures:
    input:
        each_run(f"{R}/runs/{{run}}/report/index.html"),
        f"{R}/report/compare.html",


# Every candidate that a run was trained on, judged by its reward, and those of its tests; not part of `all`.
rule explorer:
    input:
        explored(),


def each_benchmark(wildcards):
    if not cfg.downstream:
        raise WorkflowError(
            "config: downstream: no benchmark is named there, so there is nothing to do; see docs/downstream.md"
        )
    return [
        f"{R}/runs/{run}/downstream/{task}.parquet"
        for run in cfg.runs
        for task in cfg.downstream
    ]


rule downstream:
    input:
        each_benchmark,
