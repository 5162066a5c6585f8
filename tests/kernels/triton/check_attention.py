"""Attention of few rows: spans, parts, block sizes, and which tokens are old enough to be read early."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.attention.backend import AttentionMetadata, AttentionSpec, SharedPrefixes  # noqa: E402
from octavo.kernels.triton import attention, attention_few  # noqa: E402
from octavo.kernels.triton.attention import QueryTiling, Scratch  # noqa: E402
from octavo.kernels.triton.attention_few import part_begin, span_at, spans_of  # noqa: E402
from octavo.kernels.triton.query_tiles import narrow_tiling  # noqa: E402

import triton  # noqa: E402  isort: skip
import triton.language as tl  # noqa: E402  isort: skip


class Case(NamedTuple):
    """Requests whose last rows are computed, and a cache of scattered blocks."""

    metadata: AttentionMetadata
    q: torch.Tensor
    cache: torch.Tensor
    spec: AttentionSpec

    def expected(self) -> torch.Tensor:
        """By plain torch, request by request."""
        spec, meta, out = self.spec, self.metadata, torch.zeros_like(self.q)
        shared = spec.num_heads // spec.num_kv_heads
        for request in range(meta.num_reqs):
            first, end = (int(n) for n in meta.query_start_loc[request : request + 2])
            rows = [row for row in range(first, end) if meta.positions[row] >= 0]
            tokens = int(meta.seq_lens[request])
            kv = self.cache[meta.block_table[request].long()].transpose(2, 3).transpose(0, 1).flatten(1, 2)
            keys, values = kv[:, :tokens].repeat_interleave(shared, 2).permute(0, 2, 1, 3)
            for row in rows:
                position = int(meta.positions[row])
                scores = (keys @ self.q[row][..., None])[..., 0] * spec.scale
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
                begin = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
                scores[:, :begin], scores[:, position + 1 :] = float("-inf"), float("-inf")
                out[row] = (scores.softmax(-1)[:, None] @ values)[:, 0]
        return out


def case(lengths: list[int], rows: list[int], spec: AttentionSpec, block_size: int = 16) -> Case:
    generator = torch.Generator().manual_seed(sum(lengths))
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks), generator=generator).to(torch.int32)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for request, ids in enumerate(order.split(blocks)):
        table[request, : len(ids)] = ids
    positions = torch.cat([torch.arange(n - r, n) for n, r in zip(lengths, rows, strict=True)])
    shape = (sum(blocks), 2, spec.num_kv_heads, block_size, spec.head_dim)
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    metadata = AttentionMetadata(
        query_start_loc=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32), block_table=table,
        slot_mapping=positions, positions=positions, num_reqs=len(rows), num_tokens=sum(rows),
        max_query_len=max(rows), max_seq_len=max(lengths),
    )  # fmt: skip
    q = torch.randn(sum(rows), spec.num_heads, spec.head_dim, generator=generator)
    return Case(metadata, q, torch.randn(shape, generator=generator), spec)


def run(made: Case, tiling: QueryTiling, extra: int, early: bool) -> torch.Tensor:
    meta = made.metadata
    plan = attention.plan(meta, made.spec, tiling, extra, block_size=made.cache.shape[3])
    scratch = Scratch.allocate(meta.num_tokens, meta.max_seq_len, made.spec, torch.device("cpu"))
    out = torch.full_like(made.q, float("nan"))
    for _ in range(2):  # counters are zero again after a launch
        attention.attend(made.q, made.cache, out, meta, made.spec, plan, scratch, early)
    assert not scratch.counters.any()
    return out


SPECS = {
    "plain": AttentionSpec(4, 2, 16, 0.25),
    "three heads a KV head": AttentionSpec(3, 1, 16, 0.25),
    "odd heads, soft cap": AttentionSpec(2, 2, 24, 0.3, soft_cap=3.0),
    "window": AttentionSpec(2, 1, 32, 0.2, sliding_window=37),
}


@pytest.fixture
def _few_short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 16 tokens up to 64, of 32 up to 128, of 64 behind them."""
    monkeypatch.setattr(attention, "GROUP", 16)
    monkeypatch.setattr(attention_few, "SHORT_SPANS", 2)
    monkeypatch.setattr(attention_few, "_SHORT_SPANS", tl.constexpr(2))


@pytest.mark.usefixtures("_few_short_spans")
@pytest.mark.parametrize(
    ("name", "block_q", "extra", "early", "block_size"),
    [
        ("plain", 8, 0, True, 16),
        ("plain", 16, 9, False, 48),
        ("three heads a KV head", 16, 4, True, 16),
        ("odd heads, soft cap", 8, 2, True, 48),
        ("window", 8, 6, True, 16),
        ("window", 16, 0, False, 16),
    ],
)
def test_rows_of_many_spans(name: str, block_q: int, extra: int, early: bool, block_size: int) -> None:
    """Contexts of one token, of one span, to the end of the short spans, and beyond."""
    made = case([1, 150, 64, 40], [1, 3, 1, 2], SPECS[name], block_size)
    made.metadata.positions[4 + (extra == 0)] = -1  # padding: a request of its own, or behind a row
    got = run(made, QueryTiling(block_q), extra, early)
    torch.testing.assert_close(got, made.expected(), atol=1e-4, rtol=1e-4)
    if extra:
        assert torch.equal(got, run(made, QueryTiling(block_q), 0, early))


def test_more_spans_than_are_folded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GROUP", 16)
    made = case([331], [1], SPECS["three heads a KV head"])
    got = run(made, QueryTiling(8), 19, True)
    torch.testing.assert_close(got, made.expected(), atol=1e-4, rtol=1e-4)


def shares(made: Case, extra: int) -> dict[int, list[tuple[int, int]]]:
    """Where the programs begin and end that share each tile, by the tile's first row."""
    found: dict[int, list[tuple[int, int]]] = {}
    for item in attention.plan(made.metadata, made.spec, QueryTiling(8), extra, block_size=16).tiles.tolist():
        if item[2]:
            found.setdefault(item[1], []).append((item[5], item[6]))
            assert item[8] == found[item[1]][0][1], "where the first of them ends"
    return found


def test_long_contexts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GROUP", 16)
    spec = AttentionSpec(2, 2, 16, 0.25)
    long = case([1000, 30, 20], [1, 1, 3], spec)
    assert shares(long, 0) == {0: [(0, 1000)], 1: [(0, 30)], 2: [(0, 20)]}
    for extra in (1, 5, 40):
        found = shares(long, extra)
        for tile, end in ((0, 1000), (1, 30), (2, 20)):
            edges = found[tile]
            assert edges[0][0] == 0
            assert edges[-1][1] == end
            assert all(this[1] == following[0] for this, following in itertools.pairwise(edges))
        assert 1 + extra // 2 <= len(found[0]) <= 1 + extra
        assert sum(map(len, found.values())) <= 3 + extra
    assert len(shares(long, 40)[1]) == 2
    monkeypatch.setattr(attention, "FULL", 6)  # so many programs run anyway: only long shares pay
    assert [len(found) for found in shares(long, 40).values()] == [13, 1, 1]


def test_no_step_has_more_shares_than_there_are_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its contexts are: every tile is read to its end, and what is longest is cut most."""
    monkeypatch.setattr(attention, "GROUP", 16)
    generator = torch.Generator().manual_seed(5)
    for extra, full in ((1, 128), (7, 128), (16, 4), (30, 4)):
        monkeypatch.setattr(attention, "FULL", full)
        lengths = (
            torch.randint(4, 3000, (6,), generator=generator).pow(2).floor_divide(3000).clamp(min=4).tolist()
        )
        rows = torch.randint(1, 4, (6,), generator=generator).tolist()
        made = case(lengths, rows, AttentionSpec(2, 1, 16, 0.25))
        found = shares(made, extra)
        tiles = sum(-(-n // QueryTiling(8).rows(made.spec)) for n in rows)
        assert len(found) == tiles
        assert sum(map(len, found.values())) <= tiles + extra
        for first, edges in found.items():
            request = int((made.metadata.query_start_loc <= first).sum()) - 1
            assert [edges[0][0], edges[-1][1]] == [0, lengths[request]]
            assert all(this[1] == following[0] for this, following in itertools.pairwise(edges))
        most = max(map(len, found.values()))
        assert any(len(edges) == most and edges[-1][1] == max(lengths) for edges in found.values())


@triton.jit
def _spans_kernel(out_ptr, total, SPAN: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr):
    position = tl.arange(0, TOKENS)
    tl.store(out_ptr + position, span_at(position, SPAN))
    part = tl.arange(0, PARTS)
    tl.store(out_ptr + TOKENS + part, part_begin(part, PARTS - 3, 7, total, SPAN))


@pytest.mark.parametrize("total", [8, 128, 129, 500])
def test_where_spans_and_parts_begin(total: int) -> None:
    span, tokens, parts = 8, 512, 8
    out = torch.zeros(tokens + parts, dtype=torch.int32)
    _spans_kernel[(1,)](out, total, span, tokens, parts)
    number, begins = (x.tolist() for x in out.split([tokens, parts]))
    starts = [p for p in range(tokens) if p == 0 or number[p] != number[p - 1]]
    assert starts == [*range(0, 128, 8), *range(128, 256, 16), *range(256, 512, 32)]
    assert [number[p] for p in starts] == list(range(len(starts)))
    assert [spans_of(p, span) for p in range(1, tokens)] == [number[p - 1] + 1 for p in range(1, tokens)]
    assert begins[0] == 7
    assert begins[parts - 3 :] == [total] * 3  # parts that are not there have nothing
    assert begins == sorted(begins)
    assert all(b in starts or b == total for b in begins[1:])


def test_early_reads_leave_out_what_the_step_writes() -> None:
    """A request that begins may share blocks with one whose chunk this very step writes."""
    made = case([90, 70, 40, 60], [2, 30, 8, 1], AttentionSpec(2, 2, 16, 0.25))
    meta = made.metadata

    def old(rows: torch.Tensor | None = None) -> list[int]:
        plan = attention.plan(replace(meta, table_rows=rows), made.spec, QueryTiling(8), block_size=16)
        used = {item[1]: item[7] for item in plan.tiles.tolist() if item[2]}
        return [used[int(first)] for first in meta.query_start_loc[:-1]]

    assert old() == [88, 40, 32, 59]
    meta.block_table[0, :4] = meta.block_table[1, :4]  # the second writes from position 40 on
    meta.block_table[3, :1] = meta.block_table[2, :1]  # shared, and older than the step
    assert old() == [32, 40, 32, 59]
    assert old(torch.tensor([0, 1, 2, 3], dtype=torch.int32)) == [32, 40, 32, 59]
    meta.positions[2:32] = -1  # a request that has ended writes nothing
    assert old()[0] == 88
    unknown = attention.plan(meta, made.spec, QueryTiling(8)).tiles
    assert not unknown[:, 7].any()


def test_shared_prefixes_are_not_read_again() -> None:
    made = case([90, 70], [1, 1], AttentionSpec(2, 2, 16, 0.25))
    nothing = torch.zeros(0, dtype=torch.int32)
    shared = SharedPrefixes(torch.tensor([32, 0], dtype=torch.int32), nothing, nothing.view(0, 2))
    plan = attention.plan(replace(made.metadata, shared=shared), made.spec, QueryTiling(8), block_size=16)
    assert plan.tiles[:2, 3].tolist() == [32, 0]


def test_tilings_fit_the_rows() -> None:
    spec = AttentionSpec(32, 8, 128, 0.1)
    assert [narrow_tiling(64, rows, spec)[0].block_q for rows in (1, 2, 4, 6, 40)] == [8, 8, 16, 32, 32]
    assert narrow_tiling(64, 1, AttentionSpec(48, 1, 128, 0.1))[0].rows(AttentionSpec(48, 1, 128, 0.1)) == 1
    for heads, rows in ((1, 1), (7, 1), (7, 6), (16, 16)):
        tiling, extra = narrow_tiling(4, rows, AttentionSpec(heads, 1, 64, 0.1), torch.float32)
        assert tiling.block_q <= 16
        assert extra > 100
    extras = [narrow_tiling(rows, 1, spec)[1] for rows in (1, 8, 16, 32, 64, 65)]
    assert extras == [15, 24, 16, 16, 16, 0]
    short = [narrow_tiling(rows, 1, spec, longest=8192)[1] for rows in (1, 32, 33)]
    assert short == [15, 16, 0]
    assert [narrow_tiling(rows, 6, spec)[1] for rows in (6, 24, 48, 96)] == [15, 12, 8, 0]
    made = case([20], [1], SPECS["plain"])
    with pytest.raises(ValueError, match="one program each"):
        run(made, QueryTiling(64), 2, False)
