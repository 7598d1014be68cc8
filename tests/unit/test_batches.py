"""Which units a step takes: pure in (seed, step), every epoch once through, order of rows irrelevant."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp2osr.errors import UserError
from dp2osr.training.batches import Schedule, Turn, Unit, split_units, turns
from training_rig import GROUPS, make_pairs, train_settings


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    settings = train_settings(groups_per_step=3)
    one, other = (Schedule(make_pairs(), settings=settings, seed=5) for _ in range(2))
    forwards = [one.step(step) for step in range(1, 9)]
    assert [other.step(step) for step in reversed(range(1, 9))][::-1] == forwards
    shuffled = Schedule(make_pairs().sample(frac=1, random_state=1), settings=settings, seed=5)
    assert [shuffled.step(step) for step in range(1, 9)] == forwards
    assert [Schedule(make_pairs(), settings=settings, seed=6).step(step) for step in range(1, 9)] != forwards


def test_groups_come_once_an_epoch_with_all_their_pairs() -> None:
    schedule = Schedule(make_pairs(), settings=train_settings(groups_per_step=2), seed=0)
    units = [unit for step in (1, 2) for unit in schedule.step(step)]
    assert sorted(unit.group_id for unit in units) == list(GROUPS)
    assert sum(unit.num_pairs for unit in units) == 15
    full = next(unit for unit in units if unit.group_id == GROUPS[0])
    assert full.rollouts == (0, 1, 4, 5)
    assert (full.chosen, full.rejected) == ((0, 0, 1, 1), (2, 3, 2, 3))
    assert full.weights == pytest.approx((1.0, 0.9, 1.1, 1.0))
    assert len({unit.seed for unit in units}) == 4


def test_pairs_come_once_an_epoch() -> None:
    schedule = Schedule(make_pairs(), settings=train_settings(batching="pairs", pairs_per_step=5), seed=0)
    units = [unit for step in (1, 2, 3) for unit in schedule.step(step)]
    keys = Counter((unit.group_id, *unit.rollouts) for unit in units)
    assert len(keys) == 15 and set(keys.values()) == {1}
    assert {(unit.chosen, unit.rejected) for unit in units} == {((0,), (1,))}


def test_a_step_may_hold_a_group_twice_with_other_noise() -> None:
    schedule = Schedule(make_pairs(GROUPS[:1]), settings=train_settings(groups_per_step=3), seed=0)
    assert len({unit.seed for unit in schedule.step(1)}) == 3


def test_units_are_split_by_images_and_by_parts() -> None:
    units = [Unit("g", tuple(range(size)), (0,), (1,), (1.0,), 0) for size in (4, 4, 9, 2, 2)]
    assert [len(run) for run in split_units(units, max_images=8, parts=1)] == [2, 1, 2]
    assert [len(run) for run in split_units(units, max_images=99, parts=2)] == [3, 2]
    assert list(split_units([], max_images=8, parts=1)) == []


def units_of(*sizes: int) -> list[Unit]:
    """Return units of so many images, of one pair each."""
    return [Unit(f"g{place}", tuple(range(size)), (0,), (1,), (1.0,), 0) for place, size in enumerate(sizes)]


def shares(units: list[Unit], processes: int, *, in_step: bool, **changes: Any) -> list[list[Turn]]:
    """Return the turns of each process."""
    options = {"processes": processes, "in_step": in_step}
    settings = train_settings(**changes)
    return [list(turns(units, settings, process=process, **options)) for process in range(processes)]


def test_every_process_has_its_own_turns_alone() -> None:
    units = units_of(4, 4, 9, 2, 2)
    found = shares(units, 2, in_step=False, micro_batch=8)
    assert [[turn.units for turn in share] for share in found] == [
        [[units[0]], [units[2]], [units[4]]],
        [[units[1], units[3]]],
    ]
    counts = [[(turn.num_pairs, turn.passes) for turn in share] for share in found]
    assert counts == [[(1, 1), (1, 2), (1, 1)], [(2, 1)]]
    assert shares(units_of(4), 2, in_step=False)[1] == []


def test_in_step_all_have_as_many_turns_and_passes_as_the_busiest() -> None:
    units = units_of(4, 4, 9, 2, 2)
    first, second = shares(units, 2, in_step=True, micro_batch=8)
    assert [turn.passes for turn in first] == [turn.passes for turn in second] == [1, 2, 1]
    assert [turn.units for turn in first] == [[units[0]], [units[2]], [units[4]]]
    assert second[0] == Turn([units[1], units[3]], 2, 1)
    for turn in second[1:]:  # nothing is left: one image, which is its own rival
        assert turn.num_pairs == 0 and turn.units == [Unit("g0", (0,), (0,), (0,), (0.0,), 0)]


@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=9),
    processes=st.integers(1, 5),
    micro_batch=st.integers(1, 10),
    accumulation=st.integers(1, 4),
)
def test_in_step_the_backbone_runs_equally_often(
    sizes: list[int], processes: int, micro_batch: int, accumulation: int
) -> None:
    """And every unit is some process's own, once."""
    units = units_of(*sizes)
    found = shares(units, processes, in_step=True, micro_batch=micro_batch, accumulation=accumulation)
    assert len({tuple(turn.passes for turn in share) for share in found}) == 1
    own = [unit.group_id for share in found for turn in share if turn.num_pairs for unit in turn.units]
    assert sorted(own) == sorted(unit.group_id for unit in units)
    for share in found:
        for turn in share:
            assert -(-sum(len(unit.rollouts) for unit in turn.units) // micro_batch) <= turn.passes


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(UserError, match="no rows"):
        Schedule(make_pairs().iloc[:0], settings=train_settings(), seed=0)
