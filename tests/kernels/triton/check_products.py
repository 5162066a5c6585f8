"""The products of few rows against plain torch, at shapes that are multiples of nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.kernels.triton import pointwise, products, wide_gate_up  # noqa: E402
from octavo.kernels.triton.products import Tiling, Workspace  # noqa: E402
from octavo.kernels.triton.wide_gate_up import WideTiling  # noqa: E402

EPS = 1e-5


def space() -> Workspace:
    return Workspace.allocate(1 << 20, 1024, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(
    ("rows", "n", "k", "tiling"),
    [
        (1, 100, 70, Tiling(32, 1, 32, 2)),
        (5, 96, 256, Tiling(32, 2, 32, 2)),
        (20, 70, 200, Tiling(32, 3, 32, 2)),
        (3, 64, 256, Tiling(32, 2, 32, 2, early=64)),
        (3, 64, 256, Tiling(32, 2, 32, 2, early=128)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_plain(rows: int, n: int, k: int, tiling: Tiling, bias: bool) -> None:
    x, w, b = random(rows, k), random(n, k), random(n) if bias else None
    out, room = torch.full((rows, n), float("nan")), space()
    for _ in range(2):  # counters are zero again after a launch
        products.plain(x, w, b, out, room, tiling)
    torch.testing.assert_close(out, F.linear(x, w, b), atol=1e-4, rtol=1e-4)
    assert not room.counters.any()


def test_a_row_alone_has_the_same_bits() -> None:
    x, w = random(40, 256), random(64, 256)
    many, one = torch.empty(40, 64), torch.empty(1, 64)
    products.plain(x, w, None, many, space(), Tiling(32, 2, 32, 2))
    products.plain(x[17:18].contiguous(), w, None, one, space(), Tiling(32, 2, 32, 2))
    assert torch.equal(many[17], one[0])


@pytest.mark.parametrize(
    ("kind", "n", "k", "share"),
    [  # of Qwen3-8B and Qwen3-0.6B
        ("qkv", 6144, 4096, 1), ("residual", 4096, 4096, 1), ("residual", 4096, 12288, 2),
        ("gate_up", 24576, 4096, 3), ("gate_up", 6144, 1024, 1),
    ],
)  # fmt: skip
def test_no_multiprocessor_gets_more_than_its_share(kind: str, n: int, k: int, share: int) -> None:
    cuts = {rows: products.choose_tiling(kind, n, k, rows) for rows in (1, 16, 17, 32, 64)}
    assert len({cut.split for cut in cuts.values()}) == 1  # or the bits of a row would depend on the others
    for rows, cut in cuts.items():
        assert (share - 1) * products.PROCESSORS < n // cut.block_n * cut.split <= share * products.PROCESSORS
        columns = cut.early + cut.block_k * cut.stages
        room = 2 * (cut.block_n + products.padded_rows(rows)) * columns
        assert share * room <= products.SHARED_MEMORY
        assert share == 3 or (share + 1) * room > products.SHARED_MEMORY


@pytest.mark.parametrize("block_n", [64, 128])
def test_residual_and_the_norm_behind_it(block_n: int) -> None:
    rows, n, k = 5, 128, 192
    x, w, stream, norm = random(rows, k), random(n, k), random(rows, n), random(n)
    expected = stream + x @ w.T
    scaled, squares = torch.empty(rows, n), torch.empty(rows, n // 64)
    products.residual(x, w, None, stream, norm, scaled, squares, space(), Tiling(block_n, 2, 32, 2))
    torch.testing.assert_close(stream, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scaled, expected * norm, atol=1e-4, rtol=1e-4)
    out = torch.empty(rows, n)
    pointwise.apply_scale(scaled, squares, out, EPS)
    normed = F.rms_norm(expected, (n,), norm, EPS)
    torch.testing.assert_close(out, normed, atol=1e-4, rtol=1e-4)

    gate_up, bias = random(2 * 40, n), random(80)
    gate, up = F.linear(normed, gate_up, bias).chunk(2, dim=1)
    for split in (1, 2):
        active = torch.full((rows, 40), float("nan"))
        products.gate_up(scaled, gate_up, bias, squares, EPS, active, space(), Tiling(32, split, 32, 2))
        torch.testing.assert_close(active, F.silu(gate) * up, atol=1e-3, rtol=1e-4)


def test_pointwise() -> None:
    x, weight, table = random(3, 100), random(100), random(50, 100)
    stream = random(3, 100, seed=1)
    normed = pointwise.norm(x, weight, EPS)
    torch.testing.assert_close(normed, F.rms_norm(x, (100,), weight, EPS))
    total = x + stream
    torch.testing.assert_close(pointwise.norm(x, weight, EPS, stream), F.rms_norm(total, (100,), weight, EPS))
    torch.testing.assert_close(stream, total)
    gate, up = x.chunk(2, dim=1)
    torch.testing.assert_close(pointwise.silu_mul(x), F.silu(gate) * up)
    ids, rows = torch.tensor([3, 49, 0]), torch.empty(3, 100)
    pointwise.embed(ids, table, rows)
    assert torch.equal(rows, table[ids])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="multiply"):
        products.plain(random(2, 8), random(4, 9), None, torch.empty(2, 4), space())
    with pytest.raises(ValueError, match="rows"):
        products.plain(random(129, 8), random(4, 8), None, torch.empty(129, 4), space())
    with pytest.raises(ValueError, match="multiple"):
        products.residual(
            random(2, 8),
            random(100, 8),
            None,
            random(2, 100),
            random(100),
            random(2, 100),
            random(2, 2),
            space(),
        )


@pytest.mark.parametrize(
    ("rows", "tile", "tiling"),
    [
        (5, 32, WideTiling(32, 32, 0, 2, 4)),  # x has a whole tile of rows: those behind mean nothing
        (20, 20, WideTiling(32, 64, 32, 2, 4)),  # x ends within the tile
        (32, 32, WideTiling(32, 32, 0, 2, 4)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_wide_gate_up(rows: int, tile: int, tiling: WideTiling, bias: bool, normed: bool) -> None:
    width, k = 192, 128
    x, weight, b = random(tile, k), random(2 * width, k) / 10, random(2 * width) if bias else None
    x[rows:] = float("nan")
    squares = None if normed else torch.rand(rows, k // 64) * 64
    out = torch.full((rows, width), float("nan"))
    wide_gate_up.gate_up(x, weight, b, squares, EPS, out, tiling)
    scaled = x[:rows]
    if squares is not None:
        scaled = scaled * torch.rsqrt(squares.sum(1, keepdim=True) / k + EPS)
    gate, up = F.linear(scaled, weight, b).chunk(2, dim=1)
    torch.testing.assert_close(out, F.silu(gate) * up, atol=1e-3, rtol=1e-4)


def test_wide_gate_up_checks_its_shapes() -> None:
    x, weight, out = random(4, 128), random(2 * 96, 128), torch.empty(4, 96)
    with pytest.raises(ValueError, match="cannot be cut"):
        wide_gate_up.gate_up(x, weight, None, None, EPS, out, WideTiling(32, 64, 0, 2, 4))
    with pytest.raises(ValueError, match="go together"):
        wide_gate_up.gate_up(x[:3], weight, None, None, EPS, out, WideTiling(32, 32, 0, 2, 4))
    assert wide_gate_up.choose_tiling(weight, 32) is None  # small, wide numbers, and no GPU
