rule ingest:
    input:
        # The folders and shards that exist; the stage itself names an entry that does not.
        lambda wildcards: [
            entry
            for entry in cfg.datasets[wildcards.dataset].images
            if Path(entry).exists()
        ],
    output:
        images=f"{R}/{{dataset}}/images.parquet",
    log:
        f"{R}/logs/{{dataset}}/ingest.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/ingest.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(120),  # minutes
    params:
        config=lambda wildcards: params_json(
            cfg.datasets[wildcards.dataset].model_dump(
                exclude={"degradation", "prompt"}
            )
            | {"seed": cfg.seed}
        ),
        version=versions.INGEST,
    shell:
        "python -m dp2osr.stages.ingest --config {params.config:q} --images {output.images} 2> {log}"
