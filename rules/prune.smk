def pruned_runs(dataset, policy):
    """The runs that select training pairs from these candidates."""
    return [
        name
        for name, run in cfg.runs.items()
        if (run.dataset, run.reference) == (dataset, policy)
    ]


def whole_sets():
    """The (dataset, policy) whose every candidate an evaluation or its report shows; they are never pruned."""
    return {
        (dataset, policy)
        for name, run in cfg.runs.items()
        for dataset in run.tests
        for policy in (name, run.reference, *run.controls)
    }


prunable = sorted(
    {(run.dataset, run.reference) for run in cfg.runs.values()} - whole_sets()
)


# The shards change in place and keep their time: `ancient` says so to Snakemake, the summary is what is declared.
rule prune_candidates:
    input:
        pairs=lambda wildcards: expand(
            f"{R}/runs/{{run}}/pairs.parquet",
            run=pruned_runs(wildcards.dataset, wildcards.policy),
        ),
        candidates=lambda wildcards: ancient(
            expand(
                f"{R}/{wildcards.dataset}/{wildcards.policy}/candidates/shard-{{shard}}.block-{{block}}.tar",
                shard=shards(wildcards.dataset),
                block=blocks(wildcards.dataset),
            )
        ),
    output:
        summary=f"{R}/{{dataset}}/{{policy}}/pruned.json",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/prune.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/prune.tsv"
    resources:
        mem_mb=growing(2000),
        runtime=growing(120),
    shell:
        "python -m dp2osr.stages.prune --pairs {input.pairs} --candidates {input.candidates}"
        " --summary {output.summary} 2> {log}"


rule prune:
    input:
        expand(
            f"{R}/{{pair[0]}}/{{pair[1]}}/pruned.json",
            pair=prunable if cfg.rollout.keep == "selected" else [],
        ),
