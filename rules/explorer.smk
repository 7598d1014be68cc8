EXPLORER = f"{R}/{{dataset}}/{{policy}}/explorer/{{reward}}"


def explored():
    """The page of each (data set, policy, reward) that a run was trained on, or is judged by."""
    found = [
        EXPLORER.format(dataset=dataset, policy=policy, reward=reward)
        for name, run in cfg.runs.items()
        for dataset, policy, reward in (
            (run.dataset, run.reference, run.reward),
            *((test, run.reference, cfg.judge(name)) for test in run.tests),
            *((test, name, cfg.judge(name)) for test in run.tests),
        )
    ]
    return [f"{folder}/index.html" for folder in dict.fromkeys(found)]


def explorer_candidates(wildcards):
    """The candidate shards that the reward has judged, one a block of seeds."""
    return expand(
        f"{R}/{wildcards.dataset}/{wildcards.policy}/candidates/shard-{wildcards.shard}.block-{{block}}.tar",
        block=reward_job(wildcards)["blocks"],
    )


def explorer_pairs(wildcards):
    """Run -> pairs of the runs that choose from these candidates by this reward."""
    return {
        name: f"{R}/runs/{name}/pairs.parquet"
        for name, run in cfg.runs.items()
        if (run.dataset, run.reference, run.reward)
        == (wildcards.dataset, wildcards.policy, wildcards.reward)
    }


def explorer_seconds(wildcards):
    """A candidate of 512 px is decoded and made small in under 0.05 s of CPU time (docs/tables.md)."""
    return 0.1 * cfg.limits.images_per_shard * num_candidates(wildcards)


rule explorer_shard:
    input:
        rewards=f"{R}/{{dataset}}/{{policy}}/rewards/{{reward}}.parquet",
        images=f"{R}/{{dataset}}/images.parquet",
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
        candidates=explorer_candidates,
    output:
        folder=directory(f"{EXPLORER}/data/shard-{{shard}}"),
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/explorer/{{reward}}.shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/explorer/{{reward}}.shard-{{shard}}.tsv"
    threads: 1
    resources:
        mem_mb=growing(3000),
        runtime=lambda wildcards, attempt: time_limit(
            explorer_seconds(wildcards), attempt
        ),
    params:
        config=params_json(cfg.explorer),
        version=versions.EXPLORER,
    shell:
        "python -m dp2osr.stages.explorer_shard --rewards {input.rewards} --images {input.images} --lr {input.lr}"
        " --candidates {input.candidates} --config {params.config:q} --folder {output.folder} 2> {log}"


rule explorer_page:
    input:
        data=lambda wildcards: expand(
            f"{EXPLORER}/data/shard-{{shard}}",
            shard=shards(wildcards.dataset),
            **wildcards,
        ),
        pairs=lambda wildcards: list(explorer_pairs(wildcards).values()),
    output:
        page=f"{EXPLORER}/index.html",
        index=f"{EXPLORER}/index.js",
        script=f"{EXPLORER}/explorer.js",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/explorer/{{reward}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/explorer/{{reward}}.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),  # minutes
    params:
        data=f"{EXPLORER}/data",
        pairs=lambda wildcards: [
            f"{name}={path}" for name, path in explorer_pairs(wildcards).items()
        ],
        config=lambda wildcards: params_json(
            {
                "dataset": wildcards.dataset,
                "policy": wildcards.policy,
                "reward": wildcards.reward,
                "definition": cfg.rewards[wildcards.reward].model_dump(),
                "shards": shards(wildcards.dataset),
                "runs": list(explorer_pairs(wildcards)),
            }
        ),
        version=versions.EXPLORER,
    shell:
        "python -m dp2osr.stages.explorer --data {params.data:q} --pairs {params.pairs:q}"
        " --config {params.config:q} --page {output.page} 2> {log}"
