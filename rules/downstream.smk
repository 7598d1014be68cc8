from dp2osr import config_downstream

try:
    config_checks.check_downstream_files(cfg)
except UserError as error:
    raise WorkflowError(str(error)) from None


wildcard_constraints:
    task="|".join(cfg.downstream) or "(?!)",
    source="|".join([*config_downstream.SOURCES, *sampled_policies]),


def task_of(wildcards):
    return cfg.downstream[wildcards.task]


def task_shards(wildcards):
    return [f"{number:04d}" for number in range(task_of(wildcards).num_shards)]


def given_lr(wildcards):
    return [task_of(wildcards).lr] if task_of(wildcards).lr else []


def optional(option, paths):
    """The option with its path, or nothing where there is none."""
    return f"{option} {shlex.quote(str(paths))}" if paths else ""


def benchmark_job(wildcards):
    """What determines the LR images of a benchmark."""
    task = task_of(wildcards)
    used = {"kind", "max_images", "max_pixels", "max_rejected_share", "num_shards"}
    degradation = cfg.datasets[task.dataset].degradation.model_dump()
    return params_json(
        task.model_dump(include=used) | {"degradation": degradation, "seed": cfg.seed}
    )


# One rule for the three kinds of benchmark: they differ in how annotations name photographs.
rule lower_resolution:
    input:
        images=lambda wildcards: task_of(wildcards).images,
        annotations=lambda wildcards: task_of(wildcards).annotations,
        given=given_lr,
    output:
        lr=f"{R}/downstream/{{task}}/lr/shard-{{shard}}.tar",
    log:
        f"{R}/logs/downstream/{{task}}/benchmark/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/downstream/{{task}}/benchmark/shard-{{shard}}.tsv"
    resources:
        mem_mb=growing(4000),
        runtime=growing(120),  # minutes
        gpu=num_gpus,
        device=cfg.device,
    params:
        given=lambda wildcards, input: optional("--given", input.given),
        config=benchmark_job,
        version=versions.BENCHMARK,
    shell:
        "python -m dp2osr.stages.benchmark --images {input.images:q} --annotations {input.annotations:q}"
        " {params.given} --shard {wildcards.shard} --device {resources.device}"
        " --config {params.config:q} --lr {output.lr} 2> {log}"


def restore_job(wildcards):
    """What determines the restorations of a benchmark by a policy."""
    task = task_of(wildcards)
    dataset = cfg.datasets[task.dataset]
    return params_json(
        {
            "policy": cfg.policy(wildcards.source).model_dump(),
            "prompt": dataset.prompt.model_dump(exclude={"table"}),
            "scale": dataset.degradation.scale,
            "tile": task.tile,
            "num_seeds": task.num_seeds,
            "seed": cfg.seed,
        }
    )


def describer_files(wildcards):
    """The files of the model that describes the LR images; those of the weights cache are no input."""
    prompt = cfg.datasets[task_of(wildcards).dataset].prompt
    files = config_checks.prompt_files(prompt).values()
    return [path for path in files if path and not path.startswith("hub:")]


rule restore:
    input:
        lr=f"{R}/downstream/{{task}}/lr/shard-{{shard}}.tar",
        control=lambda wildcards: control_input(wildcards.source),
        model=lambda wildcards: model_input(wildcards.source),
        describer=describer_files,
    output:
        restored=f"{R}/downstream/{{task}}/{{source}}/restored/shard-{{shard}}.tar",
    log:
        f"{R}/logs/downstream/{{task}}/{{source}}/restore/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/downstream/{{task}}/{{source}}/restore/shard-{{shard}}.tsv"
    wildcard_constraints:
        source="|".join(sampled_policies),
    threads: 2
    resources:
        mem_mb=growing(16000),
        runtime=cfg.limits.longest_min,  # how many tiles there are is known when it runs
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=restore_job,
        control=lambda wildcards: control_arg(wildcards.source),
        version=versions.RESTORE,
    shell:
        "python -m dp2osr.stages.restore --lr {input.lr} --control {params.control:q}"
        " --device {resources.device} --config {params.config:q} --restored {output.restored} 2> {log}"


def seen(wildcards):
    """The shard whose images a model sees: for hr it says which photographs, for lr it holds them."""
    root = f"{R}/downstream/{wildcards.task}"
    if wildcards.source in config_downstream.SOURCES:
        return f"{root}/lr/shard-{wildcards.shard}.tar"
    return f"{root}/{wildcards.source}/restored/shard-{wildcards.shard}.tar"


def seen_photographs(wildcards):
    return [task_of(wildcards).images] if wildcards.source == "hr" else []


def predict_job(wildcards):
    task = task_of(wildcards)
    scale = cfg.datasets[task.dataset].degradation.scale
    return params_json(
        task.model_dump(include={"kind", "architecture", "max_pixels"})
        | {"scale": scale}
    )


rule predict:
    input:
        shard=seen,
        images=seen_photographs,
        annotations=lambda wildcards: task_of(wildcards).annotations,
        model=lambda wildcards: task_of(wildcards).model,
    output:
        predictions=f"{R}/downstream/{{task}}/{{source}}/predictions/shard-{{shard}}.parquet",
    log:
        f"{R}/logs/downstream/{{task}}/{{source}}/predict/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/downstream/{{task}}/{{source}}/predict/shard-{{shard}}.tsv"
    threads: 2
    resources:
        mem_mb=growing(8000),
        runtime=growing(240),  # minutes
        gpu=num_gpus,
        device=cfg.device,
    params:
        images=lambda wildcards, input: optional("--images", input.images),
        config=predict_job,
        version=versions.PREDICT,
    shell:
        "python -m dp2osr.stages.predict --source {input.shard} {params.images} --annotations {input.annotations:q}"
        " --model {input.model:q} --device {resources.device} --config {params.config:q}"
        " --predictions {output.predictions} 2> {log}"


def compared_sources(run):
    return dict.fromkeys([*config_downstream.SOURCES, cfg.runs[run].reference, run])


def source_predictions(wildcards):
    """Source and table of each shard of what is compared."""
    return [
        (
            source,
            f"{R}/downstream/{wildcards.task}/{source}/predictions/shard-{shard}.parquet",
        )
        for source in compared_sources(wildcards.run)
        for shard in task_shards(wildcards)
    ]


def downstream_job(wildcards):
    task = task_of(wildcards)
    return params_json(
        {
            "kind": task.kind,
            "reference": cfg.runs[wildcards.run].reference,
            "bootstrap": task.bootstrap,
            "confidence": cfg.evaluate.confidence,
            "seed": cfg.seed,
        }
    )


rule compare_downstream:
    input:
        predictions=lambda wildcards: [
            path for _, path in source_predictions(wildcards)
        ],
        annotations=lambda wildcards: task_of(wildcards).annotations,
    output:
        table=f"{R}/runs/{{run}}/downstream/{{task}}.parquet",
        csv=f"{R}/runs/{{run}}/downstream/{{task}}.csv",
    log:
        f"{R}/logs/runs/{{run}}/downstream/{{task}}.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/downstream/{{task}}.tsv"
    resources:
        mem_mb=growing(8000),
        runtime=growing(120),  # minutes
    params:
        named=lambda wildcards: [
            f"{name}={path}" for name, path in source_predictions(wildcards)
        ],
        config=downstream_job,
        version=versions.DOWNSTREAM,
    shell:
        "python -m dp2osr.stages.downstream --predictions {params.named:q} --annotations {input.annotations:q}"
        " --config {params.config:q} --table {output.table} 2> {log}"
