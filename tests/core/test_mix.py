"""The seed derivation: published vectors, and no two families that share a seed."""

from __future__ import annotations

from octavo.core.mix import fold_seed, mix64


def test_seed_zero_is_the_published_splitmix64_sequence() -> None:
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [mix64(0, i) for i in range(4)] == expected


def test_families_do_not_overlap() -> None:
    golden = 0x9E3779B97F4A7C15
    seeds = [0, 1, 2, 3, 42, 2**63, 2**64 - 1, golden, 2 * golden]
    made = {mix64(seed, i) for seed in seeds for i in range(1000)}
    assert len(made) == len(seeds) * 1000


def test_any_integer_is_folded_to_64_bits() -> None:
    assert fold_seed(-1) == 2**64 - 1
    assert mix64(2**64 + 5, 3) == mix64(5, 3)
    assert all(0 <= mix64(-7, i) < 2**64 for i in range(100))
