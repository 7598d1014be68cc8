def pairs_rewards(wildcards):
    run = cfg.runs[wildcards.run]
    return f"{R}/{run.dataset}/{run.reference}/rewards/{run.reward}.parquet"


rule select_pairs:
    input:
        rewards=pairs_rewards,
    output:
        pairs=f"{R}/runs/{{run}}/pairs.parquet",
    log:
        f"{R}/logs/runs/{{run}}/pairs.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/pairs.tsv"
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),
    params:
        config=lambda wildcards: params_json(
            {
                "pairs": cfg.runs[wildcards.run].pairs.model_dump(),
                "seed": cfg.runs[wildcards.run].seed,
            }
        ),
        version=versions.PAIRS,
    shell:
        "python -m dp2osr.stages.pairs --rewards {input.rewards}"
        " --config {params.config:q} --pairs {output.pairs} 2> {log}"
