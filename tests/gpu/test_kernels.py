"""Kernels on the card that no model test reaches at real sizes: steps, lookups, draws, far offsets."""

from __future__ import annotations

import random

import pytest
import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.attention.torch_backend import TorchBackend
from octavo.kernels import triton as triton_kernels
from octavo.speculation.lookup import PythonLookup
from octavo.speculation.proposer import Proposer
from octavo.worker.cuda_graph import StepBuffers
from octavo.worker.graph_sizes import GraphSizes
from octavo.worker.input_batch import DeviceState
from tests.gpu_report import Record, kind_of
from tests.kernels import random_rules
from tests.kernels.random_life import SLOTS, compare
from tests.speculation.test_lookup import slot

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import attention, filters, products, wide_gate_up  # noqa: E402
from octavo.kernels.triton.attention import QueryTiling, Scratch  # noqa: E402
from octavo.kernels.triton.products import Workspace  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.sampler import TorchDraw, kept_tokens  # noqa: E402
from octavo.speculation.gpu_lookup import GpuLookup  # noqa: E402
from octavo.worker.gpu_step import GpuStep, slot_tables  # noqa: E402

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("graphs", [False, True])
def test_steps_as_plain_torch(graphs: bool) -> None:
    def make(state: DeviceState) -> GpuStep:
        if not graphs:
            return GpuStep(state)
        buffers = StepBuffers.allocate(4000, SLOTS, state.block_table)
        return GpuStep(state, buffers, GraphSizes.of([8, 64, 512]))

    assert sum(compare(make, DEVICE, seed, 60) for seed in range(4)) > 300


def test_rules_as_on_the_host() -> None:
    assert sum(random_rules.compare(DEVICE, number) for number in range(40)) > 200


@pytest.mark.parametrize("prompt", [True, False])
def test_lookups_propose_the_same(prompt: bool) -> None:
    rng = random.Random(3)
    states = [DeviceState(4, 40_000, 16, torch.device("cpu")), DeviceState(4, 40_000, 16, DEVICE)]
    proposers: list[Proposer] = [
        PythonLookup(states[0], prompt=prompt),
        GpuLookup(slot_tables(states[1]), prompt=prompt),
    ]
    total = 0
    for index in range(4):
        text = [rng.randrange(30) for _ in range([5, 300, 3_000, 20_000][index])]
        new = slot(index, text, [rng.randrange(4) for _ in range([0, 0, 700, 0][index])], 40_000)
        for state, proposer in zip(states, proposers, strict=True):
            state.put(new)
            proposer.enter(new)
    for _ in range(30):
        chosen = rng.sample(range(4), rng.randint(1, 4))
        counts = [rng.randint(0, 6) for _ in chosen]
        for proposer in proposers:
            proposer.propose(chosen, counts)
        assert states[0].num_drafts[chosen].tolist() == states[1].num_drafts[chosen].tolist()
        for index in chosen:
            known, count = int(states[0].num_tokens[index]), int(states[0].num_drafts[index])
            drafts = [state.tokens[index, known : known + count].tolist() for state in states]
            assert drafts[0] == drafts[1]
            total += count
            came = [*drafts[0][: rng.randint(0, count)], rng.randrange(4)]
            for state in states:
                state.tokens[index, known : known + len(came)] = torch.tensor(came, dtype=torch.int32)
                state.num_tokens[index] += len(came)
    assert total > 20


@pytest.mark.parametrize("kind", ["wide", "flat", "peaked", "ties"])
@pytest.mark.parametrize("rows", [1, 40])
def test_kept_sets(kind: str, rows: int) -> None:
    vocab = 151_936
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator)
    if kind == "wide":
        logits *= 4
    elif kind == "peaked":
        logits[:, 1000] += 30
    elif kind == "ties":
        logits = (logits * 3).round()
    temperature = torch.tensor([0.6, 1.0, 1.5, 0.9, 1.0] * 8)[:rows]
    top_k = torch.tensor([0, 50, 20, 5_000, 1, 100_000, 50, 0] * 5, dtype=torch.int32)[:rows]
    top_p = torch.tensor([0.9, 1.0, 0.95, 0.8, 0.5] * 8)[:rows]
    columns = [logits, temperature, top_k, top_p]
    order, limit, best = (part.cpu() for part in filters.thresholds(*(part.to(DEVICE) for part in columns)))
    assert torch.equal(best, logits.amax(1))
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32)
    orders = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(vocab)
    for row in range(rows):
        keeps = (orders[row] > order[row]) | ((orders[row] == order[row]) & (ids < limit[row]))
        ours = int(keeps.sum())
        theirs = kept_tokens(logits[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), 0.0)
        assert abs(ours - len(theirs)) <= 1 + len(theirs) // 10_000, (row, ours, len(theirs))
        if ours == len(theirs):
            assert torch.equal(keeps.nonzero()[:, 0], theirs)
        if top_p[row] == 1.0:
            assert ours == len(theirs)
    again = [part.cpu() for part in filters.thresholds(*(part[-1:].to(DEVICE) for part in columns))]
    assert again[0] == order[-1]  # alone or in a batch
    assert again[1] == limit[-1]


@pytest.mark.parametrize("num_top", [0, 20])
def test_logprobs(num_top: int, record: Record) -> None:
    logits = torch.randn(9, 151_936, generator=torch.Generator().manual_seed(1)) * 5
    logits[3] = logits[3].round()
    tokens = torch.arange(9) * 7
    tokens[4] = -1
    for ours, theirs in zip(
        GpuDraw().logprobs(logits.to(DEVICE), tokens.to(DEVICE), num_top),
        TorchDraw().logprobs(logits.double(), tokens, num_top),
        strict=True,
    ):
        if ours.is_floating_point() and ours.numel():
            finite = theirs.isfinite()
            record("log-probabilities, absolute", float((ours.cpu() - theirs)[finite].abs().max()))
        torch.testing.assert_close(ours.cpu(), theirs, atol=5e-6, rtol=5e-6, check_dtype=False)


def attention_case(
    spec: AttentionSpec, contexts: list[int], rows: list[int], num_blocks: int, first_block: int
) -> tuple[AttentionMetadata, int]:
    """Requests of these contexts whose last rows are computed; blocks from first_block on, scattered."""
    block_size = 16
    needed = [-(-context // block_size) for context in contexts]
    ids = torch.randperm(num_blocks - first_block)[: sum(needed)].to(torch.int32) + first_block
    table = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    start = 0
    for index, count in enumerate(needed):
        table[index, :count] = ids[start : start + count]
        start += count
    positions = torch.cat([torch.arange(c - n, c) for c, n in zip(contexts, rows, strict=True)])
    request = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    mapping = table[request, positions // block_size].long() * block_size + positions % block_size
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(rows).cumsum(0)
    total = sum(rows)
    return AttentionMetadata(
        starts, torch.tensor(contexts, dtype=torch.int32), table, mapping, positions, len(rows), total,
        max(rows), max(needed) * block_size,
    ), total  # fmt: skip


def on_device(meta: AttentionMetadata) -> AttentionMetadata:
    return AttentionMetadata(
        meta.query_start_loc.to(DEVICE), meta.seq_lens.to(DEVICE), meta.block_table.to(DEVICE),
        meta.slot_mapping.to(DEVICE), meta.positions.to(DEVICE), meta.num_reqs, meta.num_tokens,
        meta.max_query_len, meta.max_seq_len,
    )  # fmt: skip


SPECS = {
    "8B": AttentionSpec(32, 8, 128, 128**-0.5),
    "soft cap": AttentionSpec(16, 8, 128, 0.09, soft_cap=50.0),
    "head 256, window": AttentionSpec(16, 8, 256, 256**-0.5, sliding_window=1024),
    "head 64": AttentionSpec(14, 2, 64, 0.125),
    "head 96": AttentionSpec(12, 4, 96, 0.1),
}


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_over_long_contexts(name: str, dtype: torch.dtype, record: Record) -> None:
    spec = SPECS[name]
    torch.manual_seed(7)
    backend, oracle = TritonBackend(), TorchBackend()
    for contexts, rows in (
        ([5000], [1]),  # decode, shared by several programs
        ([900, 4000, 17, 2500], [1, 6, 3, 1]),  # decode and verify
        ([1200, 3000, 40], [700, 1, 33]),  # chunks beside a decode
        ([1000] * 40, [1] * 40),
    ):
        num_blocks = sum(-(-context // 16) for context in contexts) + 5
        meta, total = attention_case(spec, contexts, rows, num_blocks, 0)
        shape = (num_blocks, 2, spec.num_kv_heads, 16, spec.head_dim)
        cache = torch.randn(shape, device=DEVICE).to(dtype)
        query = torch.randn(total, spec.num_heads, spec.head_dim, device=DEVICE).to(dtype) * 2
        meta = on_device(meta)
        expected = oracle.attend(query.float(), cache.float().transpose(2, 3), meta, spec)
        got = backend.attend(query, cache, meta, spec)
        error = float((got.float() - expected).norm() / expected.norm())
        record(f"attention, {kind_of(dtype)}", error)
        assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3), (contexts, error)


@pytest.mark.parametrize("contexts", [[900, 17], [300, 40]])
def test_attention_of_wide_heads_in_float32(contexts: list[int], record: Record) -> None:
    """The largest tiles there are: they have to fit into a multiprocessor's memory."""
    spec = AttentionSpec(8, 4, 256, 256**-0.5)
    meta, total = attention_case(spec, contexts, [1, 17], 80, 0)
    cache = torch.randn(80, 2, 4, 16, 256, device=DEVICE)
    query, meta = torch.randn(total, 8, 256, device=DEVICE), on_device(meta)
    expected = TorchBackend().attend(query, cache.transpose(2, 3), meta, spec)
    got = TritonBackend().attend(query, cache, meta, spec)
    error = float((got - expected).norm() / expected.norm())
    record("attention, float32", error)
    assert error < 1e-4


@pytest.mark.parametrize(("heads", "dim"), [((16, 8), 128), ((32, 8), 128), ((14, 2), 64)])
def test_attention_of_few_rows_has_one_result_however_it_is_cut(heads: tuple[int, int], dim: int) -> None:
    """Columns of a tile, programs that share it, buffers, reading before the wait: no bit moves."""
    spec = AttentionSpec(*heads, dim, dim**-0.5)
    torch.manual_seed(3)
    contexts, rows = [5000, 640, 17, 2049, 130], [1, 6, 3, 2, 1]
    meta, total = attention_case(spec, contexts, rows, 600, 0)
    meta = on_device(meta)
    cache = torch.randn(600, 2, spec.num_kv_heads, 16, dim, device=DEVICE).bfloat16()
    query = torch.randn(total, spec.num_heads, dim, device=DEVICE).bfloat16()
    expected = None
    for block_q, stages, extra, registers in (
        (8, 4, 0, None), (8, 2, 0, 128), (8, 2, 16, 128), (8, 5, 60, None), (8, 4, 7, None), (16, 3, 0, None),
        (32, 3, 20, None), (32, 4, 0, None),
    ):  # fmt: skip
        plan = attention.plan(meta, spec, QueryTiling(block_q, stages, 4, registers), extra, block_size=16)
        scratch = Scratch.allocate(total, meta.max_seq_len, spec, query.device)
        for early in (False, True):
            out = torch.full_like(query, float("nan"))  # a launch between the plan and the kernel
            attention.attend(query, cache, out, meta, spec, plan, scratch, early)
            expected = out if expected is None else expected
            assert torch.equal(out, expected), (block_q, stages, extra, early)


def test_blocks_beyond_two_to_the_31(record: Record) -> None:
    spec = AttentionSpec(8, 4, 128, 0.1)
    num_blocks = 2**31 // (2 * 4 * 16 * 128) + 4_000  # offsets in numbers exceed 32 bits
    cache = torch.zeros(num_blocks, 2, 4, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    backend, oracle = TritonBackend(), TorchBackend()
    contexts, rows = [700, 90], [1, 40]
    first = num_blocks - 3_000
    meta, total = attention_case(spec, contexts, rows, num_blocks, first)
    meta = on_device(meta)
    cache[first:] = torch.randn(cache[first:].shape, device=DEVICE).to(torch.bfloat16)
    key, value, query = (torch.randn(total, heads, 128, device=DEVICE).bfloat16() for heads in (4, 4, 8))
    backend.store(key, value, cache, meta, spec)
    slots = meta.slot_mapping
    assert torch.equal(cache[slots // 16, 0, :, slots % 16], key)
    assert torch.equal(cache[slots // 16, 1, :, slots % 16], value)
    got = backend.attend(query, cache, meta, spec)
    low = meta.block_table - first  # the same blocks, near the start
    near = AttentionMetadata(
        meta.query_start_loc, meta.seq_lens, low, meta.slot_mapping, meta.positions, meta.num_reqs,
        meta.num_tokens, meta.max_query_len, meta.max_seq_len,
    )  # fmt: skip
    expected = oracle.attend(query.float(), cache[first:].float().transpose(2, 3), near, spec)
    error = float((got.float() - expected).norm() / expected.norm())
    record("attention, bfloat16", error)
    assert error < 6e-3
    assert torch.equal(got, backend.attend(query, cache[first:].clone(), near, spec))


@pytest.mark.parametrize("bias", [False, True])
def test_wide_gate_up_has_the_bits_of_one_row_alone(bias: bool, record: Record) -> None:
    n, k = 12_288, 4_096  # those of a model whose gate and up are cut so
    generator = torch.Generator(DEVICE).manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(torch.bfloat16)

    x, weight, b = draw(128, k), draw(2 * n, k) / 64, draw(2 * n) if bias else None
    squares = torch.rand(128, k // 64, generator=generator, device=DEVICE) * 64
    space = Workspace.allocate(2 * n * 128, 2 * n // 16, DEVICE)
    alone = torch.empty(128, n, dtype=torch.bfloat16, device=DEVICE)
    for row in range(0, 128, 5):
        one = slice(row, row + 1)
        products.gate_up(x[one], weight, b, squares[one], 1e-6, alone[one], space)
    scaled = x.float() * torch.rsqrt(squares.sum(1, keepdim=True) / k + 1e-6)
    product = torch.nn.functional.linear(scaled, weight.float(), None if b is None else b.float())
    gate, up = product.chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    served = 0
    for rows in (17, 40, 64, 65, 100, 128):
        tiling = wide_gate_up.choose_tiling(weight, rows)
        if tiling is None:
            continue
        served += 1
        for given in (rows, tiling.block_m):  # rows that end within a tile, and a whole tile
            out = torch.full((rows, n), float("nan"), dtype=torch.bfloat16, device=DEVICE)
            wide_gate_up.gate_up(x[:given], weight, b, squares[:rows], 1e-6, out, tiling)
            wrong = (out.float() - expected[:rows]).norm() / expected[:rows].norm()
            record("gate and up, SiLU, product, bfloat16", float(wrong))
            torch.testing.assert_close(out.float(), expected[:rows], atol=0.05, rtol=0.02)
            assert torch.equal(out[0:rows:5], alone[0:rows:5]), rows
    assert served >= 3 or torch.cuda.get_device_capability()[0] < 9
