"""Norm, rotary embedding and storing, seen through the cache's only reader: attention."""

from __future__ import annotations

import pytest
import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu import attention
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads
from tests.kernels.cpu.ragged import Request, chunk, decode, make_batch, random, shuffled_tables

DTYPES = [torch.float32, torch.bfloat16]
REQUESTS = [chunk(0, 19), Request(40, [True, False]), decode(7), chunk(3, 2)]
MAX_POSITIONS = 64


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


def spec_of(heads: int, kv_heads: int, head_dim: int) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5)


def tables_of(rot_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, rot_dim, 2) / max(rot_dim, 1))
    angles = torch.arange(MAX_POSITIONS)[:, None] * frequencies
    return angles.cos().contiguous(), angles.sin().contiguous()


def expected_qkv(
    qkv: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    rot_dim: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """float64 [num_tokens, heads + 2 * KV heads, head_dim]; padding rows as they were."""
    cos, sin = tables_of(rot_dim)
    out = qkv.double().view(metadata.num_tokens, -1, spec.head_dim).clone()
    turned = spec.num_heads + spec.num_kv_heads
    half = rot_dim // 2
    for row, position in enumerate(metadata.positions.tolist()):
        if position < 0:
            continue
        heads = out[row, :turned].clone()
        for part, norm in ((slice(0, spec.num_heads), q_norm), (slice(spec.num_heads, turned), k_norm)):
            if norm is not None:
                x = heads[part]
                heads[part] = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
        first, second = heads[:, :half].clone(), heads[:, half:rot_dim].clone()
        c, s = cos[position].double(), sin[position].double()
        heads[:, :half] = first * c - second * s
        heads[:, half:rot_dim] = second * c + first * s
        out[row, :turned] = heads
    return out


def read_back(
    cache: torch.Tensor, tables: torch.Tensor, spec: AttentionSpec, lengths: list[int], library: CpuLibrary
) -> list[torch.Tensor]:
    """Values by request, [seq_len, KV heads, head_dim]: with a window of 1 attention is the value itself."""
    one = AttentionSpec(spec.num_kv_heads, spec.num_kv_heads, spec.head_dim, 1.0, sliding_window=1)
    batch = make_batch([chunk(0, n) for n in lengths], cache.shape[1] * 16, tables)
    query = torch.zeros(batch.num_tokens, spec.num_kv_heads, spec.head_dim)
    out = attention.attend(query, cache, batch, one, library=library)
    return list(torch.split(out.view(-1, spec.num_kv_heads, spec.head_dim), lengths))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rot_dim"),
    [(9, 3, 64, 64), (4, 2, 10, 10), (3, 1, 5, 4), (2, 2, 80, 32), (2, 1, 6, 0)],
)
def test_norm_and_rotation(
    library: CpuLibrary, heads: int, kv_heads: int, head_dim: int, rot_dim: int, norms: bool
) -> None:
    spec = spec_of(heads, kv_heads, head_dim)
    tables, num_blocks = shuffled_tables(REQUESTS, 16)
    metadata = make_batch(REQUESTS, 16, tables, tail_padding=1)
    cache = torch.zeros(attention.kv_cache_shape(num_blocks, 16, spec))
    qkv = random(metadata.num_tokens, (heads + 2 * kv_heads) * head_dim, seed=1)
    q_norm = random(head_dim, seed=2) if norms else None
    k_norm = random(head_dim, seed=3) if norms else None
    expected = expected_qkv(qkv, metadata, spec, rot_dim, q_norm, k_norm, 1e-5)
    cos, sin = tables_of(rot_dim)
    attention.rope_store(
        qkv, cos, sin, cache, metadata, spec, q_norm=q_norm, k_norm=k_norm, eps=1e-5, library=library
    )
    torch.testing.assert_close(qkv.view_as(expected).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 16, 70])
def test_rope_store_stores_what_store_stores(library: CpuLibrary, head_dim: int, dtype: torch.dtype) -> None:
    """The same bytes in the cache as storing the rotated keys and the values."""
    spec = spec_of(4, 2, head_dim)
    tables, num_blocks = shuffled_tables(REQUESTS, 32)
    metadata = make_batch(REQUESTS, 32, tables)
    fused, plain = (
        torch.full(attention.kv_cache_shape(num_blocks, 32, spec), 7.0, dtype=dtype) for _ in range(2)
    )
    qkv = random(metadata.num_tokens, 8 * head_dim)
    cos, sin = tables_of(head_dim - head_dim % 2)
    set_num_threads(2)
    attention.rope_store(qkv, cos, sin, fused, metadata, spec, library=library)
    set_num_threads(1)
    by_head = qkv.view(-1, 8, head_dim)
    attention.store(by_head[:, 4:6], by_head[:, 6:], plain, metadata, spec, library=library)
    assert torch.equal(fused, plain)
    assert (fused != 7.0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 37, 64])
def test_values_come_back_and_neighbours_stay(
    library: CpuLibrary, head_dim: int, source: torch.dtype, dtype: torch.dtype
) -> None:
    """Token by token in random order: a token never disturbs the one it shares a pair with."""
    spec = spec_of(3, 3, head_dim)
    lengths = [21, 16, 1]
    tables, num_blocks = shuffled_tables([chunk(0, n) for n in lengths], 16)
    cache = torch.full(attention.kv_cache_shape(num_blocks, 16, spec), float("nan"), dtype=dtype)
    values = [random(n, 3, head_dim, dtype=source, seed=n) for n in lengths]
    order = [(request, at) for request, n in enumerate(lengths) for at in range(n)]
    for index in torch.randperm(len(order), generator=torch.Generator().manual_seed(3)).tolist():
        request, at = order[index]
        value = values[request][at : at + 1]
        step = make_batch([decode(at)], 16, tables[request : request + 1])
        attention.store(torch.zeros_like(value), value, cache, step, spec, library=library)
    for value, back in zip(values, read_back(cache, tables, spec, lengths, library), strict=True):
        assert torch.equal(back, value.to(dtype).float())


def test_rounding_to_bf16_is_torch_s(library: CpuLibrary) -> None:
    spec = spec_of(1, 1, 64)
    bits = torch.randint(0, 2**31 - 2**23, (16, 1, 64), generator=torch.Generator().manual_seed(0)).int()
    value = bits.view(torch.float32) * 1e-3  # every exponent, ties included
    value[0, 0, :4] = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.0])
    metadata = make_batch([chunk(0, 16)], 16, torch.tensor([[0]], dtype=torch.int32))
    caches = [torch.zeros(attention.kv_cache_shape(1, 16, spec), dtype=torch.bfloat16) for _ in range(2)]
    attention.store(value, value, caches[0], metadata, spec, library=library)
    attention.store(value.bfloat16(), value.bfloat16(), caches[1], metadata, spec, library=library)
    assert torch.equal(caches[0], caches[1])


def test_a_row_keeps_its_bits_in_any_company(library: CpuLibrary) -> None:
    spec = spec_of(9, 3, 20)
    tables, num_blocks = shuffled_tables(REQUESTS, 16)
    metadata = make_batch(REQUESTS, 16, tables)
    qkv = random(metadata.num_tokens, 15 * 20)
    norm = random(20, seed=2)
    cos, sin = tables_of(20)

    def run(rows: torch.Tensor, step: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.zeros(attention.kv_cache_shape(num_blocks, 16, spec))
        rows = rows.clone()
        attention.rope_store(rows, cos, sin, cache, step, spec, q_norm=norm, k_norm=norm, library=library)
        return rows, cache

    set_num_threads(2)
    together, cache = run(qkv, metadata)
    set_num_threads(1)
    merged = torch.zeros_like(cache)
    for row in range(19):
        alone, piece = run(qkv[row : row + 1], make_batch([decode(row)], 16, tables[:1]))
        assert torch.equal(alone[0], together[row])
        merged += piece
    first = tables[0, :2].long()
    assert torch.equal(merged[first], cache[first])


def test_bad_arguments_are_named() -> None:
    spec = spec_of(4, 2, 8)
    tables, num_blocks = shuffled_tables([decode(3)], 16)
    metadata = make_batch([decode(3)], 16, tables)
    cache = torch.zeros(attention.kv_cache_shape(num_blocks, 16, spec))
    qkv, value = torch.zeros(1, 64), torch.zeros(1, 2, 8)
    cos, sin = tables_of(8)
    with pytest.raises(ValueError, match="qkv"):
        attention.rope_store(qkv[:, :-1], cos, sin, cache, metadata, spec)
    with pytest.raises(ValueError, match="qkv"):
        attention.rope_store(qkv.bfloat16(), cos, sin, cache, metadata, spec)
    with pytest.raises(ValueError, match="sin"):
        attention.rope_store(qkv, cos, sin[:, :-1], cache, metadata, spec)
    with pytest.raises(ValueError, match="cos"):
        attention.rope_store(qkv, *tables_of(12), cache, metadata, spec)
    with pytest.raises(ValueError, match="k_norm"):
        attention.rope_store(qkv, cos, sin, cache, metadata, spec, k_norm=torch.ones(9))
    with pytest.raises(ValueError, match="key"):
        attention.store(value[:, :1], value, cache, metadata, spec)
    with pytest.raises(ValueError, match="value"):
        attention.store(value, value.bfloat16(), cache, metadata, spec)
