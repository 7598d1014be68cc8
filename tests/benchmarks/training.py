"""Group-wise against pair-wise training at the same number of image forwards a step.

A group of N winners and N losers gives N² pairs from 2N images; taken pair by pair the same 2N images give N pairs.
Prints pairs a second of both and their ratio. With `--reward CONFIG` (after the workflow made the run's pairs and
encoded shards) it also trains both ways for the same steps and prints the validation reward beside the mean |z|:
the count of pairs promises more than the reward gains, so quote the reward.

    python tests/benchmarks/training.py
    python tests/benchmarks/training.py --reward config/config.yaml --run default --steps 120
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator

from dp2osr import config, shards, tables
from dp2osr.errors import UserError
from dp2osr.models.backend import Backend, load_backend, resolve
from dp2osr.stages import train
from dp2osr.training.batches import Schedule
from dp2osr.training.checkpoint import Store
from dp2osr.training.loop import Trainer
from dp2osr.training.pack import FIELD, Pack, dump_group
from dp2osr.training.step import Feed

ROOT = Path(__file__).resolve().parents[2]


def find_policy(base: config.PolicySettings, folder: Path) -> config.PolicySettings:
    """Return the embedded model, or where it is absent a random one of a few thousand weights."""
    try:
        resolve(base.model)
    except UserError:
        spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "tiny.py")
        assert spec is not None and spec.loader is not None
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        model = tiny.build(folder / "model")
        print(f"{base.model} not found: a random tiny model takes its place")
        return base.model_copy(update={"model": str(model), "control": str(model / "controlnet")})
    return base


def random_feed(backend: Backend, groups: list[str], args: argparse.Namespace, folder: Path) -> Feed:
    """Return encoded random images: speed does not depend on what they show."""
    samples = []
    for group in groups:
        latents = backend.encode_images(torch.rand(2 * args.top, 3, args.size, args.size))
        data = dump_group(latents, range(2 * args.top), control=torch.rand(3, args.size, args.size))
        samples.append((group, {FIELD: data}))
    shards.write_shard(folder / "encoded.tar", samples)
    prompt = {name: tensor[0] for name, tensor in backend.embed_prompts([""]).items()}
    return Feed(
        pack=Pack([folder / "encoded.tar"], backend.prepare_control),
        embeddings=dict.fromkeys(groups, prompt),
        backend=backend,
        timestep_density="uniform",
    )


def all_pairs(groups: list[str], top: int) -> pd.DataFrame:
    """Return N² pairs of each group, winners 0..N-1, losers N..2N-1."""
    rows = [(group, w, top + loser, 1.0) for group in groups for w in range(top) for loser in range(top)]
    return pd.DataFrame(rows, columns=["group_id", "chosen", "rejected", "weight"])


def ways(settings: config.TrainSettings, top: int, **changes: Any) -> dict[str, config.TrainSettings]:
    """Return both batchings with equal image forwards: 2·N images a group, or N pairs of 2."""
    groups = settings.groups_per_step
    both = {"groups_per_step": groups, "pairs_per_step": groups * top, "tracker": "none", **changes}
    return {name: settings.model_copy(update={"batching": name, **both}) for name in ("groups", "pairs")}


def speed(args: argparse.Namespace, settings: config.Config, folder: Path) -> None:
    """Print pairs a second of both ways, their steps timed in turns."""
    policy = find_policy(settings.policy("base"), folder)
    backend = load_backend(policy, device=torch.device("cpu"))
    groups = [f"{number:016x}-000" for number in range(8)]
    feed, pairs = random_feed(backend, groups, args, folder), all_pairs(groups, args.top)
    base = config.TrainSettings(**settings.runs[args.run].train.model_dump())
    trainers = {
        name: Trainer(
            accelerator=Accelerator(cpu=True),
            feed=feed,
            schedule=Schedule(pairs, settings=way, seed=0),
            policy=backend.load_control(policy.control),
            reference=backend.load_control(policy.control),
            settings=way,
            guard=None,
            store=Store(folder, name, record={}),
        )
        for name, way in ways(base, args.top, steps=args.rounds + 1).items()
    }
    seconds = dict.fromkeys(trainers, 0.0)
    for turn in range(args.rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step()
            seconds[name] += (time.perf_counter() - start) * (turn > 0)  # the first warms up
    images = base.groups_per_step * args.top * 2
    print(f"{images} images a step, N = {args.top}, {args.rounds} steps each")
    rates = {}
    for name, trainer in trainers.items():
        count = trainer.progress.log[-1]["num_pairs"]
        rates[name] = count * args.rounds / seconds[name]
        print(f"{name:>7}: {seconds[name] / args.rounds:.3f} s a step, {count} pairs a step, {rates[name]:.1f} pairs/s")
    print(f"groups / pairs: {rates['groups'] / rates['pairs']:.2f} times the pairs a second")


def train_both(args: argparse.Namespace, settings: config.Config, folder: Path) -> None:
    """Train the run both ways from the artefacts of its workflow; print reward and mean |z| at equal compute."""
    run, results = settings.runs[args.run], Path(settings.results)
    guard = run.train.guard.model_copy(
        update={"every": args.steps // 2, "patience": 99, "min_diversity": 0.0, "max_reward_drop": 99.0}
    )
    names = {"train": results / run.dataset, "val": results / guard.dataset}
    embeddings = {
        key: sorted((path / settings.root_policy(run.reference)).glob("embeddings/*")) for key, path in names.items()
    }
    scales = names["val"] / run.reference / "scales" / f"{run.reward}.parquet"
    reference = settings.policy(run.reference).control
    if run.reference in settings.runs:
        reference = str(results / "runs" / run.reference / "policy")
    inputs = ["--pairs", results / "runs" / args.run / "pairs.parquet", "--reference", reference]
    inputs += ["--encoded", *sorted((results / "runs" / args.run / "encoded").glob("shard-*.tar"))]
    inputs += ["--embeddings", *embeddings["train"], "--val-embeddings", *embeddings["val"], "--val-scales", scales]
    inputs += ["--val-lr", *sorted((names["val"] / "lr").glob("shard-*.tar"))]
    inputs += ["--niqe", results / settings.iqa.niqe.dataset / "niqe.mat", "--device", settings.device]
    print(f"{'':>7}  {'step':>5} {'reward':>8} {'FR':>8} {'NR':>8} {'diversity':>9} {'mean |z|':>8} {'seconds':>8}")
    for name, way in ways(run.train, run.pairs.top, steps=args.steps, guard=guard).items():
        job = train.TrainJob(
            run=name,
            policy=settings.policy(run.reference),
            train=way,
            reward=settings.rewards[run.reward],
            niqe_block=settings.iqa.niqe.block_size,
            seed=args.seed,
            base_seed=settings.seed,
        )
        out = folder / name
        outputs = ["--policy", out / "policy", "--train-log", out / "log", "--validation", out / "validation"]
        train.main([str(part) for part in (*inputs, *outputs, "--config", json.dumps(job.model_dump()))])
        log = tables.read(out / "log", tables.TRAIN_LOG).set_index("step")
        spent = (log["num_pairs"] / log["pairs_per_second"]).cumsum()
        for row in tables.read(out / "validation", tables.VALIDATION).itertuples():
            logit = log["abs_logit"].loc[max(row.step - 9, 1) : row.step].mean() if row.step else 0.0
            line = f"{name:>7}  {row.step:5d} {row.reward:8.4f} {row.fr:8.4f} {row.nr:8.4f} {row.diversity:9.4f}"
            print(f"{line} {logit:8.3f} {spent.get(row.step, 0.0):8.1f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=4, help="N: winners a group, and losers")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps each")
    parser.add_argument("--reward", nargs="+", metavar="CONFIG", help="also train both ways on this workflow's results")
    parser.add_argument("--run", default="default")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = config.read(*(args.reward or [ROOT / "config" / "config.yaml"]))
    with tempfile.TemporaryDirectory() as folder:
        speed(args, settings, Path(folder))
        if args.reward:
            train_both(args, settings, Path(folder))


if __name__ == "__main__":
    main()
