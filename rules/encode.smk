def encode_candidates(wildcards):
    """The reference's candidates of a shard: the blocks of seeds that the run's M needs."""
    run = cfg.runs[wildcards.run]
    used = -(-cfg.rewards[run.reward].num_rollouts // cfg.rollout.rollouts_per_block)
    return expand(
        f"{R}/{run.dataset}/{run.reference}/candidates/shard-{wildcards.shard}.block-{{block}}.tar",
        block=blocks(run.dataset)[:used],
    )


def encode_images(wildcards):
    """The selected candidates of a shard, at most."""
    return cfg.limits.images_per_shard * 2 * cfg.runs[wildcards.run].pairs.top


rule encode:
    input:
        pairs=f"{R}/runs/{{run}}/pairs.parquet",
        candidates=encode_candidates,
        lr=lambda wildcards: f"{R}/{cfg.runs[wildcards.run].dataset}/lr/shard-{wildcards.shard}.tar",
    output:
        encoded=f"{R}/runs/{{run}}/encoded/shard-{{shard}}.tar",
    log:
        f"{R}/logs/runs/{{run}}/encode/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/encode/shard-{{shard}}.tsv"
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=lambda wildcards, attempt: time_limit(
            encode_images(wildcards) * cfg.limits.encode, attempt
        ),
        batch_size=cfg.rollout.batch_size,
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=lambda wildcards: params_json(
            cfg.policy(cfg.runs[wildcards.run].reference)
        ),
        version=versions.ENCODE,
    shell:
        "python -m dp2osr.stages.encode --pairs {input.pairs} --candidates {input.candidates} --lr {input.lr}"
        " --batch-size {resources.batch_size} --device {resources.device}"
        " --config {params.config:q} --encoded {output.encoded} 2> {log}"
