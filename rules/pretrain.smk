# Makes a base for who has none; `snakemake pretrain` (or `make base`) writes cfg.pretrain.output.
rule pretrain:
    input:
        images=f"{R}/{cfg.pretrain.dataset}/images.parquet",
    output:
        model=directory(cfg.pretrain.output),
        log_table=f"{R}/pretrain/pretrain_log.parquet",
    log:
        f"{R}/logs/pretrain.log",
    benchmark:
        f"{R}/benchmarks/pretrain.tsv"
    threads: 2
    resources:
        mem_mb=growing(16000),
        runtime=growing(480),
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=params_json(
            {
                "pretrain": cfg.pretrain.model_dump(),
                "policy": cfg.policy(cfg.pretrain.policy).model_dump(),
                "dataset": cfg.datasets[cfg.pretrain.dataset].model_dump(),
                "seed": cfg.seed,
            }
        ),
        checkpoints=f"{R}/pretrain/checkpoints",
        version=versions.PRETRAIN,
    shell:
        "python -m dp2osr.stages.pretrain --images {input.images} --checkpoints {params.checkpoints}"
        " --device {resources.device} --config {params.config:q}"
        " --model {output.model} --log-table {output.log_table} 2> {log}"
