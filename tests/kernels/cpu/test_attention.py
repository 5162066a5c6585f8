"""Paged attention in C: right against float64, and the same bits for a row in whatever company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.attention.cpu import CpuBackend
from octavo.kernels.cpu import attention
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads
from tests.kernels.cpu.ragged import Filled, Request, chunk, decode, dense_attention, fill, make_batch, random

DTYPES = [torch.float32, torch.bfloat16]
# bf16 caches round the probabilities to bf16 too
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
# (heads, KV heads, head_dim): GQA, MQA, MHA, odd sizes, more heads than one item holds
SHAPES = [
    (9, 3, 64),
    (4, 4, 5),
    (6, 1, 10),
    (2, 2, 1),
    (8, 2, 80),
    (7, 1, 96),
    (4, 2, 128),
    (2, 1, 256),
    (71, 1, 6),
]
RAGGED = [
    chunk(0, 33),
    Request(300, [True, True, False, False]),
    decode(1),
    decode(0),
    chunk(70, 9),
    decode(520),
    decode(15),
    Request(31, [True, False]),
    Request(0, [False, False]),
]


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    set_num_threads(2)
    yield
    set_num_threads(1)


def spec_of(
    shape: tuple[int, int, int], window: int | None = None, cap: float | None = None
) -> AttentionSpec:
    heads, kv_heads, head_dim = shape
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, cap)


def attend(batch: Filled, library: CpuLibrary) -> torch.Tensor:
    return attention.attend(
        batch.query, batch.cache, batch.metadata, batch.spec, out_dtype=torch.float32, library=library
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_batches(library: CpuLibrary, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = fill(spec_of(shape), RAGGED, dtype, library, tail_padding=2)
    out, expected = attend(batch, library), dense_attention(batch)
    assert (out.double() - expected).abs().max().item() < TOLERANCE[dtype]
    padding = batch.metadata.positions < 0
    assert padding.sum() == 7
    assert not out[padding].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "cap", "block_size"), [(37, None, 16), (1, None, 16), (300, 5.0, 32), (None, 20.0, 48)]
)
def test_windows_caps_and_block_sizes(
    library: CpuLibrary, dtype: torch.dtype, window: int | None, cap: float | None, block_size: int
) -> None:
    batch = fill(spec_of((6, 2, 24), window, cap), RAGGED, dtype, library, block_size)
    error = (attend(batch, library).double() - dense_attention(batch)).abs().max().item()
    assert error < TOLERANCE[dtype]


def test_large_scores_do_not_overflow(library: CpuLibrary) -> None:
    batch = fill(spec_of((2, 1, 16)), [decode(700), chunk(200, 5)], torch.float32, library)
    batch = replace(batch, query=batch.query * 300)
    assert (attend(batch, library).double() - dense_attention(batch)).abs().max().item() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64), (5, 1, 7), (32, 2, 128)])
def test_a_row_keeps_its_bits_in_any_company(
    library: CpuLibrary, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Alone, in a batch, in chunks of 1, 7, 64 and whole, with one thread and with more."""
    spec = spec_of(shape, window=290)
    length = 530
    others = [decode(100), chunk(40, 30), Request(600, [True, True, False])]
    batch = fill(spec, [chunk(0, length), *others], dtype, library)
    tables = batch.metadata.block_table

    def step(query: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        return attention.attend(query, batch.cache, metadata, spec, out_dtype=torch.float32, library=library)

    set_num_threads(1)
    whole = step(batch.query, batch.metadata)
    for threads in (2, 3, 16):
        set_num_threads(threads)
        assert torch.equal(step(batch.query, batch.metadata), whole)
        for size in (64, 7):
            parts = [
                step(batch.query[at : min(at + size, length)],
                     make_batch([chunk(at, min(size, length - at))], 16, tables[:1]))
                for at in range(0, length, size)
            ]  # fmt: skip
            assert torch.equal(torch.cat(parts), whole[:length])
    for position in (0, 1, 15, 16, 63, 255, 256, 289, 290, 291, 511, 529):
        alone = step(batch.query[position : position + 1], make_batch([decode(position)], 16, tables[:1]))
        assert torch.equal(alone[0], whole[position])


def test_outputs_are_rounded_once(library: CpuLibrary) -> None:
    batch = fill(spec_of((4, 2, 20)), RAGGED, torch.bfloat16, library)
    rounded = attention.attend(batch.query, batch.cache, batch.metadata, batch.spec, library=library)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, attend(batch, library).bfloat16())


def test_the_query_may_be_a_view_of_wider_rows(library: CpuLibrary) -> None:
    batch = fill(spec_of((4, 2, 20)), RAGGED, torch.float32, library)
    tokens = batch.metadata.num_tokens
    wide = torch.randn(tokens, 8, 20)
    wide[:, :4] = batch.query
    assert torch.equal(attend(replace(batch, query=wide[:, :4]), library), attend(batch, library))


def test_levels_agree() -> None:
    """The cache layout is one; only roundings of sums differ."""
    for dtype in DTYPES:
        outputs = []
        for isa in available_isas():
            batch = fill(spec_of((9, 3, 64)), RAGGED, dtype, load(available_isas()[0]))
            outputs.append(attend(batch, load(isa)))
        for other in outputs[1:]:
            torch.testing.assert_close(
                other, outputs[0], rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-3
            )


def test_blocks_beyond_two_gigabytes() -> None:
    """Offsets are 64 bit. Only the touched pages of this cache are ever backed by memory."""
    library = load()
    spec = spec_of((8, 8, 256))
    block_bytes = attention.kv_cache_shape(1, 16, spec)
    num_blocks = 2**31 * 2 // torch.Size(block_bytes).numel() // 2 + 3
    cache = torch.empty(attention.kv_cache_shape(num_blocks, 16, spec), dtype=torch.bfloat16)
    assert cache.numel() * 2 > 2**32
    table = torch.tensor([[num_blocks - 1, num_blocks // 2]], dtype=torch.int32)
    metadata = make_batch([chunk(0, 20)], 16, table)
    key, value = (random(20, 8, 256, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    attention.store(key, value, cache, metadata, spec, library=library)
    batch = Filled(
        spec, [chunk(0, 20)], metadata, cache, [key], [value], random(20, 8, 256, dtype=torch.bfloat16)
    )
    assert (attend(batch, library).double() - dense_attention(batch)).abs().max().item() < 8e-3


def test_the_backend_is_these_kernels(library: CpuLibrary) -> None:
    batch = fill(spec_of((4, 2, 20)), RAGGED, torch.float32, library)
    backend = CpuBackend(library)
    assert backend.name == "cpu"
    assert backend.kv_cache_shape(3, 32, batch.spec) == attention.kv_cache_shape(3, 32, batch.spec)
    assert torch.equal(
        backend.attend(batch.query, batch.cache, batch.metadata, batch.spec), attend(batch, library)
    )


def test_bad_arguments_are_named() -> None:
    batch = fill(spec_of((4, 2, 20)), [decode(3)], torch.float32, load())
    spec, metadata, cache, query = batch.spec, batch.metadata, batch.cache, batch.query
    with pytest.raises(ValueError, match="block_size"):
        attention.kv_cache_shape(4, 24, spec)
    with pytest.raises(ValueError, match=r"spec\.num_heads"):
        attention.kv_cache_shape(4, 16, replace(spec, num_heads=5))
    with pytest.raises(ValueError, match="head_dim"):
        attention.kv_cache_shape(4, 16, replace(spec, head_dim=4096))
    with pytest.raises(ValueError, match="soft_cap"):
        attention.attend(query, cache, metadata, replace(spec, soft_cap=-1.0))
    with pytest.raises(ValueError, match="sliding_window"):
        attention.attend(query, cache, metadata, replace(spec, sliding_window=0))
    with pytest.raises(ValueError, match="query"):
        attention.attend(query[:, :3], cache, metadata, spec)
    with pytest.raises(ValueError, match="query"):
        attention.attend(query.transpose(1, 2).contiguous().transpose(1, 2), cache, metadata, spec)
    with pytest.raises(ValueError, match="kv_cache"):
        attention.attend(query, cache.half(), metadata, spec)
    with pytest.raises(ValueError, match="kv_cache"):
        attention.attend(query, cache[..., :-1], metadata, spec)
    with pytest.raises(ValueError, match="slot_mapping"):
        attention.attend(query, cache, replace(metadata, slot_mapping=metadata.slot_mapping.int()), spec)
    with pytest.raises(ValueError, match="seq_lens"):
        attention.attend(query, cache, replace(metadata, seq_lens=metadata.positions), spec)
    with pytest.raises(ValueError, match="out_dtype"):
        attention.attend(query, cache, metadata, spec, out_dtype=torch.float16)
