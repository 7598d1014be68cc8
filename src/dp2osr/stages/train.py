"""Tune a control branch by preference pairs (DPO), with validation rollouts as a guard.

Resumes from `checkpoints/` beside the policy. With several GPUs visible it starts one process for each; with several
nodes, one such command on each of them.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import pieces, resume, stage, tables, versions
from dp2osr.config import PolicySettings, RewardSettings, TrainSettings
from dp2osr.config_checks import check_precision
from dp2osr.errors import UserError, in_one_line
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dp2osr.models.backend import Backend
    from dp2osr.training.checkpoint import Store
    from dp2osr.training.guard import Guard
    from dp2osr.training.loop import Trainer
    from dp2osr.training.step import Feed

logger = logging.getLogger(__name__)


class TrainJob(Strict):
    """Settings of one training: the root policy's model, the run's seed, and `base_seed` of the rollouts."""

    run: str
    policy: PolicySettings
    train: TrainSettings
    reward: RewardSettings
    niqe_block: Count
    seed: int
    base_seed: int


def job_mark(args: argparse.Namespace) -> str:
    """Return the fingerprint of all that determines the weights.

    Large shards count by name and size: what is in them follows from pairs.parquet, whose content counts.
    """
    job: TrainJob = args.config
    settings = job.model_dump_json(exclude={"run": True, "train": {"tracker", "checkpoint_every", "sharding"}})
    sizes = [f"{path.name}:{path.stat().st_size}" for path in (*args.encoded, *args.embeddings, *args.val_lr)]
    contents = [path for path in (args.pairs, *args.val_scales, args.niqe) if path is not None]
    numbers = f"{versions.ENCODE} {versions.TRAIN}"
    return resume.fingerprint(settings, numbers, *sizes, args.reference, *contents, *_folder(args.reference))


def _folder(reference: str) -> list[Path]:
    return [Path(reference)] if Path(reference).exists() else []


def make_accelerator(job: TrainJob, folder: Path, *, device: str) -> "Accelerator":
    """Return the accelerator with its tracker's folder beside the policy."""
    from accelerate import Accelerator

    tracker = None if job.train.tracker == "none" else job.train.tracker
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"config: train.tracker: {tracker} is not installed; install it or take none")
    check_precision("train", job.train, job.policy)
    cpu = stage.device(device).type == "cpu"
    if cpu and job.train.precision == "fp16":
        raise UserError("config: train.precision: found 'fp16' on the CPU, wanted no or bf16")
    options = {"mixed_precision": job.train.precision, "log_with": tracker, "project_dir": str(folder / "tracker")}
    accelerator = Accelerator(cpu=cpu, **options)
    if tracker:
        accelerator.init_trackers(job.run.replace("/", "-"))
    return accelerator


def make_feed(args: argparse.Namespace, backend: "Backend", group_ids: Sequence[str]) -> "Feed":
    """Return the source of training images; raises UserError where a group of the pairs has none."""
    from dp2osr.models.backend import StoredEmbeddings
    from dp2osr.training.pack import Pack
    from dp2osr.training.step import Feed

    pack = Pack(args.encoded, backend.prepare_control)
    pack.check(group_ids)
    embeddings = StoredEmbeddings(args.embeddings)
    if missing := [group_id for group_id in group_ids if group_id not in embeddings]:
        raise UserError(f"embeddings: group {missing[0]} is missing, though pairs has it")
    density = args.config.train.timestep_density
    return Feed(pack=pack, embeddings=embeddings, backend=backend, timestep_density=density)


def make_guard(
    args: argparse.Namespace, accelerator: "Accelerator", backend: "Backend", *, batch_size: int
) -> "Guard | None":
    """Return the guard, or None where it is off."""
    from dp2osr.iqa.metric import Scorer
    from dp2osr.models.backend import read_embeddings
    from dp2osr.training.guard import Guard, read_images

    job: TrainJob = args.config
    if not job.train.guard.every:
        return None
    if not args.val_lr or not args.val_embeddings or not args.val_scales:
        raise UserError("--val-lr, --val-embeddings and --val-scales are needed where train.guard.every is not 0")
    read = [read_embeddings(path) for path in args.val_embeddings]
    names = [*job.reward.fr, *job.reward.nr]
    niqe = {"niqe": args.niqe, "niqe_block": job.niqe_block}
    return Guard(
        accelerator=accelerator,
        backend=backend,
        images=read_images(args.val_lr, {group: value for groups, _ in read for group, value in groups.items()}),
        negative=read[0][1],
        scorer=Scorer(names, device=backend.device, batch_size=args.scoring_batch, **niqe),
        scales=tables.read_many(args.val_scales, tables.SCALES),
        reward=job.reward,
        sampling=job.policy.sampling,
        settings=job.train.guard,
        base_seed=job.base_seed,
        batch_size=batch_size,
    )


def is_sharded(settings: TrainSettings, processes: int) -> bool:
    """Return whether the backbone is shared out; one process alone holds it whole, whatever the settings say."""
    if settings.sharding == "backbone" and processes == 1:
        logger.info("train.sharding: backbone: found one process, which holds the backbone whole")
    return settings.sharding == "backbone" and processes > 1


def fitting(settings: TrainSettings, store: "Store") -> TrainSettings:
    """Return the settings, with a smaller micro_batch where memory was short before; the same in all processes."""
    from accelerate.utils import broadcast_object_list

    (size,) = broadcast_object_list([store.micro_batch(settings.micro_batch)])
    if size < settings.micro_batch:
        logger.info("micro_batch %d, not %d: memory was short (%s)", size, settings.micro_batch, store.micro_batch_file)
    return settings.model_copy(update={"micro_batch": size})


def train(trainer: "Trainer") -> None:
    """Train to the end; where memory is short, leave a smaller micro_batch to the next try and raise UserError.

    Not at once, for the other processes are in the midst of a step that this one cannot finish.
    """
    size = trainer.settings.micro_batch
    try:
        trainer.run()
    except Exception as error:
        if not pieces.out_of_memory(error):
            raise
        found = f"train: out of memory with micro_batch {size} ({in_one_line(error)})"
        if size == 1:
            wanted = "a larger GPU, gradient_checkpointing, sharding: backbone or fewer guard.num_rollouts"
            raise UserError(f"{found}; wanted {wanted}") from error
        trainer.store.halve_micro_batch(size)
        raise UserError(f"{found}; the same command goes on with {size // 2} from the last checkpoint") from error


def make_trainer(args: argparse.Namespace, accelerator: "Accelerator", store: "Store") -> "Trainer":
    """Put backend, branches, data and guard together."""
    from dp2osr.models.backend import load_backend
    from dp2osr.training.batches import Schedule
    from dp2osr.training.loop import Trainer

    job: TrainJob = args.config
    settings = fitting(job.train, store)
    parts = frozenset({"backbone", "vae"} if job.train.guard.every else {"backbone"})
    shared = is_sharded(job.train, accelerator.num_processes)
    backend = load_backend(job.policy, device=accelerator.device, parts=parts, sharded=shared)
    schedule = Schedule(tables.read(args.pairs, tables.PAIRS), settings=job.train, seed=job.seed)
    reference = backend.load_control(args.reference)
    policy = backend.load_control(args.reference).float()
    if job.train.gradient_checkpointing:
        backend.checkpoint_gradients(policy)
    return Trainer(
        accelerator=accelerator,
        feed=make_feed(args, backend, schedule.group_ids),
        schedule=schedule,
        policy=policy,
        sample_dtype=next(reference.parameters()).dtype,
        reference=reference.float(),  # the same arithmetic as the policy's, so that training starts at log 2
        settings=settings,
        guard=make_guard(args, accelerator, backend, batch_size=settings.micro_batch),
        store=store,
    )


def write_outputs(args: argparse.Namespace, trainer: "Trainer", record: dict) -> None:
    """Write both tables, then the policy's folder."""
    import pandas as pd

    from dp2osr.training.checkpoint import atomic_folder

    progress = trainer.progress
    for rows, path, schema in (
        (progress.log, args.train_log, tables.TRAIN_LOG),
        (progress.validation, args.validation, tables.VALIDATION),
    ):
        tables.write(pd.DataFrame(rows, columns=schema.names), path, schema)
    guarded = trainer.guard is not None
    chosen = {"step": progress.best_step if guarded else progress.step, "verdict": progress.verdict}
    weights: dict[str, torch.Tensor] = trainer.final_weights()
    trainer.policy.load_state_dict(weights)
    with atomic_folder(args.policy) as folder:
        trainer.feed.backend.save_control(trainer.policy, folder)
        (folder / "policy.json").write_text(json.dumps({**chosen, **record}, indent=1, sort_keys=True) + "\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse paths and settings."""
    parser = stage.parser(__doc__)
    parser.add_argument("--pairs", type=Path, required=True, help="pairs of the run")
    parser.add_argument("--reference", required=True, help="reference control branch: folder, weights or builtin:NAME")
    for name, required, text in (
        ("--encoded", True, "encoded shards of the run"),
        ("--embeddings", True, "text embeddings of the training shards"),
        ("--val-lr", False, "LR shards of the guard's dataset"),
        ("--val-embeddings", False, "text embeddings of the guard's dataset"),
        ("--val-scales", False, "the reference's scales on the guard's dataset"),
    ):
        parser.add_argument(name, type=Path, nargs="+", required=required, default=[], help=text)
    parser.add_argument("--niqe", type=Path, help="fitted NIQE parameters, where the reward holds niqe")
    parser.add_argument("--scoring-batch", type=int, default=32, help="validation images scored at once")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=0, help="of this node; 0: one a visible GPU, on the CPU one")
    parser.add_argument("--nodes", type=int, default=1, help="launchers that are started, one a node (docs/cluster.md)")
    parser.add_argument("--policy", type=Path, required=True, help="output: folder of the tuned control branch")
    parser.add_argument("--train-log", type=Path, required=True, help="output: a row a step")
    parser.add_argument("--validation", type=Path, required=True, help="output: a row a validation rollout")
    stage.config_arg(parser, TrainJob)
    return stage.parse_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on with a training; write policy and tables."""
    args = parse_args(argv)
    from dp2osr.training import launch
    from dp2osr.training.checkpoint import Store

    job: TrainJob = args.config
    processes = launch.num_processes(args.processes, args.device)
    if launch.needs_launch(processes, args.nodes):
        own = sys.argv[1:] if argv is None else argv
        sys.exit(launch.Launcher().run("dp2osr.stages.train", own, launch.place(args.nodes), processes=processes))
    mark = job_mark(args)
    record = {"run": job.run, "config": job.model_dump(mode="json"), "fingerprint": mark, **launch.provenance()}
    accelerator = make_accelerator(job, args.policy.parent, device=args.device)
    store = Store(args.policy.parent / "checkpoints", mark, record=record)
    trainer = make_trainer(args, accelerator, store)
    train(trainer)
    accelerator.end_training()
    if accelerator.is_main_process:
        write_outputs(args, trainer, record)
        store.clear_leftovers()


if __name__ == "__main__":
    stage.run(main)
