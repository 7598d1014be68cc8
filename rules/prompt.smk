from dp2osr import config_checks

try:
    config_checks.check_prompt_files(cfg)
except UserError as error:
    raise WorkflowError(str(error)) from None

described = [
    name
    for name, dataset in cfg.datasets.items()
    if config_checks.prompt_files(dataset.prompt)
]


def prompt_job(wildcards):
    """What determines the prompts: their source, and the keys that it reads."""
    prompt = cfg.datasets[wildcards.dataset].prompt
    read = {"tags": {"tags"}, "caption": {"caption"}}.get(
        prompt.source, {"text", "table"}
    )
    return params_json(prompt.model_dump(include={"source", *read}))


def prompt_table(wildcards):
    """The user's prompt table of a dataset, where it has one."""
    prompt = cfg.datasets[wildcards.dataset].prompt
    return [prompt.table] if prompt.source == "table" else []


def prompt_model(wildcards):
    """The files of the model that describes the images of a dataset; those of the weights cache are no input."""
    files = config_checks.prompt_files(cfg.datasets[wildcards.dataset].prompt)
    given = [path for path in files.values() if path and not path.startswith("hub:")]
    return [found for path in given for found in raw_files(path)]


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
    wildcard_constraints:
        dataset="|".join(name for name in cfg.datasets if name not in described)
        or "(?!)",
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        config=prompt_job,
        version=versions.PROMPT,
        shard=own_shard,
    shell:
        "python -m dp2osr.stages.prompt --images {input.images} --shard {wildcards.shard}"
        " --config {params.config:q} --prompts {output.prompts} 2> {log}"


# A rule of its own, for it reads LR images and wants a GPU: the same stage, with a model that describes them.
rule describe:
    input:
        images=f"{R}/{{dataset}}/images.parquet",
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
        model=prompt_model,
    output:
        prompts=f"{R}/{{dataset}}/prompts/shard-{{shard}}.parquet",
    log:
        f"{R}/logs/{{dataset}}/prompt/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/prompt/shard-{{shard}}.tsv"
    wildcard_constraints:
        dataset="|".join(described) or "(?!)",
    resources:
        mem_mb=growing(16000),
        runtime=growing(60),
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=prompt_job,
        version=versions.PROMPT,
        shard=own_shard,
    shell:
        "python -m dp2osr.stages.prompt --images {input.images} --shard {wildcards.shard} --lr {input.lr}"
        " --device {resources.device} --config {params.config:q} --prompts {output.prompts} 2> {log}"
