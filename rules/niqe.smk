# NIQE's pristine model is fitted on the HR images of one dataset (iqa.niqe.dataset) and used for all.
rule niqe:
    input:
        lr=lambda wildcards: expand(
            f"{R}/{wildcards.dataset}/lr/shard-{{shard}}.tar",
            shard=shards(wildcards.dataset),
        ),
    output:
        niqe=f"{R}/{{dataset}}/niqe.mat",
    log:
        f"{R}/logs/{{dataset}}/niqe.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/niqe.tsv"
    resources:
        mem_mb=growing(4000),
        runtime=growing(120),
    params:
        config=params_json(cfg.iqa.niqe),
        version=versions.NIQE,
    shell:
        "python -m dp2osr.stages.niqe --lr {input.lr} --config {params.config:q}"
        " --niqe {output.niqe} 2> {log}"
