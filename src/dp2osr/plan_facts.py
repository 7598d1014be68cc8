"""What a plan can know from files: images of each data set, and time and size of jobs that ran before."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path

from dp2osr import images, tables
from dp2osr.config import Config, DatasetSettings
from dp2osr.config_datasets import metric_groups
from dp2osr.plan import ONE_PROMPT, Amount, Facts, Wanted, images_a_step, prompt_stage

Job = tuple[str, str, float, int]  # stage, kind, seconds, images


def gather(config: Config, *, given_images: Mapping[str, int], given_seconds: Mapping[str, float]) -> Facts:
    """Return what is known; given figures (images by data set, seconds of an image by stage) go before all others."""
    given = {name: Amount(count, "given") for name, count in given_images.items()}
    shards = {name: _shards(config, name) for name in config.datasets}
    found = {name: _count(settings, shards[name]) for name, settings in config.datasets.items()}
    known = {name: amount for name, amount in found.items() if amount is not None}
    seconds, sizes = _seconds(config, shards), _sizes(config, shards)
    return Facts(images=known | given, seconds=seconds, given=given_seconds, sizes=sizes)


def _shards(config: Config, name: str) -> dict[str, int]:
    """Return the number of images in each shard of a data set that was ingested; else nothing."""
    path = Path(config.results) / name / "images.parquet"
    if not path.is_file():
        return {}
    table = tables.read(path, tables.IMAGES)
    counts = table.loc[table["status"] == "ok", "shard"].value_counts()
    return {f"{shard:04d}": int(count) for shard, count in counts.items()}


def _count(settings: DatasetSettings, shards: Mapping[str, int]) -> Amount | None:
    if shards:
        return Amount(sum(shards.values()), "images.parquet")
    files = [_files(entry) for entry in settings.images]
    known = [count for count in files if count is not None]
    if not files or len(known) < len(files):
        return None
    crops = 1 if settings.crop in ("center", "full") else settings.crops_per_image
    return Amount(sum(known) * crops, f"files x {crops} crops", True)


def _files(entry: str) -> int | None:
    """Return how many images a config entry names; None where that is not known without reading it."""
    if entry.startswith(images.BUILTIN):
        return len(images.expand_builtin(entry.removeprefix(images.BUILTIN)))
    root = Path(entry)
    if root.is_dir():
        paths = [path for path in root.rglob("*") if path.is_file()]
    else:
        paths = [root] if root.is_file() else [Path(path) for path in glob(entry, recursive=True)]  # noqa: PTH207
    if not paths or any(path.suffix.lower() == ".tar" for path in paths):
        return None
    return sum(path.suffix.lower() in images.SUFFIXES for path in paths)


def _seconds(config: Config, shards: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, str], float]:
    """Return the mean seconds of an image by (stage, kind), over all jobs that left a timing."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for stage, kind, seconds, count in _jobs(config, shards):
        sums[stage, kind][0] += seconds
        sums[stage, kind][1] += count
    means = {key: seconds / count for key, (seconds, count) in sums.items() if count}
    parts = {group: means.pop(("score", group), None) for group in config.iqa.groups}
    for dataset in config.datasets:
        groups = list(metric_groups(config, dataset))
        known = [mean for group in groups if (mean := parts[group]) is not None]
        if groups and len(known) == len(groups):
            means["score", ", ".join(groups)] = sum(known)
    return means


def _jobs(config: Config, shards: Mapping[str, Mapping[str, int]]) -> Iterator[Job]:
    """Yield the jobs that left a timing, where the number of their images is known."""
    wanted = Wanted(config)
    base = Path(config.results) / "benchmarks"
    for name, counts in shards.items():
        if not counts:
            continue
        total = sum(counts.values())
        yield from _timed("ingest", "", {base / name / "ingest.tsv": total})
        yield from _timed("niqe", "", {base / name / "niqe.tsv": total})
        yield from _timed("degrade", "", {base / name / f"degrade-{at}.tsv": count for at, count in counts.items()})
        folder = base / name / "prompt"
        stage = prompt_stage(config.datasets[name])
        yield from _timed(stage, "", {folder / f"shard-{at}.tsv": count for at, count in counts.items()})
        for policy in (*config.policies, *config.runs):
            root = config.root_policy(policy)
            fixed = config.datasets[name].prompt.source in ONE_PROMPT
            paths = {base / name / policy / "embed" / f"shard-{at}.tsv": 1 if fixed else n for at, n in counts.items()}
            yield from _timed("embed", f"{root}, one prompt" if fixed else root, paths)
            blocks = {block: wanted.candidates(name, policy, {block}) for block in wanted.all_blocks(name)}
            cells = {
                f"shard-{at}.block-{block:03d}.tsv": count * each
                for at, count in counts.items()
                for block, each in blocks.items()
            }
            yield from _timed("rollout", root, _under(base / name / policy / "rollout", cells))
            yield from _timed("derive", policy, _under(base / name / policy / "derive", cells))
            for group in config.iqa.groups:
                yield from _timed("score", group, _under(base / name / policy / "score" / group, cells))
    yield from _run_jobs(config, shards, base / "runs")


def _run_jobs(config: Config, shards: Mapping[str, Mapping[str, int]], base: Path) -> Iterator[Job]:
    for name, run in config.runs.items():
        root, selected = config.root_policy(run.reference), 2 * run.pairs.top
        counts = {f"shard-{at}.tsv": count * selected for at, count in shards[run.dataset].items()}
        yield from _timed("encode", root, _under(base / name / "encode", counts))
        log = Path(config.results) / "runs" / name / "train_log.parquet"
        if log.is_file():
            steps = tables.load(log).num_rows
            yield from _timed("train", root, {base / name / "train.tsv": steps * images_a_step(run)})


def _under(folder: Path, counts: Mapping[str, int]) -> dict[Path, int]:
    return {folder / name: count for name, count in counts.items()}


def _timed(stage: str, kind: str, counts: Mapping[Path, int]) -> Iterator[Job]:
    """Yield the jobs whose benchmark file is there: Snakemake's, wall-clock seconds in its first column."""
    for path, count in counts.items():
        if path.is_file():
            yield stage, kind, float(path.read_text().splitlines()[1].split("\t")[0]), count


def _sizes(config: Config, shards: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, str], float]:
    """Return the mean bytes of an image on disk by (stage, data set), of the shards that are there."""
    wanted, found = Wanted(config), {}
    for name, counts in shards.items():
        folder = Path(config.results) / name
        lr = {folder / "lr" / f"shard-{at}.tar": count for at, count in counts.items()}
        candidates = {
            folder / policy / "candidates" / f"shard-{at}.block-{block:03d}.tar": count
            * wanted.candidates(name, policy, {block})
            for policy in (*config.policies, *config.runs)
            if not wanted.is_single(policy)
            for at, count in counts.items()
            for block in wanted.all_blocks(name)
        }
        for stage, files in (("degrade", lr), ("rollout", candidates)):
            there = {path: count for path, count in files.items() if path.is_file()}
            if there:
                found[stage, name] = sum(path.stat().st_size for path in there) / sum(there.values())
    return found
