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
        config=lambda wildcards: params_json(
            cfg.datasets[wildcards.dataset].model_dump(
                include={"downscale", "max_pixels", "degradation"}
            )
            | {"seed": cfg.seed}
        ),
        version=versions.DEGRADE,
        shard=own_shard,
    shell:
        "python -m dp2osr.stages.degrade --images {input.images} --shard {wildcards.shard} --device {resources.device}"
        " --config {params.config:q} --lr {output.lr} 2> {log}"
