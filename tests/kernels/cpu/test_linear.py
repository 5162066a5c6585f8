"""Packed linear layers against torch in double precision, at every level this machine has."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels.cpu import linear as cpu
from octavo.kernels.cpu.arena import CHUNK_BYTES, WeightArena
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads

DTYPES = [torch.float32, torch.bfloat16]
# (n, k): multiples of nothing, one row, one column, one panel and a bit, several tiles
SIZES = [(1, 1), (5, 3), (16, 2), (17, 19), (131, 36), (64, 33), (200, 101)]


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest entry: sums of products cancel."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_pack_and_unpack_keep_every_bit(library: CpuLibrary, n: int, k: int, dtype: torch.dtype) -> None:
    weight = random(n, k, dtype=dtype)
    wide = random(n, k + 3, dtype=dtype)
    assert torch.equal(cpu.unpack(cpu.pack(weight, library), library), weight)
    assert torch.equal(cpu.unpack(cpu.pack(wide[:, :k], library), library), wide[:, :k])
    if n % 2 == 0:
        assert torch.equal(cpu.unpack(cpu.pack_gate_up(weight, library), library), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_is_the_product(library: CpuLibrary, n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias = random(n, k, dtype=dtype), random(n, seed=1)
    packed = cpu.pack(weight, library)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 50, 101):
        x = random(rows, k, dtype=dtype, seed=rows)
        expected = x.double() @ weight.double().T
        assert_near(cpu.linear(x, packed, out_dtype=torch.float32, library=library), expected, 1e-6)
        with_bias = cpu.linear(x, packed, cpu.pack_bias(bias, packed), torch.float32, library=library)
        assert_near(with_bias, expected + bias, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(library: CpuLibrary, dtype: torch.dtype) -> None:
    packed = cpu.pack(random(211, 97, dtype=dtype), library)
    x = random(120, 97, dtype=dtype)
    whole = cpu.linear(x, packed, out_dtype=torch.float32, library=library)
    for rows in (1, 2, 3, 5, 6, 7, 48, 49, 100):
        part = cpu.linear(x[3 : 3 + rows], packed, out_dtype=torch.float32, library=library)
        assert torch.equal(part, whole[3 : 3 + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_whole_tiles_and_their_edges_agree(
    library: CpuLibrary, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    """Sums of whole tiles never leave the registers, those at an edge do: all must be the same product."""
    n, k = 160, 38  # ten panels: tiles that are whole, and one that is not
    weight, bias, x = random(n, k, dtype=dtype), random(n, seed=1), random(40, k, dtype=dtype, seed=2)
    product = x.double() @ weight.double().T
    tolerance = 1e-6 if out_dtype == torch.float32 else 5e-3
    plain, gated = cpu.pack(weight, library), cpu.pack_gate_up(weight, library)
    for used in (None, bias):
        expected = product if used is None else product + used
        plain_bias = None if used is None else cpu.pack_bias(used, plain)
        gated_bias = None if used is None else cpu.pack_bias(used, gated)
        stored = cpu.linear(x, plain, plain_bias, out_dtype, library=library)
        assert_near(stored, expected, tolerance)
        gate, up = expected.chunk(2, dim=-1)
        activated = cpu.linear(x, gated, gated_bias, out_dtype, library=library)
        assert_near(activated, F.silu(gate) * up, 2 * tolerance)
        residual = random(40, n, seed=3)
        added = cpu.linear_add(x, plain, residual.clone(), plain_bias, library)
        assert_near(added, residual + expected, 1e-6)
        for row in (0, 5, 6, 39):  # alone, every sum of the row goes through memory
            one = x[row : row + 1]
            assert torch.equal(cpu.linear(one, plain, plain_bias, out_dtype, library=library)[0], stored[row])
            assert torch.equal(
                cpu.linear(one, gated, gated_bias, out_dtype, library=library)[0], activated[row]
            )
            again = cpu.linear_add(one, plain, residual[row : row + 1].clone(), plain_bias, library)
            assert torch.equal(again[0], added[row])


def test_an_output_larger_than_the_caches_is_the_same(library: CpuLibrary) -> None:
    """It is written past them; rows alone are not."""
    n, rows = 70_016, 18
    packed = cpu.pack(random(n, 4, dtype=torch.bfloat16), library)
    x = random(rows, 4, dtype=torch.bfloat16, seed=1)
    try:
        set_num_threads(2)
        whole = cpu.linear(x, packed, out_dtype=torch.float32, library=library)
    finally:
        set_num_threads(1)
    assert whole.nbytes > 4 << 20
    for row in range(rows):
        one = cpu.linear(x[row : row + 1], packed, out_dtype=torch.float32, library=library)
        assert torch.equal(one[0], whole[row])


def test_weights_of_an_arena_lie_side_by_side() -> None:
    arena = WeightArena()
    weights = [random(33, 7, seed=seed) for seed in range(3)]
    packed = [cpu.pack(weight, arena=arena) for weight in weights]
    starts = [each.storage.data_ptr() for each in packed]
    size = packed[0].storage.nbytes
    assert all(start % 64 == 0 for start in starts)
    assert [after - before for before, after in itertools.pairwise(starts)] == [-(-size // 64) * 64] * 2
    for each, weight in zip(packed, weights, strict=True):
        assert torch.equal(cpu.unpack(each), weight)


def test_an_arena_opens_another_chunk_when_one_is_full() -> None:
    arena = WeightArena()
    first = arena.take(CHUNK_BYTES - 64, torch.uint8)
    second = arena.take(100, torch.float32)
    huge = arena.take(CHUNK_BYTES + 1, torch.uint8)
    for part in (first, second, huge):
        part[0], part[-1] = 1, 2
        assert (part[0].item(), part[-1].item()) == (1, 2)
    assert (len(first), len(second), len(huge)) == (CHUNK_BYTES - 64, 100, CHUNK_BYTES + 1)
    assert second.dtype == torch.float32
    spans = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in (first, second, huge))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(library: CpuLibrary, dtype: torch.dtype) -> None:
    packed = cpu.pack(random(300, 64, dtype=dtype), library)
    x = random(40, 64, dtype=dtype)
    try:
        results = []
        for threads in (1, 2, 3):
            set_num_threads(threads)
            results.append(cpu.linear(x, packed, library=library))
    finally:
        set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bf16_output_rounds_to_nearest_even(library: CpuLibrary) -> None:
    packed = cpu.pack(torch.eye(16), library)
    x = random(3, 16)
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = 1.00390625, 1.01171875, float("nan"), float("inf")  # two ties
    rounded = cpu.linear(x[:, [0, 1, *range(4, 16), 4, 5]], packed, out_dtype=torch.bfloat16, library=library)
    assert torch.equal(rounded, x[:, [0, 1, *range(4, 16), 4, 5]].bfloat16())
    one = cpu.pack(torch.ones(1, 1), library)
    for special in (float("nan"), float("inf"), -float("inf")):
        y = cpu.linear(torch.tensor([[special]]), one, out_dtype=torch.bfloat16, library=library)
        assert torch.equal(y.isnan(), torch.tensor([[special != special]]))
        assert special != special or y.item() == special


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_odd_k_does_not_read_the_next_row(library: CpuLibrary, dtype: torch.dtype) -> None:
    packed = cpu.pack(random(20, 5, dtype=dtype), library)
    x = random(4, 5, dtype=dtype)
    surrounded = torch.full((4, 6), float("nan"), dtype=dtype)
    surrounded[:, :5] = x
    expected = cpu.linear(x, packed, library=library)
    assert torch.equal(cpu.linear(surrounded[:, :5], packed, library=library), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [1, 16, 37, 70])
def test_gate_and_up(library: CpuLibrary, intermediate: int, dtype: torch.dtype) -> None:
    weight, bias = random(2 * intermediate, 22, dtype=dtype), random(2 * intermediate, seed=1)
    packed = cpu.pack_gate_up(weight, library)
    packed_bias = cpu.pack_bias(bias, packed)
    x = 3 * random(9, 22, dtype=dtype, seed=2)
    product = x.double() @ weight.double().T
    for used, expected in ((None, product), (packed_bias, product + bias)):
        gate, up = expected.chunk(2, dim=-1)
        y = cpu.linear(x, packed, used, torch.float32, library=library)
        assert_near(y, F.silu(gate) * up, 2e-6)


@pytest.mark.parametrize("extreme", [-1e30, -200.0, -88.0, 88.0, 200.0, 1e30])
def test_silu_at_the_ends(library: CpuLibrary, extreme: float) -> None:
    packed = cpu.pack_gate_up(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), library)
    y = cpu.linear(torch.tensor([[extreme, 1.0]]), packed, library=library)
    assert abs(y.item() - max(extreme, 0.0)) <= 1e-6 * max(extreme, 1.0)


def test_linear_add_adds_in_place(library: CpuLibrary) -> None:
    weight = random(37, 12, dtype=torch.bfloat16)
    x, residual = random(5, 12, dtype=torch.bfloat16, seed=1), random(5, 37, seed=2)
    expected = residual.double() + x.double() @ weight.double().T
    returned = cpu.linear_add(x, cpu.pack(weight, library), residual, library=library)
    assert returned is residual
    assert_near(residual, expected, 1e-6)


def test_output_into_a_part_of_wider_rows_leaves_the_rest(library: CpuLibrary) -> None:
    weight = random(21, 8)
    x = random(7, 8, seed=1)
    out = torch.full((7, 40), 5.0)
    cpu.linear(x, cpu.pack(weight, library), out=out[:, :21], library=library)
    assert_near(out[:, :21], x.double() @ weight.double().T, 1e-6)
    assert bool((out[:, 21:] == 5).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_from_packed_and_plain(library: CpuLibrary, dtype: torch.dtype) -> None:
    table = random(75, 19, dtype=dtype)
    ids = torch.tensor([0, 74, 16, 15, 0, 31])
    assert torch.equal(cpu.embed(ids, table, library), table[ids].float())
    assert torch.equal(cpu.embed(ids, cpu.pack(table, library), library), table[ids].float())
    for bad in (-1, 75):
        with pytest.raises(ValueError, match="ids"):
            cpu.embed(torch.tensor([bad]), table, library)


def test_nothing_to_do_is_fine(library: CpuLibrary) -> None:
    packed = cpu.pack(random(5, 4), library)
    assert cpu.linear(torch.empty(0, 4), packed, library=library).shape == (0, 5)
    assert cpu.embed(torch.empty(0, dtype=torch.int64), packed, library).shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    packed = cpu.pack(random(6, 4))
    x = random(2, 4)
    cases: list[tuple[str, dict[str, object]]] = [
        ("x must have shape", {"x": random(2, 5)}),
        ("x must be torch.float32", {"x": x.bfloat16()}),
        ("x must be contiguous", {"x": random(4, 2).T}),
        ("bias must have shape", {"bias": random(5)}),
        ("bias must be torch.float32", {"bias": random(6).bfloat16()}),
        ("out must have shape", {"out": random(2, 7)}),
        ("out_dtype", {"out": random(2, 6), "out_dtype": torch.bfloat16}),
        ("out must be float32 or bfloat16", {"out_dtype": torch.float16}),
    ]
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            cpu.linear(**{"x": x, "packed": packed, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be float32 or bfloat16"):
        cpu.pack(random(2, 2).half())
    with pytest.raises(ValueError, match="even number of rows"):
        cpu.pack_gate_up(random(3, 2))
    with pytest.raises(ValueError, match=r"residual must be torch\.float32"):
        cpu.linear_add(x, packed, random(2, 6).bfloat16())
    with pytest.raises(ValueError, match="not from pack_gate_up"):
        cpu.linear_add(x, cpu.pack_gate_up(random(6, 4)), random(2, 6))
