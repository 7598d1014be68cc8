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


# Batch size and device are resources, not params: a change of them reruns nothing.
rule score:
    input:
        candidates=f"{R}/{{dataset}}/{{policy}}/candidates/shard-{{shard}}.block-{{block}}.tar",
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
        niqe=score_niqe,
    output:
        scores=f"{R}/{{dataset}}/{{policy}}/scores/{{metrics}}/shard-{{shard}}.block-{{block}}.parquet",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/score/{{metrics}}/shard-{{shard}}.block-{{block}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/score/{{metrics}}/shard-{{shard}}.block-{{block}}.tsv"
    cache: caching
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=lambda wildcards, attempt: time_limit(
            images_per_block * cfg.limits.score, attempt
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
