def rollout_job(wildcards):
    """What determines the candidates of a block: no key of how jobs are cut into batches is among it."""
    first = int(wildcards.block) * cfg.rollout.rollouts_per_block
    dataset = cfg.datasets[wildcards.dataset]
    whole = {"whole": True} if dataset.crop == "full" else {}
    return params_json(
        {
            "policy": cfg.policy(wildcards.policy).model_dump(),
            "seed": cfg.seed,
            "first": first,
            "count": min(
                cfg.rollout.rollouts_per_block,
                cfg.num_rollouts(wildcards.dataset) - first,
            ),
            "scale": dataset.degradation.scale,
            "image_format": cfg.rollout.image_format,
        }
        | whole
    )


def rollout_embeddings(wildcards):
    """The embeddings that the frozen backbone behind a policy or run takes."""
    root = cfg.root_policy(wildcards.policy)
    return (
        f"{R}/{wildcards.dataset}/{root}/embeddings/shard-{wildcards.shard}.safetensors"
    )


sampled_policies = [
    *(name for name, policy in cfg.policies.items() if not policy.derive),
    *cfg.runs,
]


rule embed:
    input:
        prompts=f"{R}/{{dataset}}/prompts/shard-{{shard}}.parquet",
        model=lambda wildcards: model_input(wildcards.policy),
    output:
        embeddings=f"{R}/{{dataset}}/{{policy}}/embeddings/shard-{{shard}}.safetensors",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/embed/shard-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/embed/shard-{{shard}}.tsv"
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=lambda wildcards: params_json(cfg.policy(wildcards.policy)),
        version=versions.EMBED,
    shell:
        "python -m dp2osr.stages.embed --prompts {input.prompts} --device {resources.device}"
        " --config {params.config:q} --embeddings {output.embeddings} 2> {log}"


# Batch size, device and what only makes it faster are resources, not params: a change of them reruns nothing.
rule rollout:
    input:
        lr=f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
        embeddings=rollout_embeddings,
        control=lambda wildcards: control_input(wildcards.policy),
        model=lambda wildcards: model_input(wildcards.policy),
    output:
        candidates=f"{R}/{{dataset}}/{{policy}}/candidates/shard-{{shard}}.block-{{block}}.tar",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/rollout/shard-{{shard}}.block-{{block}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/rollout/shard-{{shard}}.block-{{block}}.tsv"
    wildcard_constraints:
        policy="|".join(sampled_policies),
    cache: caching
    threads: 2
    resources:
        mem_mb=growing(16000),
        runtime=lambda wildcards, attempt: time_limit(
            images_per_block
            * cfg.policy(wildcards.policy).sampling.steps
            * cfg.limits.rollout,
            attempt,
        ),
        batch_size=cfg.rollout.batch_size,
        speed=params_json(cfg.rollout.speed.model_dump()),
        gpu=num_gpus,
        device=cfg.device,
    params:
        config=rollout_job,
        control=lambda wildcards: control_arg(wildcards.policy),
        version=versions.ROLLOUT,
    shell:
        "python -m dp2osr.stages.rollout --lr {input.lr} --embeddings {input.embeddings}"
        " --control {params.control:q} --batch-size {resources.batch_size} --speed {resources.speed:q}"
        " --device {resources.device}"
        " --config {params.config:q} --candidates {output.candidates} 2> {log}"


without_benchmark("rollout")
