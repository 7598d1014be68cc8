niqe_model = f"{R}/{cfg.iqa.niqe.dataset}/niqe.mat"


def score_niqe(wildcards):
    """The fitted model, for the metric group that holds niqe."""
    return [niqe_model] if "niqe" in cfg.iqa.groups[wildcards.metrics] else []


def score_job(wildcards):
    """What determines the scores; without niqe, its block size does not, nor do vqr1's settings without vqr1."""
    names = config_datasets.metric_groups(cfg, wildcards.dataset)[wildcards.metrics]
    block = cfg.iqa.niqe.block_size if "niqe" in names else 96
    vqr1 = {"vqr1": cfg.iqa.vqr1.model_dump()} if "vqr1" in names else {}
    return params_json({"metrics": names, "niqe_block": block} | vqr1)


def score_vqr1(wildcards):
    """A file of VisualQuality-R1's folder: with a wrong path the run stops before its first job."""
    path = cfg.iqa.vqr1.model
    used = "vqr1" in cfg.iqa.groups[wildcards.metrics] and not path.startswith("hub:")
    return [f"{path}/config.json"] if used else []


def score_memory(wildcards, attempt):
    """MB; the weights of the two metrics that are language models, 16 GB each, pass through main memory."""
    large = {"qalign", "vqr1"} & set(cfg.iqa.groups[wildcards.metrics])
    return (24000 if large else 8000) * attempt


def score_seconds(wildcards):
    """Seconds an image with all metrics of a group."""
    thinking = cfg.limits.vqr1 if "vqr1" in cfg.iqa.groups[wildcards.metrics] else 0
    return cfg.limits.score + thinking


# Batch size and device are resources, not params: a change of them reruns nothing.
rule score:
    input:
        candidates=f"{R}/{{dataset}}/{{policy}}/candidates/shard-{{shard}}.block-{{block}}.tar",
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
        niqe=score_niqe,
        vqr1=score_vqr1,
    output:
        scores=f"{R}/{{dataset}}/{{policy}}/scores/{{metrics}}/shard-{{shard}}.block-{{block}}.parquet",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/score/{{metrics}}/shard-{{shard}}.block-{{block}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/score/{{metrics}}/shard-{{shard}}.block-{{block}}.tsv"
    cache: caching
    threads: 1
    resources:
        mem_mb=score_memory,
        runtime=lambda wildcards, attempt: time_limit(
            images_per_block * score_seconds(wildcards), attempt
        ),
        batch_size=cfg.iqa.batch_size,
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=score_job,
        niqe=lambda wildcards, input: f"--niqe {input.niqe}" if input.niqe else "",
        version=versions.SCORE,
    shell:
        "python -m dp2osr.stages.score --candidates {input.candidates} --lr {input.lr} {params.niqe}"
        " --batch-size {resources.batch_size} --device {resources.device}"
        " --config {params.config:q} --scores {output.scores} 2> {log}"


without_benchmark("score")
