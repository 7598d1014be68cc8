"""The group explorer: every candidate of every image with its scores, as a static page that needs no server.

A shard of images is a folder of data files, so that a page opened from a disk loads what it shows and no more:

    data/shard-0000/rows.json      a row a group: what the list shows, sorts and filters by
    data/shard-0000/small.js       one sprite sheet with a small picture of every group
    data/shard-0000/page-000.js    the candidates of some groups: scores, and a sprite sheet a group
    index.js                       all rows, and the winners and losers of the runs that choose from these candidates

The .js files hold one call with JSON: under file:// a page may run a script beside it, but not read a file.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import rankdata

from dp2osr import tables
from dp2osr.config import ExplorerSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS, arrow
from dp2osr.report import thumbs
from dp2osr.report.page import Files, render
from dp2osr.strict import Name, Strict

SMALL = 48  # pixels of a picture in the list
NUMBERS = ("spread", "gap", "fr_over_nr", "nr_over_fr", "rho", "missing")
Json = dict[str, Any]


class ExplorerJob(Strict):
    """What the page shows: candidates of `policy` on `dataset`, by the reward of the name `reward`."""

    dataset: Name
    policy: Name
    reward: Name
    definition: RewardSettings
    shards: list[str]
    runs: list[Name]


@dataclass(frozen=True)
class Group:
    """One LR image: rows of its rewards table by rollout, its source, and small pictures of it and its candidates."""

    group_id: str
    source: str
    rewards: pd.DataFrame
    lr: Image.Image
    hr: Image.Image | None
    candidates: Mapping[int, Image.Image]  # rollout -> picture; a pruned candidate has none


def numbers(rewards: pd.DataFrame) -> dict[str, float | None]:
    """Return what a group is sorted and filtered by; None where it cannot be said.

    rewards: columns fr, nr, reward of one group. spread and gap: population std, and best minus worst reward.
    fr_over_nr: the most that the full-reference part of a candidate lies over its no-reference part; nr_over_fr the
    other way round. rho: Spearman's correlation of the two parts. missing: candidates without a reward.
    """
    reward = rewards["reward"].to_numpy(dtype=float)
    fr, nr = rewards["fr"].to_numpy(dtype=float), rewards["nr"].to_numpy(dtype=float)
    finite, both = reward[np.isfinite(reward)], np.isfinite(fr) & np.isfinite(nr)
    difference = (fr - nr)[both]
    found = {
        "spread": finite.std() if len(finite) else math.nan,
        "gap": np.ptp(finite) if len(finite) else math.nan,
        "fr_over_nr": difference.max(initial=-math.inf),
        "nr_over_fr": -difference.min(initial=math.inf),
        "rho": spearman(fr[both], nr[both]),
        "missing": float(len(reward) - len(finite)),
    }
    return {name: _plain(value, 4) for name, value in found.items()}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of two arrays, ties at their mean rank; NaN where one has no order."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _plain(value: float, digits: int) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None


def _column(values: pd.Series, digits: int) -> list[float | None]:
    return [_plain(value, digits) for value in values.to_numpy(dtype=float)]


def candidates_json(group: Group, settings: ExplorerSettings) -> Json:
    """Return one group as its page holds it: columns over candidates, and the sprite sheet (LR, HR, candidates)."""
    rows = group.rewards.sort_values("rollout")
    rollouts = [int(rollout) for rollout in rows["rollout"]]
    metrics = metric_names(rows)
    pictures = [group.lr, group.hr, *(group.candidates.get(rollout) for rollout in rollouts)]
    return {
        "id": group.group_id,
        "rollout": rollouts,
        "rank": [int(rank) for rank in rows["rank"]],
        **{name: _column(rows[name], 4) for name in ("reward", "fr", "nr")},
        "raw": [_column(rows[name], 5) for name in metrics],
        "norm": [_column(rows[name + tables.NORM], 4) for name in metrics],
        "status": {rollout: text for rollout, text in zip(rollouts, rows["status"], strict=True) if text != "ok"},
        "sprite": thumbs.sprite(pictures, quality=settings.quality).as_json(),
    }


def metric_names(rewards: pd.DataFrame) -> list[str]:
    """Return the metrics of a rewards table in the order of METRICS."""
    return [name for name in METRICS if name in rewards.columns]


def script(name: str, data: Json) -> bytes:
    """Return a data file: one call that hands `data` to the page under `name`."""
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f"dp2osr({json.dumps(name)},{payload});\n".encode()


def shard_files(groups: Iterable[Group], shard: str, settings: ExplorerSettings) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each data file of a shard, the rows last."""
    rows: list[Json] = []
    small: list[Image.Image | None] = []
    metrics: list[str] = []
    left = iter(groups)
    for number in count():
        batch = list(islice(left, settings.groups_per_page))
        if not batch:
            break
        name = f"page-{number:03d}"
        yield (
            f"{name}.js",
            script(f"shard-{shard}/{name}", {"groups": [candidates_json(each, settings) for each in batch]}),
        )
        for at, group in enumerate(batch):
            place = {"page": number, "at": at}
            rows.append({"id": group.group_id, "source": group.source, **place, **numbers(group.rewards)})
            small.append(_icon(group.hr or group.lr))
        metrics = metrics or metric_names(batch[0].rewards)
    yield "small.js", script(f"shard-{shard}/small", thumbs.sprite(small, quality=settings.quality).as_json())
    yield "rows.json", json.dumps({"metrics": metrics, "rows": rows}, allow_nan=False).encode()


def _icon(image: Image.Image) -> Image.Image:
    icon = image.copy()
    icon.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    return icon.resize((SMALL, SMALL))


def read_groups(
    rewards: Path, images: Path, lr: Path, candidates: Sequence[Path], settings: ExplorerSettings
) -> Iterator[Group]:
    """Yield the groups of a shard in its order; only small pictures of it are held in memory."""
    from dp2osr.shards import read_shard

    samples = dict(read_shard(lr))
    table = tables.read_rewards(rewards, groups=list(samples))
    source = tables.read(images, tables.IMAGES).set_index("image_id")["source"]
    pictures = dict(thumbs.candidates(candidates, settings.thumbnail))
    by_group = dict(list(table.groupby("group_id", sort=False)))
    for key, fields in samples.items():
        if key not in by_group:
            continue  # no candidate of it was ever scored; the reward stage has said so
        hr = fields.get("hr.png")
        rows = by_group[key]
        found = {rollout: pictures.get(f"{key}-r{rollout:04d}") for rollout in rows["rollout"]}
        yield Group(
            group_id=key,
            source=str(source.get(key, "")),
            rewards=rows,
            lr=thumbs.shrink(fields["lr.png"], settings.thumbnail, name=f"LR shard {lr}: {key}"),
            hr=thumbs.shrink(hr, settings.thumbnail, name=f"LR shard {lr}: {key}") if hr else None,
            candidates={rollout: picture for rollout, picture in found.items() if picture is not None},
        )


def read_rows(data: Path, shards: Sequence[str]) -> tuple[list[str], list[Json]]:
    """Return the metrics, and the rows of all groups with their shard's number, in the order of the shards."""
    metrics: list[str] = []
    rows: list[Json] = []
    for shard in shards:
        path = data / f"shard-{shard}" / "rows.json"
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise UserError(
                f"explorer data {path}: not there or no JSON ({error}); delete its folder, run again"
            ) from None
        metrics = metrics or found["metrics"]
        rows += [row | {"shard": shard} for row in found["rows"]]
    return metrics, rows


def marks(pairs: pd.DataFrame, groups: Sequence[str]) -> dict[str, list[list[int]]]:
    """Return the distinct winners and losers of each group, as lists in the order of `groups`."""
    found = {}
    for side in ("chosen", "rejected"):
        distinct = pairs[["group_id", side]].drop_duplicates().sort_values(["group_id", side])
        by_group = distinct.groupby("group_id")[side].agg(list)
        found[side] = [[int(rollout) for rollout in by_group.get(group, [])] for group in groups]
    return found


def index(job: ExplorerJob, data: Path, pairs: Mapping[str, pd.DataFrame]) -> Json:
    """Return what the list shows: columns over groups, and the marks of each run. data: folder of the shards."""
    metrics, rows = read_rows(data, job.shards)
    in_reward = {*job.definition.fr, *job.definition.nr}
    shown = [
        {"name": name, "arrow": arrow(name), "kind": METRICS[name].kind, "in_reward": name in in_reward}
        for name in metrics
    ]
    columns = {name: [row[name] for row in rows] for name in ("id", "source", "shard", "page", "at", *NUMBERS)}
    groups = [str(group) for group in columns["id"]]
    return {"metrics": shown, "groups": columns, "runs": {run: marks(frame, groups) for run, frame in pairs.items()}}


def page_files(job: ExplorerJob, data: Path, pairs: Mapping[str, pd.DataFrame]) -> Files:
    """Return index.js, explorer.js and index.html, the page last."""
    templates = Path(__file__).parent / "templates"
    context = {"title": f"Candidates of {job.policy} on {job.dataset}", "job": job}
    return {
        "index.js": script("index", index(job, data, pairs)),
        "explorer.js": (templates / "explorer.js").read_bytes(),
        "index.html": render("explorer.html.j2", context).encode(),
    }
