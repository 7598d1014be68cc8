def ingest_files(wildcards):
    """The folders and shards that exist; the stage itself names an entry that does not."""
    dataset = cfg.datasets[wildcards.dataset]
    entries = [*dataset.images, *dataset.lr.images]
    return [entry for entry in entries if Path(entry).exists()]


rule ingest:
    input:
        ingest_files,
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
            config_datasets.ingest_keys(cfg.datasets[wildcards.dataset])
            | {"seed": cfg.seed}
        ),
        version=versions.INGEST,
    shell:
        "python -m dp2osr.stages.ingest --config {params.config:q} --images {output.images} 2> {log}"
