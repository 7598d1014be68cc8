def degrade_job(wildcards):
    """The keys that decide a data set's pixels."""
    dataset = cfg.datasets[wildcards.dataset]
    found = dataset.model_dump(include={"downscale", "max_pixels", "degradation"})
    given = dataset.lr.source != "degraded"
    return params_json(
        found | {"seed": cfg.seed} | ({"source": dataset.lr.source} if given else {})
    )


rule degrade:
    input:
        images=f"{R}/{{dataset}}/images.parquet",
    output:
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
    log:
        f"{R}/logs/{{dataset}}/degrade-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/degrade-{{shard}}.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(120),  # minutes
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=degrade_job,
        version=versions.DEGRADE,
        shard=own_shard,
    shell:
        "python -m dp2osr.stages.degrade --images {input.images} --shard {wildcards.shard} --device {resources.device}"
        " --config {params.config:q} --lr {output.lr} 2> {log}"
