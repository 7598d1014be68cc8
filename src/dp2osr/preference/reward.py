"""Rewards: raw scores, aligned and normalised within the group, combined into one number a candidate.

    norm(metric, m) = (s(m) - min) / (max - min), after turning the metric so that higher is better
    R(m) = w · mean of norm over the FR set + (1 - w) · mean of norm over the NR set

min and max are over the group's finite scores of candidates 0..M-1. A metric that is constant in a group gives 0.5 to
all its candidates: it favours nobody. A candidate without a finite score in a metric of the definition has reward NaN
and rank -1, and does not move the others' min and max. A candidate without any row is a row "missing candidate".

Everything runs on arrays of shape (metric, group, candidate), so that two million candidates take seconds.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from dp2osr import tables
from dp2osr.config import RewardSettings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MISSING = "missing candidate"
NAMED = 5  # groups named in a warning


@dataclass(frozen=True)
class Cube:
    """Raw scores of K metrics, G groups, M candidates.

    groups: (G,) sorted ids. metrics: K names in the order of METRICS. raw: (K, G, M), NaN where there is no score.
    present: (G, M), whether the candidate has any row at all.
    """

    groups: npt.NDArray[np.object_]
    metrics: list[str]
    raw: Floats
    present: npt.NDArray[np.bool_]


def codes(column: pa.ChunkedArray | pa.Array, known: dict[str, int]) -> Ints:
    """Return the number of each text in `known`, into which new texts are entered in order of appearance."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise UserError(f"{array.null_count} rows have no group or metric, wanted none")
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    numbers = np.array([known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return numbers[encoded.indices.to_numpy()] if len(numbers) else np.zeros(0, dtype=np.int64)


def group_codes(groups: pd.Series) -> tuple[npt.NDArray[np.object_], Ints]:
    """Return the sorted distinct ids (G,) and the position of each row's id among them."""
    known: dict[str, int] = {}
    found = codes(pa.array(groups, type=pa.string()), known)
    names, position = _sorted(known)
    return names, position[found]


def _sorted(known: Mapping[str, int]) -> tuple[npt.NDArray[np.object_], Ints]:
    """Return the names in sorted order, and the new position of each old number."""
    names = np.array(sorted(known), dtype=object)
    position = np.empty(len(names), dtype=np.int64)
    position[[known[name] for name in names]] = np.arange(len(names))
    return names, position


def text_column(labels: Sequence[str] | npt.NDArray[np.object_], numbers: npt.NDArray[np.integer]) -> pd.Series:
    """Return labels[numbers] as a column of text, without a Python object a row."""
    encoded = pa.DictionaryArray.from_arrays(pa.array(numbers, type=pa.int32()), pa.array(labels, type=pa.string()))
    return encoded.cast(pa.string()).to_pandas()


def make_cube(scores: Iterable[pa.Table], *, num_rollouts: int) -> Cube:
    """Gather long score tables (columns of tables.SCORES), in any order, into a cube.

    Rows of rollouts from `num_rollouts` on are not used. Raises UserError for an unknown metric or a row given twice.
    """
    groups: dict[str, int] = {}
    parts: list[tuple[npt.NDArray[np.int16], npt.NDArray[np.int32], Floats]] = []
    for table in scores:
        names = {name: number for number, name in enumerate(METRICS)}
        metric = codes(table["metric"], names)
        if len(names) > len(METRICS):
            raise UserError(f"scores: unknown metric '{list(names)[-1]}', wanted one of {', '.join(METRICS)}")
        rollout = table["rollout"].to_numpy()
        if len(rollout) and rollout.min() < 0:
            raise UserError(f"scores: rollout {rollout.min()}, wanted 0 or more")
        place = codes(table["group_id"], groups) * num_rollouts + rollout
        keep = rollout < num_rollouts
        score = table["score"].to_numpy()
        parts.append((metric[keep].astype(np.int16), place[keep].astype(np.int32), score[keep]))
    if not sum(len(part[0]) for part in parts):
        raise UserError("scores: no rows, nothing to reward")
    return _fill_cube(groups, parts, num_rollouts=num_rollouts)


def _fill_cube(
    groups: dict[str, int],
    parts: list[tuple[npt.NDArray[np.int16], npt.NDArray[np.int32], Floats]],
    *,
    num_rollouts: int,
) -> Cube:
    names, position = _sorted(groups)
    used = np.zeros(len(METRICS), dtype=bool)
    for metric, _, _ in parts:
        used[metric] = True
    row = np.cumsum(used) - 1
    raw = np.full((int(used.sum()), len(names) * num_rollouts), np.nan)
    seen = np.zeros(raw.shape, dtype=bool)
    num_rows = 0
    while parts:
        metric, place, score = parts.pop()
        group, rollout = np.divmod(place, num_rollouts)
        index = (row[metric], position[group] * num_rollouts + rollout)
        raw[index] = score
        seen[index] = True
        num_rows += len(score)
    if num_rows != (num_seen := int(np.count_nonzero(seen))):
        raise UserError(f"scores: {num_rows - num_seen} of {num_rows} rows repeat a group, rollout and metric")
    shape = (len(names), num_rollouts)
    metrics = [name for name, is_used in zip(METRICS, used, strict=True) if is_used]
    return Cube(names, metrics, raw.reshape(-1, *shape), seen.any(axis=0).reshape(shape))


def normalise(raw: Floats, low: Floats, high: Floats, *, lower_better: bool) -> Floats:
    """Put raw scores on a scale: 0 at its worse end, 1 at its better end, unclipped; 0.5 where the scale has no width.

    The three broadcast together. NaN where the score or the scale is not finite.
    """
    width = np.asarray(high - low)
    flat = width == 0
    norm = (high - raw) if lower_better else (raw - low)
    norm /= np.where(flat, 1.0, width)
    norm[np.broadcast_to(flat, norm.shape) & np.isfinite(raw)] = 0.5
    norm[~np.isfinite(norm)] = np.nan
    return norm


def combine(norm: Mapping[str, Floats], settings: RewardSettings) -> tuple[Floats, Floats, Floats]:
    """Return (fr, nr, reward) of normalised scores by metric name, all of one shape.

    The mean of an empty set is NaN, and the other set then carries all the weight.
    """
    if lacking := [name for name in (*settings.fr, *settings.nr) if name not in norm]:
        raise UserError(f"reward: metric '{lacking[0]}' has no scores, found {', '.join(norm)}")
    fr, nr = _mean(norm, settings.fr), _mean(norm, settings.nr)
    if fr is None and nr is None:
        raise UserError("reward: fr and nr are both empty, wanted a metric in at least one")
    if fr is None or nr is None:
        only = fr if nr is None else nr
        assert only is not None
        nothing = np.full(only.shape, np.nan)
        return (only, nothing, only.copy()) if nr is None else (nothing, only, only.copy())
    return fr, nr, settings.weight_fr * fr + (1 - settings.weight_fr) * nr


def _mean(norm: Mapping[str, Floats], names: Sequence[str]) -> Floats | None:
    if not names:
        return None
    total = norm[names[0]].copy()
    for name in names[1:]:
        total += norm[name]
    return total / len(names)


def ranks(reward: Floats) -> npt.NDArray[np.int32]:
    """Rank each row of (G, M) rewards: 0 is the best, ties go to the smaller candidate, -1 where NaN."""
    order = np.argsort(-reward, axis=1, kind="stable")
    rank = np.empty(reward.shape, dtype=np.int32)
    np.put_along_axis(rank, order, np.arange(reward.shape[1], dtype=np.int32)[None], axis=1)
    rank[np.isnan(reward)] = -1
    return rank


def rewards(scores: pd.DataFrame, settings: RewardSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reward every candidate of a long table (tables.SCORES); see `rewards_of`."""
    table = pa.Table.from_pandas(scores[tables.SCORES.names], schema=tables.SCORES, preserve_index=False)
    return rewards_of(make_cube([table], num_rollouts=settings.num_rollouts), settings)


def rewards_of(cube: Cube, settings: RewardSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the wide rewards table and the scale table of a cube, both sorted by key.

    rewards: tables.rewards_schema(cube.metrics), G·M rows. Every metric is there raw and normalised; only those of the
    definition enter fr, nr and reward. Its status names every metric without a number, so a candidate whose reward
    stands may still carry the name of a metric outside the definition. scales: tables.SCALES, G·K rows.
    """
    num_groups, num_rollouts = cube.present.shape
    finite = np.where(np.isfinite(cube.raw), cube.raw, np.nan)
    low, high = np.fmin.reduce(finite, axis=2), np.fmax.reduce(finite, axis=2)  # (K, G), NaN where none is finite
    norm = {
        name: normalise(finite[k], low[k, :, None], high[k, :, None], lower_better=METRICS[name].lower_better)
        for k, name in enumerate(cube.metrics)
    }
    status = _status(cube, finite)
    del finite
    fr, nr, reward = combine(norm, settings)
    _report(cube, reward)
    columns: dict[str, object] = {
        "group_id": text_column(cube.groups, np.repeat(np.arange(num_groups), num_rollouts)),
        "rollout": np.tile(np.arange(num_rollouts, dtype=np.int32), num_groups),
    }
    columns |= {name: cube.raw[k].reshape(-1) for k, name in enumerate(cube.metrics)}
    columns |= {name + tables.NORM: norm[name].reshape(-1) for name in cube.metrics}
    columns |= {"fr": fr.reshape(-1), "nr": nr.reshape(-1), "reward": reward.reshape(-1)}
    columns |= {"rank": ranks(reward).reshape(-1), "status": status}
    return pd.DataFrame(columns, copy=False), _scales(cube, low, high)


def _scales(cube: Cube, low: Floats, high: Floats) -> pd.DataFrame:
    """Return tables.SCALES from (K, G) ends, sorted by group and metric name."""
    by_name = np.argsort(np.array(cube.metrics))
    num_groups, num_metrics = len(cube.groups), len(cube.metrics)
    return pd.DataFrame(
        {
            "group_id": text_column(cube.groups, np.repeat(np.arange(num_groups), num_metrics)),
            "metric": text_column(cube.metrics, np.tile(by_name, num_groups)),
            "min": low[by_name].T.reshape(-1),
            "max": high[by_name].T.reshape(-1),
        }
    )


def _status(cube: Cube, finite: Floats) -> pd.Series:
    """Return "ok", "missing candidate", or "no number: <metrics>" for each of the G·M candidates."""
    lacks = np.zeros(cube.present.shape, dtype=np.int64)
    for k in range(len(cube.metrics)):
        lacks |= np.isnan(finite[k]).astype(np.int64) << k
    lacks[~cube.present] = -1
    kinds, numbers = np.unique(lacks, return_inverse=True)
    labels = [_label(int(kind), cube.metrics) for kind in kinds]
    return text_column(labels, numbers.reshape(-1))


def _label(lacks: int, metrics: Sequence[str]) -> str:
    if lacks < 0:
        return MISSING
    named = ", ".join(name for k, name in enumerate(metrics) if lacks >> k & 1)
    return f"no number: {named}" if named else "ok"


def _report(cube: Cube, reward: Floats) -> None:
    """Log what has no reward and why; raise UserError where nothing has one."""
    absent, unscored = ~cube.present, cube.present & np.isnan(reward)
    for what, mask in ((MISSING, absent), ("no finite score", unscored)):
        if count := int(mask.sum()):
            groups = cube.groups[mask.any(axis=1)]
            logger.warning(
                "%s: %d of %d candidates, in %d of %d groups: %s%s",
                what,
                count,
                mask.size,
                len(groups),
                len(mask),
                ", ".join(groups[:NAMED]),
                " …" if len(groups) > NAMED else "",
            )
    if np.isnan(reward).all():
        raise UserError("reward: no candidate has a finite score in every metric of the definition")


def widen(scores: pd.DataFrame) -> pd.DataFrame:
    """Turn long scores (tables.SCORES) into a wide raw frame: group_id, rollout and one column a metric, sorted by key.

    Only candidates that have a row are in it; a score they lack is NaN.
    """
    table = pa.Table.from_pandas(scores[tables.SCORES.names], schema=tables.SCORES, preserve_index=False)
    cube = make_cube([table], num_rollouts=int(scores["rollout"].max()) + 1 if len(scores) else 1)
    group, rollout = np.nonzero(cube.present)
    frame = {"group_id": text_column(cube.groups, group), "rollout": rollout.astype(np.int32)}
    return pd.DataFrame(frame | {name: cube.raw[k][cube.present] for k, name in enumerate(cube.metrics)})


def apply_scale(raw: pd.DataFrame, scales: pd.DataFrame, settings: RewardSettings) -> pd.DataFrame:
    """Reward candidates of any policy on the reference's per-image scale.

    raw: group_id, rollout and one raw column a metric, such as a rewards table or the result of `widen`.
    scales: tables.SCALES of the reference. Returns one row for each of `raw`, in its order: group_id, rollout, each
    metric that the scales know raw and as `<metric>__norm`, fr, nr, reward. Nothing is clipped: a candidate that is
    better than the reference's best lies above 1. 0.5 where the reference's scores were constant. NaN where the score
    or the scale is not finite.
    """
    metrics = [name for name in METRICS if name in raw.columns and (scales["metric"] == name).any()]
    norm = {}
    for name in metrics:
        scale = scales[scales["metric"] == name]
        index = pd.Index(scale["group_id"])
        if not index.is_unique:
            raise UserError(f"scales: metric '{name}' has a group twice, wanted one row a group and metric")
        place = index.get_indexer(pd.Index(raw["group_id"]))
        if (place < 0).any():
            group = raw["group_id"].iloc[int(np.argmax(place < 0))]
            raise UserError(f"scales: no row for group '{group}', metric '{name}'")
        low, high = scale["min"].to_numpy()[place], scale["max"].to_numpy()[place]
        score = raw[name].to_numpy(dtype=np.float64)
        norm[name] = normalise(score, low, high, lower_better=METRICS[name].lower_better)
    fr, nr, reward = combine(norm, settings)
    frame = raw[["group_id", "rollout", *metrics]].reset_index(drop=True)
    return frame.assign(**{name + tables.NORM: norm[name] for name in metrics}, fr=fr, nr=nr, reward=reward)
