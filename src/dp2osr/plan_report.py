"""`dp2osr plan`: the plan of a configuration as text for a terminal, or as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dp2osr import plan_facts, show
from dp2osr.config import Config
from dp2osr.errors import UserError
from dp2osr.models import footprint, judging, memory
from dp2osr.models.footprint import Footprint
from dp2osr.models.memory import Need
from dp2osr.plan import CHECKPOINTS, GPU_STAGES, PNG_BYTES, Planner, Row, Wanted, check_names

CARD_GIB = 79.0  # what an 80 GB card offers to a process, about
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """All that is printed. memory: (stage, subject) -> what its process holds on a GPU; missing: what is not known."""

    title: str
    rows: list[Row]
    models: dict[str, str]
    memory: dict[tuple[str, str], list[Need]]
    missing: list[str]


def make(
    config: Config, *, title: str, images: Mapping[str, int], seconds: Mapping[str, float], architecture: str
) -> Plan:
    """Plan a configuration; `architecture` stands for a model folder that is not here."""
    check_names(config, images=images, seconds=seconds)
    footprint.check_architecture(architecture)
    facts = plan_facts.gather(config, given_images=images, given_seconds=seconds)
    footprints, missing = load_footprints(config, architecture)
    rows = Planner(config, facts, footprints).rows()
    models = {name: describe(found, architecture) for name, found in footprints.items()}
    return Plan(title, rows, models, needs(config, footprints), missing + unknown(config, rows))


def load_footprints(config: Config, architecture: str) -> tuple[dict[str, Footprint], list[str]]:
    """Return the networks of each policy that is sampled, and a line for each whose model is not here."""
    found, missing = {}, []
    for name in sorted({root for _, root in Wanted.of(config).embedded}):
        try:
            found[name] = footprint.load(config.policies[name], architecture=architecture)
        except UserError as error:
            missing.append(f"policy {name}: {error}")
    return found, missing


def describe(found: Footprint, architecture: str) -> str:
    """Say where the sizes of a model are from, and what they are."""
    here = footprint.find(found.policy.model) is not None
    origin = found.policy.model if here else f"{architecture} as packaged, for {found.policy.model} is not here"
    sizes = ", ".join(f"{part} {count / 1e6:,.{1 if count >= 1e7 else 3}f} M" for part, count in found.sizes().items())
    return f"{origin}: {sizes}"


def needs(config: Config, footprints: Mapping[str, Footprint]) -> dict[tuple[str, str], list[Need]]:
    """Return GPU memory by (stage, what it is for), at the largest image size that a stage meets."""
    batch, wanted = config.rollout.batch_size, Wanted.of(config)
    table: dict[tuple[str, str], list[Need]] = {}
    if "tags" in {config.datasets[dataset].prompt.source for dataset, _ in wanted.embedded}:
        table["describe", "tags"] = judging.describe()
    for name, found in footprints.items():
        size = max(config.datasets[dataset].hr_size for dataset, root in wanted.embedded if root == name)
        table["embed", name] = memory.embed(found)
        table["rollout", name] = memory.rollout(found, images=batch, size=size)
        table["encode", name] = memory.encode(found, images=batch, size=size)
    scored = max((config.datasets[dataset].hr_size for dataset, _ in wanted.scored), default=0)
    for group, names in config.iqa.groups.items() if scored else ():
        table["score", group] = judging.score(names, batch=config.iqa.batch_size, size=scored)
    for name, run in config.runs.items():
        root = config.root_policy(run.reference)
        if root in footprints:
            table["train", name] = train_needs(config, name, footprints[root])
    return table


def train_needs(config: Config, name: str, found: Footprint) -> list[Need]:
    """Return what a run's training holds, with the metrics of its guard."""
    run, reward = config.runs[name], config.rewards[config.judge(name)]
    processes = config.limits.train_gpus * config.limits.train_nodes
    size = config.datasets[run.dataset].hr_size
    needs = memory.train(found, run.train, top=run.pairs.top, size=size, processes=processes)
    if not run.train.guard.every:
        return needs
    size = config.datasets[run.train.guard.dataset].hr_size
    return needs + judging.guard([*reward.fr, *reward.nr], batch=config.iqa.batch_size, size=size)


def unknown(config: Config, rows: Sequence[Row]) -> list[str]:
    """Return a line for each data set without images, GPU stage without seconds and network without a size."""
    lines = []
    for name in config.datasets:
        if any(row.images is None and row.subject == name and row.stage == "degrade" for row in rows):
            lines.append(f"images of data set {name} are unknown: give --images {name}=N")
    for stage in GPU_STAGES:
        if any(row.stage == stage and row.seconds is None for row in rows):
            lines.append(f"seconds of an image in {stage} are unknown: give --seconds {stage}=S")
    scored = {name for names in config.iqa.groups.values() for name in names}
    networks = [f"metric {name}" for name in judging.uncounted(sorted(scored))]
    if "caption" in {settings.prompt.source for settings in config.datasets.values()}:
        networks.append("the captioner of prompts")
    return [*lines, *(f"GPU memory of {network} is not counted" for network in networks)]


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """Return jobs, GPU-hours and bytes on disk of all rows where they are known."""
    hours = [row.hours for row in rows if row.stage in GPU_STAGES and row.hours is not None]
    sizes = [row.num_bytes for row in rows if row.num_bytes is not None]
    return {"jobs": sum(row.jobs for row in rows), "gpu_hours": sum(hours), "bytes": sum(sizes)}


def size_text(num_bytes: float | None) -> str:
    """Return bytes in the decimal unit that suits them."""
    if num_bytes is None:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def gib(num_bytes: float) -> str:
    """Return GiB with a digit after the point, or three under one GiB."""
    return f"{num_bytes / GIB:.{1 if num_bytes >= GIB else 3}f}"


def row_text(row: Row) -> list[str]:
    """Return the cells of a row."""
    count = "-" if row.images is None else f"{'≤' if row.images.at_most else ''}{row.images.count:,}"
    seconds = "-" if row.seconds is None else f"{row.seconds:.3g}"
    hours = "-" if row.hours is None else f"{row.hours:,.3g}" if row.hours < 100 else f"{row.hours:,.0f}"
    minutes = "-" if row.hours is None else f"{row.hours * 60 / row.jobs:.3g}"
    where = "GPU" if row.stage in GPU_STAGES else "CPU"
    return [row.stage, row.subject, where, f"{row.jobs:,}", count, seconds, row.origin, hours, minutes,
            size_text(row.num_bytes)]  # fmt: skip


HEADS = ["stage", "for", "on", "jobs", "images", "s/image", "", "hours", "min/job", "disk"]


def text(plan: Plan) -> str:
    """Return the whole plan for people."""
    sums = totals(plan.rows)
    known = "" if not plan.missing else ", as far as known"
    total = (
        f"total{known}: {sums['jobs']:,} jobs, {sums['gpu_hours']:,.1f} GPU-hours, {size_text(sums['bytes'])} on disk"
    )
    blocks = [plan.title, show.grid([HEADS, *map(row_text, plan.rows)], left=3), total]
    blocks.append("\n".join(["models", *(f"  {name}: {said}" for name, said in plan.models.items())]))
    if plan.memory:
        blocks.append(memory_text(plan.memory))
    if plan.missing:
        blocks.append("\n".join(["not known", *(f"  {line}" for line in plan.missing)]))
    blocks.append("\n".join(["assumptions", *(f"  {line}" for line in ASSUMPTIONS)]))
    return "\n\n".join(blocks) + "\n"


def memory_text(table: Mapping[tuple[str, str], Sequence[Need]]) -> str:
    """Return GPU memory by stage; of what is marked `or` only the largest counts."""
    rows = [["GPU memory", "", "GiB"]]
    for (stage, subject), found in table.items():
        whole = memory.total(found) / GIB
        fits = "fits" if whole <= CARD_GIB else "does not fit"
        rows.append([f"{stage}, {subject}", f"at most ({fits} an 80 GB card)", gib(whole * GIB)])
        ordered = sorted(found, key=lambda need: not need.lasting)
        rows += [["", f"{'' if need.lasting else 'or '}{need.what}", gib(need.bytes)] for need in ordered]
    return show.grid(rows, left=2)


ASSUMPTIONS = (
    "hours: images x seconds of one GPU; measured seconds hold for the machine, settings and model that left them",
    "paper, A800: seconds of the paper for 512 px, scaled to the steps of sampling; its nine metrics for scoring",
    f"disk: {PNG_BYTES} bytes a pixel of lossless images unless the data set's shards show it; latents in float32",
    f"disk of train: the policy and {CHECKPOINTS} checkpoints with optimizer and average; small tables are left out",
    "GPU memory: counted on shapes alone; without CUDA's own (about 1 GiB) and the allocator's waste (5 to 15 %)",
)


def as_json(plan: Plan) -> str:
    """Return the plan for programs: one object with rows, totals, memory and what is not known."""
    rows: list[dict[str, Any]] = [asdict(row) | {"hours": row.hours} for row in plan.rows]
    needed = [
        {"stage": stage, "subject": subject, "bytes": memory.total(found), "parts": [asdict(need) for need in found]}
        for (stage, subject), found in plan.memory.items()
    ]
    whole = {"title": plan.title, "rows": rows, "totals": totals(plan.rows), "models": plan.models, "memory": needed}
    return json.dumps(whole | {"missing": plan.missing, "assumptions": ASSUMPTIONS}, indent=1) + "\n"


def title(config_path: Path, overlays: Sequence[Path], results: str) -> str:
    """Return the first line: which files, and where the results go."""
    return f"plan of {' + '.join(map(str, (config_path, *overlays)))}; results in {results}"
