def derive_job(wildcards):
    """How a derived policy's candidates are made."""
    policy = cfg.policies[wildcards.policy]
    return params_json(
        {
            "kind": policy.derive,
            "sigma": policy.derive_sigma,
            "scale": cfg.datasets[wildcards.dataset].degradation.scale,
            "image_format": cfg.rollout.image_format,
        }
    )


def derive_source(wildcards):
    """Blur takes the same block, the mean all blocks, bicubic the LR images alone."""
    policy = cfg.policies[wildcards.policy]
    if policy.derive == "bicubic":
        return f"{R}/{wildcards.dataset}/lr/shard-{wildcards.shard}.tar"
    used = blocks(wildcards.dataset) if policy.derive == "mean" else [wildcards.block]
    return expand(
        f"{R}/{wildcards.dataset}/{policy.derive_from}/candidates/shard-{wildcards.shard}.block-{{block}}.tar",
        block=used,
    )


derived_policies = [name for name, policy in cfg.policies.items() if policy.derive]


rule derive:
    input:
        source=derive_source,
    output:
        candidates=f"{R}/{{dataset}}/{{policy}}/candidates/shard-{{shard}}.block-{{block}}.tar",
    log:
        f"{R}/logs/{{dataset}}/{{policy}}/derive/shard-{{shard}}.block-{{block}}.log",
    benchmark:
        f"{R}/benchmarks/{{dataset}}/{{policy}}/derive/shard-{{shard}}.block-{{block}}.tsv"
    wildcard_constraints:
        policy="|".join(derived_policies) or "(?!)",
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        config=derive_job,
        version=versions.DERIVE,
    shell:
        "python -m dp2osr.stages.derive --source {input.source}"
        " --config {params.config:q} --candidates {output.candidates} 2> {log}"
