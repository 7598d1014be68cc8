from glob import glob


def ingest_images(wildcards):
    """The folders and shards that exist; the stage itself names an entry that does not."""
    entries = cfg.datasets[wildcards.dataset].images
    given = [entry for entry in entries if Path(entry).exists()]
    if caching:
        given += [found for entry in entries for found in glob(entry, recursive=True)]
    return [found for entry in dict.fromkeys(given) for found in raw_files(entry)]


rule ingest:
    input:
        ingest_images,
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
