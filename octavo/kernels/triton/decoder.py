"""A whole decoder forward on the GPU.

Steps of up to FEW_ROWS rows take five kernels a layer, each a stream of one weight through the
matrix unit with everything that follows it (see products), and attention between them:

    norm scale, qkv, bias, qk-norm, rotary, store  |  attention  |  o + residual
    norm scale, gate and up, SiLU·mul  |  down + residual

Larger ones take the library's products and a few pointwise kernels between them. Gate and up of a large
weight have a kernel of their own from 17 to 128 rows, on both paths (see wide_gate_up). A step of
one row of a small model may run as one kernel instead, if asked for (see persistent). No path asks the host
anything, so all can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionMetadata, AttentionSpec, ForwardContext
from octavo.kernels.triton import attention, persistent, pointwise, products, prompt, shared, wide_gate_up
from octavo.kernels.triton.attention import QueryTiling, Scratch, TilePlan
from octavo.kernels.triton.launch import next_power_of_2
from octavo.kernels.triton.products import SQUARES_WIDTH, Tiling, Workspace

# Requests with at most this many rows are packed into the narrow query tiles, larger ones into the
# wide: by the request alone, so that the rows beside it do not decide how it is computed.
NARROW_ROWS = 16
NARROW = QueryTiling(block_q=16, stages=4, warps=4)
NARROW_DEEP = QueryTiling(block_q=16, stages=6, warps=4)  # one program has a multiprocessor for itself
WIDE = QueryTiling(block_q=128, stages=2, warps=8)
WIDE_HEAD = QueryTiling(block_q=64, stages=1, warps=4)  # heads of more than 128 numbers fill the memory
WIDE_FLOAT32 = QueryTiling(block_q=16, stages=1, warps=4)
FEW_ROWS = 64  # beyond, the library's products are faster; up to MAX_ROWS the rows would stay invariant
# Up to so many rows the library's o and down get a bias of zeros: a product with a bias goes to cuBLASLt,
# which cuts their K better (8B, 96 rows: 5.36 ms a step instead of 5.51; from 128 on nothing is gained).
_BIASED_ROWS = 96
_SHARED_ROWS = 32  # above so many rows there are enough query tiles to fill the card


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, plain: [out, in]."""

    attention: AttentionSpec
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerTilings:
    """How the four products of a layer are cut; the same for all layers."""

    qkv: Tiling
    o: Tiling
    gate_up: Tiling
    down: Tiling


def narrow_tiling(num_rows: int, num_kv_heads: int) -> tuple[QueryTiling, int]:
    """How decode rows are cut in a step of so many rows, and how many programs may share one: as measured.

    Neither changes a bit of the result.
    """
    if num_rows > _SHARED_ROWS:
        return NARROW, 1
    programs = num_kv_heads * max(1, num_rows)
    parts = next_power_of_2(max(1, min(16, 256 // programs)))
    return (NARROW if parts > 4 else NARROW_DEEP), parts


def plans_of(
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    dtype: torch.dtype = torch.bfloat16,
    one_tiling: bool = False,
) -> list[TilePlan]:
    """The launches that attention of a step takes: narrow query tiles, wide ones, or both.

    With `one_tiling` always the narrow ones: slower for chunks, and the same bits however a prompt
    is cut into them.
    """
    narrow, parts = narrow_tiling(metadata.num_tokens, spec.num_kv_heads)
    if dtype == torch.float32 or spec.head_dim > 128:
        narrow = NARROW
    if one_tiling or metadata.num_tokens <= NARROW_ROWS or metadata.max_query_len <= NARROW_ROWS:
        return [attention.plan(metadata, spec, narrow, parts)]
    wide = WIDE if spec.head_dim <= 128 else WIDE_HEAD
    if dtype == torch.float32:
        wide = WIDE_FLOAT32
    plans = []
    if metadata.min_query_len <= NARROW_ROWS:
        plans.append(attention.plan(metadata, spec, narrow, parts, most=NARROW_ROWS))
    if len(metadata.long_chunks) < metadata.num_reqs:
        most = whole = attention.NO_LIMIT
        if any(start for *_, start in metadata.long_chunks):
            most = prompt.LEAST_ROWS - 1
        elif metadata.long_chunks:
            whole = prompt.LEAST_ROWS
        plans.append(attention.plan(metadata, spec, wide, least=NARROW_ROWS + 1, most=most, whole=whole))
    return plans


@dataclass(frozen=True, slots=True)
class _Attend:
    """The launches that attention of one layer takes."""

    plans: list[TilePlan]
    scratch: Scratch | None
    prefixes: shared.SharedScratch | None

    def __call__(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        if self.prefixes is not None:
            shared.attend(q, cache, metadata, spec, self.prefixes)
        for plan in self.plans:
            attention.attend(q, cache, out, metadata, spec, plan, self.scratch, True, self.prefixes)


class FusedDecoder:
    """Every layer of one model. Its buffers serve one stream: forwards must not overlap."""

    def __init__(
        self,
        layers: list[Layer],
        table: torch.Tensor,  # [vocab, hidden]
        final_norm: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        few_rows: int = FEW_ROWS,
        one_tiling: bool = False,
        runs_as_one: bool = False,
    ) -> None:
        """`few_rows`: the most rows that take the five-kernel path; 0 where the model does not fit it.

        `runs_as_one`: steps of one row run as one kernel, where that kernel serves the model.
        """
        self._layers = layers
        self._table = table
        self._final_norm = final_norm
        self._cos, self._sin = cos, sin
        self._eps = eps
        self.few_rows = few_rows if fits(layers, table) else 0
        self._one_tiling = one_tiling
        self._serves_long_chunks = not one_tiling and all(
            prompt.serves(layer.attention, table) for layer in layers
        )
        self._scratch: list[Scratch] = []
        self._prefix_scratch: list[shared.SharedScratch] = []
        self._tilings: dict[int, LayerTilings] = {}
        self._zeros = table.new_zeros(table.shape[1])
        self._normed = table.new_zeros(wide_gate_up.MAX_ROWS, table.shape[1])  # whole tiles for wide_gate_up
        self._persistent: persistent.PersistentDecoder | None = None
        if self.few_rows:
            self._allocate()
            if runs_as_one and persistent.serves(layers):
                programs = persistent.programs_of(table.device)
                self._persistent = persistent.PersistentDecoder(layers, cos, sin, eps, programs)

    def _allocate(self) -> None:
        first, rows, device = self._layers[0], self.few_rows, self._table.device
        hidden, dtype = self._table.shape[1], self._table.dtype
        spec = first.attention

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._stream = empty(rows, hidden)
        self._scaled = empty(rows, hidden).zero_()  # read as whole tiles
        self._squares = empty(rows, hidden // SQUARES_WIDTH, dtype=torch.float32)
        self._q = empty(rows, spec.num_heads, spec.head_dim)
        self._attended = empty(rows, spec.num_heads, spec.head_dim)
        self._activated = empty(rows, first.down.shape[1])
        weights = (first.qkv, first.o, first.gate_up, first.down)
        widest = max(len(weight) for weight in weights)
        self._workspace = Workspace.allocate(16 * hidden * rows + 4 * widest * rows, 4 * widest // 16, device)

    @property
    def spec(self) -> AttentionSpec:
        """The first layer's attention."""
        return self._layers[0].attention

    def tilings(self, num_rows: int) -> LayerTilings:
        """How the products of a step of this size are cut."""
        padded = products.padded_rows(num_rows)
        if padded not in self._tilings:
            first = self._layers[0]

            def choose(kind: str, weight: torch.Tensor) -> Tiling:
                return products.choose_tiling(kind, weight.shape[0], weight.shape[1], padded)

            self._tilings[padded] = LayerTilings(
                choose("qkv", first.qkv), choose("residual", first.o),
                choose("gate_up", first.gate_up), choose("residual", first.down),
            )  # fmt: skip
        return self._tilings[padded]

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        ctx: ForwardContext,
    ) -> torch.Tensor:
        """Hidden states after the final norm: [num_tokens, hidden]."""
        if ctx.attention.long_chunks and not (self._serves_long_chunks and len(input_ids) > self.few_rows):
            ctx = replace(ctx, attention=replace(ctx.attention, long_chunks=()))
        if self._persistent is not None and len(input_ids) == 1 and ctx.attention.shared is None:
            stream = self._stream[:1]
            pointwise.embed(input_ids, self._table, stream)
            self._persistent.run(stream, ctx.kv_caches, ctx.attention)
            return pointwise.norm(stream, self._final_norm, self._eps)
        plans = plans_of(ctx.attention, self._layers[0].attention, self._table.dtype, self._one_tiling)
        scratch, prefixes = self._scratch_for(ctx.attention, plans), self._prefix_scratch_for(ctx.attention)
        attend = _Attend(plans, scratch, prefixes)
        if len(input_ids) <= self.few_rows:
            return self._few(input_ids, positions, ctx, attend)
        return self._many(input_ids, positions, ctx, attend)

    def _few(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        ctx: ForwardContext,
        attend: _Attend,
    ) -> torch.Tensor:
        rows, eps, space = len(input_ids), self._eps, self._workspace
        stream, scaled, squares = self._stream[:rows], self._scaled[:rows], self._squares[:rows]
        q, attended, activated = self._q[:rows], self._attended[:rows], self._activated[:rows]
        cut, wide = self.tilings(rows), wide_gate_up.choose_tiling(self._layers[0].gate_up, rows)
        slots = ctx.attention.slot_mapping
        pointwise.embed(input_ids, self._table, stream, self._layers[0].input_norm, scaled, squares)
        for index, layer in enumerate(self._layers):
            cache = ctx.kv_caches[index]
            products.qkv(
                scaled, layer.qkv, layer.qkv_bias, squares, eps, layer.qk_norms, self._cos, self._sin,
                positions, slots, q, cache, space, cut.qkv,
            )  # fmt: skip
            attend(q, cache, attended, ctx.attention, layer.attention)
            products.residual(
                attended.flatten(1), layer.o, layer.o_bias, stream, layer.post_norm, scaled, squares, space,
                cut.o,
            )  # fmt: skip
            if wide is not None:
                wide_gate_up.gate_up(
                    self._scaled[: wide.block_m], layer.gate_up, layer.gate_up_bias, squares, eps, activated,
                    wide,
                )  # fmt: skip
            else:
                products.gate_up(
                    scaled, layer.gate_up, layer.gate_up_bias, squares, eps, activated, space, cut.gate_up
                )
            products.residual(
                activated, layer.down, layer.down_bias, stream, self._norm_after(index), scaled, squares,
                space, cut.down,
            )  # fmt: skip
        out = torch.empty_like(scaled)
        pointwise.apply_scale(scaled, squares, out, eps)
        return out

    def _many(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        ctx: ForwardContext,
        attend: _Attend,
    ) -> torch.Tensor:
        rows, eps, slots = len(input_ids), self._eps, ctx.attention.slot_mapping
        stream = torch.empty(rows, self._table.shape[1], dtype=self._table.dtype, device=self._table.device)
        wide = wide_gate_up.choose_tiling(self._layers[0].gate_up, rows)
        no_bias = self._zeros if rows <= _BIASED_ROWS else None
        pointwise.embed(input_ids, self._table, stream)
        x = pointwise.norm(stream, self._layers[0].input_norm, eps)
        long = prompt.plan(ctx.attention) if ctx.attention.long_chunks else None
        for index, layer in enumerate(self._layers):
            cache = ctx.kv_caches[index]
            qkv = F.linear(x, layer.qkv, layer.qkv_bias)
            q = pointwise.rope_store(
                qkv, layer.qk_norms, eps, self._cos, self._sin, positions, slots, cache, long is not None
            )
            attended = torch.empty_like(q)
            if long is not None:
                prompt.attend(q, qkv, cache, attended, ctx.attention, layer.attention, long)
            attend(q, cache, attended, ctx.attention, layer.attention)
            x = F.linear(attended.flatten(1), layer.o, no_bias if layer.o_bias is None else layer.o_bias)
            if wide is not None:
                pointwise.norm(x, layer.post_norm, eps, stream, self._normed[:rows])
                x = x.new_empty(rows, layer.down.shape[1])
                wide_gate_up.gate_up(
                    self._normed[: wide.block_m], layer.gate_up, layer.gate_up_bias, None, eps, x, wide
                )
            else:
                x = pointwise.norm(x, layer.post_norm, eps, stream)
                x = pointwise.silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias))
            x = F.linear(x, layer.down, no_bias if layer.down_bias is None else layer.down_bias)
            x = pointwise.norm(x, self._norm_after(index), eps, stream)
        return x

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Forwards in here run one layer of each kind: they launch every kernel, and mean nothing."""
        layers = self._layers
        first = {layer.attention.sliding_window: layer for layer in reversed(layers)}
        self._layers = [layer for layer in layers if first[layer.attention.sliding_window] is layer]
        try:
            yield
        finally:
            self._layers = layers

    def _prefix_scratch_for(self, metadata: AttentionMetadata) -> shared.SharedScratch | None:
        """Room for sums over shared prefixes. Earlier rooms stay: captured graphs point there."""
        if metadata.shared is None:
            return None
        spec = self._layers[0].attention
        places = metadata.num_tokens * spec.num_heads * shared.PARTS
        if not self._prefix_scratch or self._prefix_scratch[-1].stats.numel() < places * 2:
            device = metadata.positions.device
            self._prefix_scratch.append(shared.SharedScratch.allocate(metadata.num_tokens, spec, device))
        return self._prefix_scratch[-1]

    def _norm_after(self, index: int) -> torch.Tensor:
        last = index + 1 == len(self._layers)
        return self._final_norm if last else self._layers[index + 1].input_norm

    def _scratch_for(self, metadata: AttentionMetadata, plans: list[TilePlan]) -> Scratch | None:
        """Room for the sums that programs share. Earlier rooms stay: captured graphs point there."""
        if all(plan.parts == 1 for plan in plans):
            return None
        spec = self._layers[0].attention
        groups = -(-metadata.max_seq_len // attention.GROUP)
        places = _SHARED_ROWS * spec.num_heads * groups
        if not self._scratch or self._scratch[-1].stats.numel() < places * 2:
            tiles = _SHARED_ROWS * 2 + 2
            self._scratch.append(
                Scratch.allocate(_SHARED_ROWS, metadata.max_seq_len, spec, tiles, metadata.positions.device)
            )
        return self._scratch[-1]


def fits(layers: list[Layer], table: torch.Tensor) -> bool:
    """True if the five-kernel path can compute this model."""
    hidden = table.shape[1]
    spec = layers[0].attention
    same = all(
        (layer.attention.num_heads, layer.attention.num_kv_heads, layer.attention.head_dim)
        == (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        for layer in layers
    )
    power = spec.head_dim >= 16 and spec.head_dim == next_power_of_2(spec.head_dim)
    return same and power and hidden % SQUARES_WIDTH == 0 and table.dtype != torch.float16
