def evaluated_rewards(wildcards):
    """Name -> rewards table of the run's policy, its reference and its controls."""
    run = cfg.runs[wildcards.run]
    names = dict.fromkeys([wildcards.run, run.reference, *run.controls])
    return {
        name: f"{R}/{wildcards.dataset}/{name}/rewards/{cfg.judge(wildcards.run)}.parquet"
        for name in names
    }


def reference_scales(wildcards):
    run = cfg.runs[wildcards.run]
    return f"{R}/{wildcards.dataset}/{run.reference}/scales/{cfg.judge(wildcards.run)}.parquet"


def evaluate_job(wildcards):
    run = cfg.runs[wildcards.run]
    reward = config_datasets.reward_on(cfg, cfg.judge(wildcards.run), wildcards.dataset)
    return params_json(
        {
            "reward": reward.model_dump(),
            "evaluate": cfg.evaluate.model_dump(),
            "seed": cfg.seed,
            "reference": run.reference,
        }
    )


rule evaluate:
    input:
        rewards=lambda wildcards: list(evaluated_rewards(wildcards).values()),
        scales=reference_scales,
        images=f"{R}/{{dataset}}/images.parquet",
    output:
        evaluation=f"{R}/runs/{{run}}/evaluation/{{dataset}}.parquet",
    log:
        f"{R}/logs/runs/{{run}}/evaluate/{{dataset}}.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/evaluate/{{dataset}}.tsv"
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),
    params:
        policies=lambda wildcards: [
            f"{name}={path}" for name, path in evaluated_rewards(wildcards).items()
        ],
        config=evaluate_job,
        version=versions.EVALUATE,
    shell:
        "python -m dp2osr.stages.evaluate --policy {params.policies:q} --scales {input.scales}"
        " --images {input.images} --config {params.config:q} --evaluation {output.evaluation} 2> {log}"
