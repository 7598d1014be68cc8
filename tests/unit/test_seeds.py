"""Seeds: fixed values, so that a change to them (and so to all results) is seen; no clashes, no order."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from dp2osr import seeds

NAMES = st.text(st.characters(exclude_characters="\x1f", codec="utf-8"), max_size=8)


def test_a_seed_is_the_hash_of_its_names() -> None:
    digest = hashlib.sha256(b"0\x1fcandidate\x1f0123456789abcdef-000\x1f3").digest()
    assert seeds.candidate(0, "0123456789abcdef-000", 3) == int.from_bytes(digest[:8], "big") // 2


def test_the_values_stay() -> None:
    assert seeds.derive(0) == 3456079177858693020
    assert seeds.candidate(0, "0123456789abcdef-000", 0) == 8071208551142087251


def test_names_are_kept_apart() -> None:
    assert seeds.derive(0, "a", "bc") != seeds.derive(0, "ab", "c")
    assert seeds.derive(1, "a") != seeds.derive(11, "a")


@given(st.integers(0, 2**31), st.lists(NAMES, max_size=3))
def test_a_seed_fits_a_torch_generator(base: int, names: list[str]) -> None:
    assert 0 <= seeds.derive(base, *names) < 2**63


def test_candidates_do_not_share_noise() -> None:
    found = {seeds.candidate(base, f"{i:016x}-000", m) for base in (0, 1) for i in range(50) for m in range(64)}
    assert len(found) == 2 * 50 * 64
