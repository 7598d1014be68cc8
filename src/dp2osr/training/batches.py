"""Which images and pairs a step takes: a pure function of (seed, step), for any number of processes.

A unit is what shares one timestep and one noise: a whole group (batching: groups), whose pairs come from images that
are computed once, or a single pair (batching: pairs).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dp2osr import seeds
from dp2osr.config import TrainSettings
from dp2osr.errors import UserError


@dataclass(frozen=True)
class Unit:
    """Images of one group that share timestep and noise, and the pairs among them.

    rollouts: each image once, ascending; chosen, rejected: positions in `rollouts`, one a pair; seed: of t and ε.
    """

    group_id: str
    rollouts: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return len(self.weights)


class Schedule:
    """Units of each step: every epoch is a seeded permutation of all groups, or of all pairs."""

    def __init__(self, pairs: pd.DataFrame, *, settings: TrainSettings, seed: int) -> None:
        """pairs: rows of tables.PAIRS, in any order."""
        if pairs.empty:
            raise UserError("pairs: the table has no rows, wanted at least one pair to train on")
        pairs = pairs.sort_values(["group_id", "chosen", "rejected"], kind="stable")
        self._groups = pairs["group_id"].to_numpy()
        self._chosen = pairs["chosen"].to_numpy()
        self._rejected = pairs["rejected"].to_numpy()
        self._weights = pairs["weight"].to_numpy()
        if settings.batching == "groups":
            starts = np.flatnonzero(np.r_[True, self._groups[1:] != self._groups[:-1]])
            self._per_step = settings.groups_per_step
        else:
            starts = np.arange(len(pairs))
            self._per_step = settings.pairs_per_step
        self._bounds = np.r_[starts, len(pairs)]
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def group_ids(self) -> list[str]:
        """All groups, sorted."""
        return sorted(set(self._groups))

    def step(self, step: int) -> list[Unit]:
        """Return the units of optimizer step `step` (1 is the first), in an order that never changes."""
        first = (step - 1) * self._per_step
        return [self._unit(step, place) for place in range(first, first + self._per_step)]

    def _unit(self, step: int, place: int) -> Unit:
        epoch, index = divmod(place, len(self._bounds) - 1)
        start, stop = self._bounds[self._order(epoch)[index] :][:2]
        group_id = str(self._groups[start])
        chosen, rejected = self._chosen[start:stop], self._rejected[start:stop]
        rollouts = np.unique(np.r_[chosen, rejected])
        return Unit(
            group_id=group_id,
            rollouts=tuple(rollouts.tolist()),
            chosen=tuple(np.searchsorted(rollouts, chosen).tolist()),
            rejected=tuple(np.searchsorted(rollouts, rejected).tolist()),
            weights=tuple(self._weights[start:stop].tolist()),
            seed=seeds.derive(self._seed, "step", step, place, group_id),
        )

    def _order(self, epoch: int) -> np.ndarray:
        """Return the epoch's permutation; two are kept, for a step may end one epoch and begin the next."""
        if epoch not in self._epochs:
            rng = np.random.default_rng(seeds.derive(self._seed, "epoch", epoch))
            kept = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: rng.permutation(len(self._bounds) - 1)}
        return self._epochs[epoch]


def split_units(units: Sequence[Unit], *, max_images: int, parts: int) -> Iterator[list[Unit]]:
    """Cut a step's units into runs of at most `max_images` images, and into at least `parts` runs where they suffice.

    A unit is never cut: one that is larger than `max_images` stands alone.
    """
    max_units = -(-len(units) // parts)
    run: list[Unit] = []
    for unit in units:
        if run and (num_images([*run, unit]) > max_images or len(run) == max_units):
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


@dataclass(frozen=True)
class Turn:
    """What a process computes at a time: units whose loss is one number, in `passes` forward passes of a branch.

    num_pairs is 0 where the process has nothing left to do and passes one image through for nothing, for the others.
    """

    units: list[Unit]
    num_pairs: int
    passes: int


def turns(
    units: Sequence[Unit], settings: TrainSettings, *, process: int, processes: int, in_step: bool
) -> Iterator[Turn]:
    """Yield the turns of one process in a step: every n-th unit is its own.

    in_step: all processes have equally many turns, and in each as many passes as the one with most images in it, for a
    sharded backbone runs in all of them or in none. Each process knows all units, and so what the others have to do.
    """
    shares = [units[place::processes] for place in range(processes)]
    options = {"max_images": settings.micro_batch, "parts": settings.accumulation}
    runs = [list(split_units(share, **options)) for share in (shares if in_step else [shares[process]])]
    own = runs[process if in_step else 0]
    for place in range(max(map(len, runs))):
        meeting = [run[place] for run in runs if place < len(run)]
        passes = max(-(-num_images(run) // settings.micro_batch) for run in meeting)
        if place < len(own):
            yield Turn(own[place], sum(unit.num_pairs for unit in own[place]), passes)
        else:
            yield Turn([idle(units[0])], 0, passes)


def num_images(units: Sequence[Unit]) -> int:
    """Return how many images some units have together."""
    return sum(len(unit.rollouts) for unit in units)


def idle(unit: Unit) -> Unit:
    """Return a unit of one image, its own rival, that weighs nothing: no gradient comes of it."""
    return replace(unit, rollouts=unit.rollouts[:1], chosen=(0,), rejected=(0,), weights=(0.0,))
