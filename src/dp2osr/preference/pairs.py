"""Preference pairs: the best candidates of a group against its worst, and their HPO weights.

    w_intra = |R_w - R_l| + (1 - μ_gap)     μ_gap: mean |gap| over the group's pairs
    w_inter = σ_g + (1 - μ_σ)               σ_g: std of the group's rewards, μ_σ: its mean over the groups

"The group's pairs" are those that are kept, after the minimum gap and the subset: w_intra then has mean 1 in each
group whatever was left out. The groups of μ_σ are those that have a pair. σ_g is the population standard deviation of
all the group's finite rewards, not of the selected ones.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from dp2osr import seeds, tables
from dp2osr.config import PairSettings
from dp2osr.errors import UserError
from dp2osr.preference.reward import Floats, Ints, group_codes, text_column

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
NAMED = 10  # groups named in a warning


def select_pairs(rewards: pd.DataFrame, settings: PairSettings, *, seed: int) -> pd.DataFrame:
    """Pair the N best candidates of each group with its N worst: all N² pairs, or a seeded subset.

    rewards: group_id, rollout, reward (NaN: the candidate has none), in any row order. Ties in reward are broken by
    the smaller rollout. `selection: random` draws the 2N candidates instead, and its gaps may be negative. Pairs with
    |gap| under `min_gap` are left out. A group with fewer than 2N finite rewards is left out and logged.
    Returns rows of tables.PAIRS sorted by key. Raises UserError where no pair is left.
    """
    names, reward = reward_matrix(rewards)
    num_finite = np.isfinite(reward).sum(axis=1)
    enough = num_finite >= 2 * settings.top
    _warn(names[~enough], f"fewer than {2 * settings.top} finite rewards (2N): group left out")
    if not enough.any():
        raise UserError(
            f"pairs.top: found {settings.top}, but no group has {2 * settings.top} finite rewards "
            f"(the largest has {int(num_finite.max(initial=0))})"
        )
    names, reward = names[enough], reward[enough]
    winners, losers = _selected(names, reward, settings, seed=seed)
    reward_w, reward_l = (np.take_along_axis(reward, chosen, axis=1) for chosen in (winners, losers))
    gap = (reward_w[:, :, None] - reward_l[:, None, :]).reshape(len(names), -1)  # (G, N²)
    kept = _kept(names, gap, settings, seed=seed)
    if not kept.any():
        raise UserError(f"pairs.min_gap: found {settings.min_gap}, but the largest gap is {np.abs(gap).max():.4g}")
    _warn(names[~kept.any(axis=1)], f"no pair with a gap of {settings.min_gap}: group left out")
    w_intra = intra_weights(gap, kept)
    w_inter = inter_weights(np.nanstd(reward, axis=1), np.asarray(kept.any(axis=1)))
    group, winner, loser = np.nonzero(kept.reshape(len(names), settings.top, settings.top))
    frame = {
        "group_id": text_column(names, group),
        "chosen": winners[group, winner].astype(np.int32),
        "rejected": losers[group, loser].astype(np.int32),
        "reward_chosen": reward_w[group, winner],
        "reward_rejected": reward_l[group, loser],
        "gap": gap[kept],
        "w_intra": w_intra[kept],
        "w_inter": w_inter[group],
    }
    pairs = pd.DataFrame(frame, copy=False)
    return pairs.assign(weight=_weight(pairs, settings))[tables.PAIRS.names]


def reward_matrix(rewards: pd.DataFrame) -> tuple[npt.NDArray[np.object_], Floats]:
    """Return the sorted group ids (G,) and their rewards (G, M), NaN where a candidate is absent or has none."""
    names, group = group_codes(rewards["group_id"])
    rollout = rewards["rollout"].to_numpy()
    matrix = np.full((len(names), int(rollout.max(initial=0)) + 1), np.nan)
    matrix[group, rollout] = rewards["reward"].to_numpy(dtype=np.float64)
    matrix[~np.isfinite(matrix)] = np.nan
    return names, matrix


def intra_weights(gap: Floats, kept: Mask) -> Floats:
    """w_intra of each pair, (G, P): mean 1 over the kept pairs of each group that has any."""
    size = np.abs(gap)
    mean = np.where(kept, size, 0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return size + (1 - mean[:, None])


def inter_weights(spread: Floats, used: Mask) -> Floats:
    """w_inter of each group, (G,), from the std of its rewards: mean 1 over the used groups."""
    return spread + (1 - spread[used].mean())


def _weight(pairs: pd.DataFrame, settings: PairSettings) -> pd.Series:
    one = pd.Series(1.0, index=pairs.index)
    return {
        "none": one,
        "intra": pairs["w_intra"],
        "inter": pairs["w_inter"],
        "both": pairs["w_intra"] * pairs["w_inter"],
    }[settings.weights]


def _selected(
    names: npt.NDArray[np.object_], reward: Floats, settings: PairSettings, *, seed: int
) -> tuple[Ints, Ints]:
    """Return winners and losers, each (G, N) rollouts in rising order; each group has 2N finite rewards or more."""
    key = -reward if settings.selection == "reward" else _draws(names, reward.shape[1], seed=seed, purpose="random")
    order = np.argsort(np.where(np.isnan(reward), np.inf, key), axis=1, kind="stable")
    num_finite = np.isfinite(reward).sum(axis=1)
    first = np.arange(settings.top)[None]
    last = num_finite[:, None] - 1 - first if settings.selection == "reward" else settings.top + first
    losers = np.take_along_axis(order, np.broadcast_to(last, (len(order), settings.top)), axis=1)
    return np.sort(order[:, : settings.top], axis=1), np.sort(losers, axis=1)


def _kept(names: npt.NDArray[np.object_], gap: Floats, settings: PairSettings, *, seed: int) -> Mask:
    """Return which of the (G, N²) pairs stay: those with the minimum gap, and of them at most the seeded subset."""
    kept = np.abs(gap) >= settings.min_gap
    if 0 < settings.max_pairs_per_group < gap.shape[1]:
        key = np.where(kept, _draws(names, gap.shape[1], seed=seed, purpose="pairs"), np.inf)
        place = np.argsort(np.argsort(key, axis=1, kind="stable"), axis=1, kind="stable")
        kept &= place < settings.max_pairs_per_group
    return kept


def _draws(names: npt.NDArray[np.object_], count: int, *, seed: int, purpose: str) -> Floats:
    """Return (G, count) uniform numbers; a group's depend on the seed and its own id alone."""
    return np.stack([np.random.default_rng(seeds.derive(seed, purpose, name)).random(count) for name in names])


def _warn(groups: Sequence[str] | npt.NDArray[np.object_], what: str) -> None:
    if len(groups):
        more = " …" if len(groups) > NAMED else ""
        logger.warning("%s (%d): %s%s", what, len(groups), ", ".join(groups[:NAMED]), more)
