"""The fused decoder against a decoder in a few lines of torch, without a cache, in float32.

The steps mix whole prompts, chunks of prompts and single rows of several requests, with padding
rows between them, and block tables in no order. Every row must equal the row of the whole sequence
computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu.attention import kv_cache_shape
from octavo.kernels.cpu.decoder import DecoderLayer, DecoderSpec, FusedDecoder
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads
from octavo.kernels.cpu.linear import PackedLinear, pack, pack_bias, pack_gate_up

EPS = 1e-5
MAX_POSITIONS = 400


@dataclass(frozen=True)
class Shape:
    """What kind of model; the defaults are multiples of nothing."""

    hidden: int = 36
    intermediate: int = 53
    vocab: int = 131
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 10
    rot_dim: int = 10
    layers: int = 2
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = (None, None)
    tied: bool = False
    dtype: torch.dtype = torch.float32


SHAPES = {
    "llama": Shape(),
    "one kv head, head_dim 6": Shape(heads=4, kv_heads=1, head_dim=6, rot_dim=6, tied=True),
    "qwen2": Shape(qkv_bias=True, tied=True),
    "qwen3": Shape(qk_norm=True, head_dim=16, rot_dim=16),
    "every bias": Shape(qkv_bias=True, o_bias=True, mlp_bias=True),
    "windows by layer": Shape(windows=(7, None)),
    "partial rotary": Shape(rot_dim=4),
    "bf16": Shape(dtype=torch.bfloat16, tied=True, qkv_bias=True),
    "bf16, multiples": Shape(64, 128, 160, 4, 2, 32, 32, dtype=torch.bfloat16, qk_norm=True),
}


class Model:
    """Random plain weights, their packed form, and the reference."""

    def __init__(self, shape: Shape, library: CpuLibrary) -> None:
        self.shape = s = shape
        generator = torch.Generator().manual_seed(3)

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return scale * torch.randn(*size, generator=generator)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return random(rows, columns, scale=columns**-0.5).to(s.dtype)

        def norm(size: int) -> torch.Tensor:
            return 1 + random(size, scale=0.1)

        self.embedding = weight(s.vocab, s.hidden) * 4
        self.final_norm = norm(s.hidden)
        angles = torch.outer(torch.arange(MAX_POSITIONS), 0.7 ** torch.arange(s.rot_dim // 2))
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.plain: list[dict[str, torch.Tensor]] = []
        layers: list[DecoderLayer] = []
        qkv_rows = (s.heads + 2 * s.kv_heads) * s.head_dim
        for index in range(s.layers):
            plain = {
                "qkv": weight(qkv_rows, s.hidden),
                "o": weight(s.hidden, s.heads * s.head_dim),
                "gate_up": weight(2 * s.intermediate, s.hidden),
                "down": weight(s.hidden, s.intermediate),
                "input_norm": norm(s.hidden),
                "post_norm": norm(s.hidden),
            }
            if s.qkv_bias:
                plain["qkv_bias"] = random(qkv_rows)
            if s.o_bias:
                plain["o_bias"] = random(s.hidden)
            if s.mlp_bias:
                plain["gate_up_bias"], plain["down_bias"] = random(2 * s.intermediate), random(s.hidden)
            if s.qk_norm:
                plain["q_norm"], plain["k_norm"] = norm(s.head_dim), norm(s.head_dim)
            packed: dict[str, PackedLinear] = {
                name: (pack_gate_up if name == "gate_up" else pack)(plain[name], library)
                for name in ("qkv", "o", "gate_up", "down")
            }
            biases = {
                f"{name}_bias": pack_bias(plain[f"{name}_bias"], packed[name])
                for name in packed
                if f"{name}_bias" in plain
            }
            norms = {name: tensor for name, tensor in plain.items() if name.endswith("norm")}
            spec = AttentionSpec(s.heads, s.kv_heads, s.head_dim, s.head_dim**-0.5, s.windows[index])
            parts: dict[str, Any] = {**packed, **biases, **norms}
            layers.append(DecoderLayer(attention=spec, **parts))
            self.plain.append(plain)
        self.layers = layers
        self.spec = DecoderSpec(s.hidden, s.dtype, EPS)
        table = pack(self.embedding, library) if s.tied else self.embedding
        self.fused = FusedDecoder(self.spec, layers, table, self.final_norm, self.cos, self.sin, library)

    def caches(self, num_blocks: int, block_size: int) -> list[torch.Tensor]:
        """Filled with NaN: what was not stored must not be read."""
        return [
            torch.full(kv_cache_shape(num_blocks, block_size, layer.attention), float("nan")).to(
                self.spec.dtype
            )
            for layer in self.layers
        ]

    def reference(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of one whole sequence, [length, hidden] float32."""
        s, n = self.shape, len(ids)
        x = self.embedding[ids].float()
        for plain, window in zip(self.plain, s.windows, strict=True):
            p = {name: tensor.float() for name, tensor in plain.items()}
            qkv = F.linear(rms(x, p["input_norm"]), p["qkv"], p.get("qkv_bias"))
            q, k, v = torch.split(qkv.view(n, -1, s.head_dim), [s.heads, s.kv_heads, s.kv_heads], dim=1)
            if s.qk_norm:
                q, k = rms(q, p["q_norm"]), rms(k, p["k_norm"])
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) * s.head_dim**-0.5
            distance = torch.arange(n)[:, None] - torch.arange(n)
            hidden = (distance < 0) | (distance >= (window or n))
            attended = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
            x = x + F.linear(attended.reshape(n, -1), p["o"], p.get("o_bias"))
            gate, up = F.linear(rms(x, p["post_norm"]), p["gate_up"], p.get("gate_up_bias")).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, p["down"], p.get("down_bias"))
        return rms(x, self.final_norm)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        n, half = len(x), self.shape.rot_dim // 2
        cos, sin = self.cos[:n, None], self.sin[:n, None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@dataclass
class Sequence:
    """A request: its ids, how many of them are computed, and where its blocks lie."""

    ids: torch.Tensor
    blocks: torch.Tensor  # int32
    computed: int = 0


def run_step(
    model: Model,
    caches: list[torch.Tensor],
    rows: list[tuple[Sequence, int]],
    block_size: int,
    padding: int = 0,
) -> list[torch.Tensor]:
    """Compute the next rows of each sequence; one tensor of hidden states a sequence."""
    ids, positions, slots, starts = [], [], [], [0]
    for sequence, count in rows:
        at = torch.arange(sequence.computed, sequence.computed + count)
        ids.append(sequence.ids[at])
        positions.append(at)
        slots.append(sequence.blocks[at // block_size].long() * block_size + at % block_size)
        sequence.computed += count
        starts.append(starts[-1] + count)
    if padding:
        ids.append(torch.full((padding,), -5))  # never looked at
        positions.append(torch.full((padding,), -1))
        slots.append(torch.full((padding,), -1))
    lengths = torch.tensor([sequence.computed for sequence, _ in rows], dtype=torch.int32)
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=lengths,
        block_table=torch.stack([sequence.blocks for sequence, _ in rows]),
        slot_mapping=torch.cat(slots),
        positions=torch.cat(positions),
        num_reqs=len(rows),
        num_tokens=starts[-1] + padding,
        max_query_len=max(count for _, count in rows),
        max_seq_len=int(lengths.max()),
    )
    hidden = model.fused.forward(torch.cat(ids), metadata.positions, metadata, caches)
    assert hidden.shape == (metadata.num_tokens, model.shape.hidden)
    assert hidden.dtype == model.shape.dtype
    return list(torch.split(hidden[: starts[-1]], [count for _, count in rows]))


def sequences(model: Model, lengths: list[int], block_size: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(5)
    blocks = -(-max(lengths) // block_size)
    order = torch.randperm(blocks * len(lengths), generator=generator, dtype=torch.int32)
    return [
        Sequence(
            torch.randint(model.shape.vocab, (length,), generator=generator),
            order[i * blocks : (i + 1) * blocks],
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_of_mixed_steps_equal_the_whole_sequence(
    library: CpuLibrary, shape: Shape, threads: int
) -> None:
    model = Model(shape, library)
    block_size = 16
    first, second, third = sequences(model, [41, 23, 6], block_size)
    caches = model.caches(9, block_size)
    got: dict[int, list[torch.Tensor]] = {id(first): [], id(second): [], id(third): []}
    set_num_threads(threads)
    try:
        for step in (
            [(first, 17)],
            [(first, 1), (second, 20)],
            [(third, 6), (first, 3), (second, 1)],
            [(first, 20), (second, 2)],
        ):
            for (sequence, _), hidden in zip(step, run_step(model, caches, step, block_size, 2), strict=True):
                got[id(sequence)].append(hidden)
    finally:
        set_num_threads(1)
    for sequence in (first, second, third):
        expected = model.reference(sequence.ids)
        actual = torch.cat(got[id(sequence)]).float()
        scale = expected.abs().max().item()
        error = (actual - expected).abs().max().item() / scale
        assert error < (3e-2 if shape.dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_chunks_and_neighbours_change_no_bit(library: CpuLibrary, name: str) -> None:
    """More rows than one internal chunk holds, against the same rows in other company."""
    model = Model(SHAPES[name], library)
    block_size = 32
    alone, again, other = sequences(model, [300, 300, 40], block_size)
    again.ids = alone.ids
    caches = model.caches(30, block_size)
    whole = run_step(model, caches, [(alone, 300)], block_size)[0]
    pieces = [run_step(model, caches, [(again, 1)], block_size)[0]]
    pieces.append(run_step(model, caches, [(other, 40), (again, 289)], block_size, 3)[1])
    pieces += [run_step(model, caches, [(again, count)], block_size)[0] for count in (7, 3)]
    assert torch.equal(torch.cat(pieces), whole)


def test_fetching_the_next_layers_cache_changes_no_bit(library: CpuLibrary) -> None:
    """From 24 rows on, products fetch the KV cache of the next layer: of long contexts, of a prefix
    that requests share, of a request that has no context yet, and in more pieces than one list holds."""
    model = Model(SHAPES["bf16"], library)
    block_size = 16
    many = sequences(model, [80] * 30, block_size)
    for sequence in many[1:20]:  # blocks of the first request, as prefix caching would give them
        sequence.ids[:64], sequence.blocks[:4] = many[0].ids[:64], many[0].blocks[:4]
        sequence.computed = 64
    caches = model.caches(30 * 5, block_size)
    run_step(model, caches, [(many[0], 64)], block_size)
    run_step(model, caches, [(sequence, 64) for sequence in many[20:29]], block_size)
    kept = [cache.clone() for cache in caches]
    step = [(sequence, 1) for sequence in many[:29]] + [(many[29], 30)]
    together = run_step(model, caches, step, block_size, 2)
    for (sequence, count), expected in zip(step, together, strict=True):
        sequence.computed -= count
        alone = run_step(model, kept, [(sequence, count)], block_size)[0]
        assert torch.equal(alone, expected)


def test_two_decoders_at_once_from_two_threads() -> None:
    """The pool serves one loop at a time; results must not mix."""
    from concurrent.futures import ThreadPoolExecutor

    models = [Model(SHAPES["llama"], load()), Model(SHAPES["bf16"], load())]
    set_num_threads(2)
    try:

        def run(model: Model) -> list[torch.Tensor]:
            results = []
            for _ in range(20):
                (sequence,) = sequences(model, [70], 16)
                results.append(run_step(model, model.caches(5, 16), [(sequence, 70)], 16)[0])
            return results

        expected = [run(model)[0] for model in models]
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(run, models))
    finally:
        set_num_threads(1)
    for results, right in zip(together, expected, strict=True):
        assert all(torch.equal(result, right) for result in results)


def test_wrong_input_is_refused_before_anything_is_stored() -> None:
    model = Model(SHAPES["llama"], load())
    caches = model.caches(3, 16)
    (sequence,) = sequences(model, [20], 16)
    sequence.ids[3] = model.shape.vocab
    with pytest.raises(ValueError, match=r"input_ids must be in 0 \.\. 130"):
        run_step(model, caches, [(sequence, 20)], 16)
    assert bool(caches[0].isnan().all())
    (sequence,) = sequences(model, [20], 16)
    with pytest.raises(ValueError, match="one a layer"):
        run_step(model, caches[:1], [(sequence, 20)], 16)
    sequence.computed = 0
    with pytest.raises(ValueError, match=r"kv_caches\[1\]"):
        run_step(model, [caches[0], caches[1].bfloat16()], [(sequence, 20)], 16)
    sequence.computed = MAX_POSITIONS
    sequence.ids = torch.zeros(MAX_POSITIONS + 1, dtype=torch.int64)
    sequence.blocks = torch.zeros(30, dtype=torch.int32)
    with pytest.raises(ValueError, match="positions must be below 400"):
        run_step(model, caches, [(sequence, 1)], 16)


def test_parts_that_do_not_fit_are_named() -> None:
    model = Model(SHAPES["qwen3"], load())
    layer = model.layers[0]
    wrong = {
        "qkv": replace(layer, qkv=layer.o),
        "gate_up must come": replace(layer, gate_up=pack(torch.randn(106, 36))),
        "down": replace(layer, down=pack(torch.randn(36, 54))),
        "q_norm": replace(layer, q_norm=torch.ones(15)),
        "input_norm must be torch.float32": replace(layer, input_norm=torch.ones(36).bfloat16()),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=rf"layers\[1\]\.{message}"):
            FusedDecoder(
                model.spec, [layer, bad], model.embedding, model.final_norm, model.cos, model.sin, load()
            )
