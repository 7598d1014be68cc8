def prompt_table(wildcards):
    """The user's prompt table of a dataset, where it has one."""
    prompt = cfg.datasets[wildcards.dataset].prompt
    return [prompt.table] if prompt.source == "table" else []


rule prompt:
    input:
        images=f"{R}/{{dataset}}/images.parquet",
        table=prompt_table,
    output:
        prompts=f"{R}/{{dataset}}/prompts/shard-{{shard}}.parquet",
    log:
        f"{R}/logs/{{dataset}}/prompt/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/prompt/shard-{{shard}}.tsv"
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        config=lambda wildcards: params_json(cfg.datasets[wildcards.dataset].prompt),
        version=versions.PROMPT,
    shell:
        "python -m dp2osr.stages.prompt --images {input.images} --shard {wildcards.shard}"
        " --config {params.config:q} --prompts {output.prompts} 2> {log}"
