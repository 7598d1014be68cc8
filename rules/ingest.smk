from functools import cache
from glob import glob

try:
    remote.check(cfg)
except UserError as error:
    raise WorkflowError(str(error)) from None

# Where images and control branches lie elsewhere: the address of each copy, by its path.
fetched = {
    f"{R}/{name}/{remote.FOLDER}/{remote.copy_name(address)}": address
    for name, dataset in cfg.datasets.items()
    for address in remote.addresses([*dataset.images, *dataset.lr.images])
} | {
    f"{R}/{remote.FOLDER}/{remote.copy_name(address)}": address
    for address in remote.branches(cfg)
}


@cache
def stored(address):
    """The file behind an address, which a storage plugin fetches."""
    return getattr(storage, remote.plugin(address))(address)


@cache
def check_stored(address):
    """Snakemake would be content with an older images.parquet where a new address leads nowhere."""
    if not stored(address).flags["storage_object"].exists():
        raise WorkflowError(f"images: {address}: not found")


# On the machine of Snakemake itself: nodes of a cluster often have no network.
rule fetch_images:
    input:
        lambda wildcards: stored(
            fetched[f"{R}/{wildcards.dataset}/{remote.FOLDER}/{wildcards.file}"]
        ),
    output:
        file=f"{R}/{{dataset}}/{remote.FOLDER}/{{file}}",
    log:
        f"{R}/logs/{{dataset}}/fetch/{{file}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/fetch/{{file}}.tsv"
    wildcard_constraints:
        file=r"[0-9a-f]{12}-[\w.-]+",
    retries: 2
    localrule: True
    resources:
        mem_mb=growing(1000),
        runtime=growing(120),
    shell:
        "cp {input:q} {output.file:q}.part 2> {log:q} && mv {output.file:q}.part {output.file:q}"


use rule fetch_images as fetch_control with:
    input:
        lambda wildcards: stored(fetched[f"{R}/{remote.FOLDER}/{wildcards.file}"]),
    output:
        file=f"{R}/{remote.FOLDER}/{{file}}",
    log:
        f"{R}/logs/fetch/{{file}}.log",
    benchmark:
        f"{R}/benchmarks/fetch/{{file}}.tsv"
    localrule: True  # `use rule` does not take this over


def ingest_files(wildcards):
    """The folders and shards that exist; the stage itself names an entry that does not."""
    dataset = cfg.datasets[wildcards.dataset]
    entries = [*dataset.images, *dataset.lr.images]
    given = [entry for entry in entries if Path(entry).exists()]
    if caching:
        given += [found for entry in entries for found in glob(entry, recursive=True)]
    prefix = f"{R}/{wildcards.dataset}/{remote.FOLDER}/"
    copies = [path for path in fetched if path.startswith(prefix)]
    for path in copies:
        if not Path(path).exists():
            check_stored(fetched[path])
    return [
        *(found for entry in dict.fromkeys(given) for found in raw_files(entry)),
        *copies,
    ]


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
