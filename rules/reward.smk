def num_candidates(wildcards):
    """Candidates an image that the reward takes: its M, or 1 for a control without seeds."""
    policy = cfg.policies.get(wildcards.policy)
    if policy and policy.derive in ("mean", "bicubic"):
        return 1
    return cfg.rewards[wildcards.reward].num_rollouts


def reward_job(wildcards):
    """The definition, and the names of the score tables: the data set's metric groups and shards, M's blocks."""
    used = -(-num_candidates(wildcards) // cfg.rollout.rollouts_per_block)
    reward = config_datasets.reward_on(cfg, wildcards.reward, wildcards.dataset)
    return {
        "reward": reward.model_dump(),
        "num_candidates": num_candidates(wildcards),
        "groups": list(config_datasets.metric_groups(cfg, wildcards.dataset)),
        "shards": shards(wildcards.dataset),
        "blocks": blocks(wildcards.dataset)[:used],
    }


def reward_scores(wildcards):
    job = reward_job(wildcards)
    return expand(
        f"{R}/{wildcards.dataset}/{wildcards.policy}/scores/{{group}}/shard-{{shard}}.block-{{block}}.parquet",
        group=job["groups"],
        shard=job["shards"],
        block=job["blocks"],
    )


# The folder, not each of perhaps thousands of files, is on the command line, which has a length limit.
rule reward:
    input:
        scores=reward_scores,
    output:
        rewards=f"{R}/{{dataset}}/{{policy}}/rewards/{{reward}}.parquet",
        scales=f"{R}/{{dataset}}/{{policy}}/scales/{{reward}}.parquet",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/reward/{{reward}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/reward/{{reward}}.tsv"
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),
    params:
        scores=f"{R}/{{dataset}}/{{policy}}/scores",
        config=lambda wildcards: params_json(reward_job(wildcards)),
        version=versions.REWARD,
    shell:
        "python -m dp2osr.stages.reward --scores {params.scores:q} --config {params.config:q}"
        " --rewards {output.rewards} --scales {output.scales} 2> {log}"
