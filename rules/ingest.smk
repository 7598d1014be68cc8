def ingest_job(wildcards):
    """The keys that decide a data set's images; those of its LR files where they are given."""
    dataset = cfg.datasets[wildcards.dataset]
    found = dataset.model_dump(exclude={"degradation", "prompt", "lr"})
    if dataset.lr.source != "degraded":
        found |= {"lr": dataset.lr.model_dump(), "scale": dataset.degradation.scale}
    return params_json(found | {"seed": cfg.seed})


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
        config=ingest_job,
        version=versions.INGEST,
    shell:
        "python -m dp2osr.stages.ingest --config {params.config:q} --images {output.images} 2> {log}"
