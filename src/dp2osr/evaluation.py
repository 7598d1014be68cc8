"""Policy against reference: statistics on the reference's per-image scale, with a bootstrap over photographs.

Every statistic is a number a group (LR image), whose mean over groups is reported:

- mean_at_m, best_at_m, worst_at_m: expected mean, best and worst reward of m candidates drawn without replacement from
  the n that the group has. In closed form over the rising rewards x(1)..x(n), so no draw is favoured:
  E[best] = Σ x(k) · C(k-1, m-1) / C(n, m) and E[worst] = Σ x(k) · C(n-k, m-1) / C(n, m).
- std: population standard deviation of the reward over a group's candidates (lower is more stable).
- fr, nr, and each raw metric: mean over a group's candidates; <metric>__std: its population standard deviation over
  them, of which the paper's stability table (mean ± std over seeds) is made.
- win_rate: share of seeds at which the policy's reward beats the reference's, a tie counts half; the reference has 0.5.
  A policy with one candidate an image has no seeds: it meets each of the reference's candidates.

Policy and reference are paired by group. The interval comes from resampling photographs with replacement, all crops of
a photograph together, because crops of one photograph are not independent; all statistics and policies share the
resamples. A group counts where policy and reference both have the statistic.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import gammaln

from dp2osr import seeds, tables
from dp2osr.config import EvaluateSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.preference.reward import Floats, Ints, apply_scale

logger = logging.getLogger(__name__)

REWARD_STATISTICS = ("mean_at_m", "best_at_m", "worst_at_m")
Key = tuple[str, int]  # statistic, m


@dataclass(frozen=True)
class Planes:
    """Candidates of one policy: each of reward, fr, nr and the raw metrics as (G, M), NaN where there is none."""

    planes: dict[str, Floats]

    @property
    def reward(self) -> Floats:
        """Rewards (G, M) on the reference's scale."""
        return self.planes["reward"]

    @property
    def num_candidates(self) -> int:
        """The most candidates with a reward that a group has."""
        return int(np.isfinite(self.reward).sum(axis=1).max(initial=0))


@dataclass(frozen=True)
class Resamples:
    """Bootstrap over photographs: photo (G,) is each group's photograph, weight (B, P) how often it is drawn."""

    photo: Ints
    weight: Floats
    confidence: float

    def interval(self, values: Floats) -> Floats:
        """Return (2, S) ends of the interval of the mean over groups of (G, S) values; NaN values do not count."""
        num_photos = self.weight.shape[1]
        if num_photos < 2:
            return np.full((2, values.shape[1]), np.nan)
        sums, counts = np.zeros((2, num_photos, values.shape[1]))
        np.add.at(sums, self.photo, np.nan_to_num(values))
        np.add.at(counts, self.photo, np.isfinite(values).astype(float))
        # einsum, not BLAS: the same bytes for any number of threads
        total, count = (np.einsum("bp,ps->bs", self.weight, each) for each in (sums, counts))
        means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        tail = (1 - self.confidence) / 2
        return np.nanquantile(means, [tail, 1 - tail], axis=0)


def evaluate(
    policies: Mapping[str, pd.DataFrame],
    *,
    reference: str,
    scales: pd.DataFrame,
    images: pd.DataFrame,
    reward: RewardSettings,
    settings: EvaluateSettings,
    seed: int,
) -> pd.DataFrame:
    """Compare each policy with the reference; the reference has rows too, with difference 0.

    policies: name -> rewards table, of which group_id, rollout and the raw metric columns are used; rollouts from
    reward.num_rollouts on are not. scales: the reference's. images: tables.IMAGES, for the photograph of each group.
    Returns rows of tables.EVALUATION, sorted by key.
    """
    if reference not in policies:
        raise UserError(f"evaluation: no rewards of the reference '{reference}', found {', '.join(policies)}")
    groups = np.array(sorted(policies[reference]["group_id"].unique()), dtype=object)
    resamples = make_resamples(_photos(groups, images), settings, seed=seed)
    planes = {name: make_planes(frame, groups, scales, reward) for name, frame in policies.items()}
    frames = []
    for name, policy in planes.items():
        if not policy.num_candidates:
            raise UserError(f"evaluation: policy '{name}' has no candidate with a reward")
        _report(name, groups, policy)
        frames.append(_compare(name, policy, planes[reference], resamples, reward))
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values(tables.keys(tables.EVALUATION), ignore_index=True)


def make_resamples(photos: npt.NDArray[np.object_], settings: EvaluateSettings, *, seed: int) -> Resamples:
    """Draw the bootstrap weights for groups of these photographs, (G,) ids."""
    names, photo = np.unique(photos.astype(str), return_inverse=True)
    if len(names) < 2:
        logger.warning("evaluation: one photograph, so there are no intervals; wanted two or more")
    generator = np.random.default_rng(seeds.derive(seed, "bootstrap"))
    chance = np.full(len(names), 1 / len(names))
    weight = generator.multinomial(len(names), chance, size=settings.bootstrap).astype(np.float64)
    return Resamples(photo=photo.reshape(-1), weight=weight, confidence=settings.confidence)


def make_planes(
    frame: pd.DataFrame, groups: npt.NDArray[np.object_], scales: pd.DataFrame, reward: RewardSettings
) -> Planes:
    """Put a policy's raw scores on the scale, and each column into (G, M) by group and rollout."""
    scaled = apply_scale(frame[frame["rollout"] < reward.num_rollouts], scales, reward)
    group = pd.Index(groups).get_indexer(pd.Index(scaled["group_id"]))
    rollout = scaled["rollout"].to_numpy()
    wanted = [name for name in METRICS if name in scaled.columns] + ["fr", "nr", "reward"]
    planes = {}
    for name in wanted:
        plane = np.full((len(groups), int(rollout.max(initial=0)) + 1), np.nan)
        plane[group[group >= 0], rollout[group >= 0]] = scaled[name].to_numpy()[group >= 0]
        planes[name] = np.where(np.isfinite(plane), plane, np.nan)
    return Planes(planes)


def subset_sizes(num_candidates: int) -> list[int]:
    """Return 1, 2, 4 … and the number of candidates itself."""
    powers = [2**k for k in range(num_candidates.bit_length())]
    return sorted({*(m for m in powers if m <= num_candidates), num_candidates})


def at_m(reward: Floats, m: int) -> tuple[Floats, Floats, Floats]:
    """Return expected (mean, best, worst) of `m` candidates drawn without replacement, each (G,).

    reward: (G, M), NaN where a candidate has none. NaN for a group with fewer than m.
    """
    rising = np.sort(reward, axis=1)  # NaN last
    count = np.isfinite(reward).sum(axis=1)
    best, worst = np.full(len(reward), np.nan), np.full(len(reward), np.nan)
    for n in np.unique(count[count >= m]):
        rows, share = count == n, _share_of_best(int(n), m)
        best[rows] = (rising[rows, :n] * share).sum(axis=1)
        worst[rows] = (rising[rows, :n] * share[::-1]).sum(axis=1)
    return np.where(count >= m, _mean(reward), np.nan), best, worst


def _share_of_best(n: int, m: int) -> Floats:
    """Return the chance of each of n rising values to be the best of m drawn: C(k-1, m-1) / C(n, m), sums to 1."""
    k = np.arange(1, n + 1)

    def log_choose(top: npt.ArrayLike, bottom: int) -> Floats:
        top = np.asarray(top, dtype=np.float64)
        return gammaln(top + 1) - gammaln(bottom + 1) - gammaln(top - bottom + 1)

    share = np.zeros(n)
    share[m - 1 :] = np.exp(log_choose(k[m - 1 :] - 1, m - 1) - log_choose(n, m))
    return share / share.sum()


def win_rate(policy: Floats, reference: Floats) -> Floats:
    """Return the share of seeds at which the policy wins, (G,), ties counted half; see the module's docstring."""
    if np.isfinite(policy).sum(axis=1).max(initial=0) == 1:
        policy = np.broadcast_to(np.fmax.reduce(policy, axis=1)[:, None], reference.shape)
    shared = min(policy.shape[1], reference.shape[1])
    difference = policy[:, :shared] - reference[:, :shared]
    return _mean(np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2))


def group_statistics(planes: Planes, sizes: Sequence[int], *, num_candidates: int) -> dict[Key, Floats]:
    """Return each statistic but win_rate as (G,); those of single candidates are filed under m = num_candidates."""
    found: dict[Key, Floats] = {}
    for m in sizes:
        for statistic, values in zip(REWARD_STATISTICS, at_m(planes.reward, m), strict=True):
            found[statistic, m] = values
    found["std", num_candidates] = _spread(planes.reward)
    for name, plane in planes.planes.items():
        if name != "reward":
            found[name, num_candidates] = _mean(plane)
        if name in METRICS:
            found[name + tables.STD, num_candidates] = _spread(plane)
    return found


def _compare(
    name: str, policy: Planes, reference: Planes, resamples: Resamples, reward: RewardSettings
) -> pd.DataFrame:
    """Return the rows of one policy."""
    n = policy.num_candidates
    sizes = subset_sizes(n)
    ours = group_statistics(policy, sizes, num_candidates=n)
    theirs = group_statistics(reference, sizes, num_candidates=n)
    ours["win_rate", n] = win_rate(policy.reward, reference.reward)
    theirs["win_rate", n] = np.full(len(policy.reward), 0.5)
    keys = [key for key in ours if key in theirs and np.isfinite(ours[key] - theirs[key]).any()]
    value, base = (np.stack([side[key] for key in keys], axis=1) for side in (ours, theirs))
    unpaired = ~np.isfinite(value - base)
    value, base = np.where(unpaired, np.nan, value), np.where(unpaired, np.nan, base)
    value_low, value_high = resamples.interval(value)
    ci_low, ci_high = resamples.interval(value - base)
    in_reward = {*reward.fr, *reward.nr}
    statistics = [statistic for statistic, _ in keys]
    return pd.DataFrame(
        {
            "policy": name,
            "statistic": statistics,
            "m": np.array([m for _, m in keys], dtype=np.int32),
            "value": np.nanmean(value, axis=0),
            "value_low": value_low,
            "value_high": value_high,
            "reference": np.nanmean(base, axis=0),
            "difference": np.nanmean(value - base, axis=0),
            "ci_low": ci_low,
            "ci_high": ci_high,
            "in_reward": [each not in METRICS or each in in_reward for each in map(_measured, statistics)],
            "higher_better": [_higher_better(each) for each in statistics],
            "num_groups": (~unpaired).sum(axis=0).astype(np.int32),
            "num_photos": [len(np.unique(resamples.photo[~column])) for column in unpaired.T],
        }
    ).astype({"num_photos": "int32"})


def _measured(statistic: str) -> str:
    """Return the metric that a statistic is of, or the statistic itself."""
    return statistic.removesuffix(tables.STD)


def _higher_better(statistic: str) -> bool:
    if statistic in METRICS:
        return not METRICS[statistic].lower_better
    return statistic != "std" and not statistic.endswith(tables.STD)


def _mean(values: Floats) -> Floats:
    """Return the mean of each row over its finite values; NaN where it has none."""
    count = np.isfinite(values).sum(axis=1)
    return np.where(count > 0, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def _spread(values: Floats) -> Floats:
    """Return the population standard deviation of each row over its finite values; NaN where it has under two."""
    several = np.isfinite(values).sum(axis=1) > 1
    spread = np.full(len(values), np.nan)
    spread[several] = np.nanstd(values[several], axis=1)
    return spread


def _photos(groups: npt.NDArray[np.object_], images: pd.DataFrame) -> npt.NDArray[np.object_]:
    """Return the photograph of each group, (G,) ids."""
    photo_of = dict(zip(images["image_id"], images["photo_id"], strict=True))
    if lacking := [group for group in groups if group not in photo_of]:
        raise UserError(f"images: no row for group '{lacking[0]}' ({len(lacking)} of {len(groups)} groups)")
    return np.array([photo_of[group] for group in groups], dtype=object)


def _report(name: str, groups: npt.NDArray[np.object_], planes: Planes) -> None:
    """Log the groups that a policy cannot be compared on, and the candidates that its statistics are without."""
    lacking = groups[~np.isfinite(planes.reward).any(axis=1)]
    if len(lacking):
        named = ", ".join(lacking[:5])
        logger.warning("policy %s: no reward in %d of %d groups: %s", name, len(lacking), len(groups), named)
    for column, plane in planes.planes.items():
        count = int((~np.isfinite(plane)).sum())
        if count and (column == "reward" or column in METRICS):
            what = (name, column, count, plane.size)
            logger.warning("policy %s: no %s of %d of %d candidates; its statistics are of the others", *what)
