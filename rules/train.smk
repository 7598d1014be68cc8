def train_embeddings(wildcards):
    """Text embeddings of the training set, made by the root policy's text encoder."""
    run = cfg.runs[wildcards.run]
    return expand(
        f"{R}/{run.dataset}/{cfg.root_policy(run.reference)}/embeddings/shard-{{shard}}.safetensors",
        shard=shards(run.dataset),
    )


def guard_inputs(wildcards):
    """What the guard's validation rollouts need, by option of the stage; nothing where the guard is off."""
    run = cfg.runs[wildcards.run]
    if not run.train.guard.every:
        return {}
    dataset = run.train.guard.dataset
    root = cfg.root_policy(run.reference)
    names = shards(dataset)
    judge = cfg.judge(wildcards.run)
    reward = cfg.rewards[judge]
    fitted = [f"{R}/{cfg.iqa.niqe.dataset}/niqe.mat"]
    found = {
        "--val-lr": expand(f"{R}/{dataset}/lr/shard-{{shard}}.tar", shard=names),
        "--val-embeddings": expand(
            f"{R}/{dataset}/{root}/embeddings/shard-{{shard}}.safetensors", shard=names
        ),
        "--val-scales": [f"{R}/{dataset}/{run.reference}/scales/{judge}.parquet"],
    }
    return found | ({"--niqe": fitted} if "niqe" in [*reward.fr, *reward.nr] else {})


def train_job(wildcards):
    run = cfg.runs[wildcards.run]
    return params_json(
        {
            "run": wildcards.run,
            "policy": cfg.policy(run.reference).model_dump(),
            "train": run.train.model_dump(),
            "reward": cfg.rewards[cfg.judge(wildcards.run)].model_dump(),
            "niqe_block": cfg.iqa.niqe.block_size,
            "seed": run.seed,
            "base_seed": cfg.seed,
        }
    )


def train_images(wildcards):
    """The images that pass through the policy in all steps of a run."""
    run = cfg.runs[wildcards.run]
    return run.train.steps * images_a_step(run)


train_cpus = 2 * cfg.limits.train_gpus  # on each node


def train_spread():
    """What a training on several nodes asks SLURM for: the rule itself starts a launcher on each (docs/cluster.md)."""
    nodes = cfg.limits.train_nodes
    if nodes == 1:
        return {"gpu": num_gpus * cfg.limits.train_gpus, "launcher": ""}
    found = {"nodes": nodes, "tasks": nodes, "tasks_per_gpu": 0, "mpi": "srun"}
    gpus = {"gres": f"gpu:{cfg.limits.train_gpus}"} if num_gpus else {}
    return found | gpus | {"launcher": train_launcher}


def train_launcher(wildcards, threads):
    """srun with as many CPUs a node as the job asks for: also where --set-threads says how many."""
    nodes = cfg.limits.train_nodes
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
    return f"{srun} --cpus-per-task={threads} --kill-on-bad-exit=1 "


# Checkpoints lie beside the policy, undeclared: Snakemake keeps them when the job fails, and the next try goes on.
rule train:
    input:
        pairs=f"{R}/runs/{{run}}/pairs.parquet",
        encoded=lambda wildcards: expand(
            f"{R}/runs/{wildcards.run}/encoded/shard-{{shard}}.tar",
            shard=shards(cfg.runs[wildcards.run].dataset),
        ),
        embeddings=train_embeddings,
        reference=lambda wildcards: control_input(cfg.runs[wildcards.run].reference),
        guard=lambda wildcards: [
            path for paths in guard_inputs(wildcards).values() for path in paths
        ],
    output:
        policy=directory(f"{R}/runs/{{run}}/policy"),
        train_log=f"{R}/runs/{{run}}/train_log.parquet",
        validation=f"{R}/runs/{{run}}/validation.parquet",
    log:
        f"{R}/logs/runs/{{run}}/train.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/train.tsv"
    threads: train_cpus
    resources:
        **train_spread(),
        mem_mb=growing(16000 * cfg.limits.train_gpus),
        runtime=lambda wildcards, attempt: time_limit(
            train_images(wildcards)
            * cfg.limits.train
            / (cfg.limits.train_gpus * cfg.limits.train_nodes),
            attempt,
        ),
        num_nodes=cfg.limits.train_nodes,
        device=cfg.device,
        scoring_batch=cfg.iqa.batch_size,
    params:
        config=train_job,
        reference=lambda wildcards: control_arg(cfg.runs[wildcards.run].reference),
        guard=lambda wildcards: " ".join(
            " ".join([option, *paths])
            for option, paths in guard_inputs(wildcards).items()
        ),
        version=versions.TRAIN,
    shell:
        "{resources.launcher}python -m dp2osr.stages.train --nodes {resources.num_nodes} --pairs {input.pairs} --encoded {input.encoded}"
        " --embeddings {input.embeddings} --reference {params.reference:q} {params.guard}"
        " --device {resources.device} --scoring-batch {resources.scoring_batch}"
        " --config {params.config:q} --policy {output.policy} --train-log {output.train_log}"
        " --validation {output.validation} 2> {log}"
