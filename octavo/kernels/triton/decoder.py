"""A whole decoder forward on the GPU.

Steps of up to FEW_ROWS rows take five kernels a layer, each a stream of one weight through the
matrix unit with everything that follows it (see products), and attention between them:

    norm scale, qkv, bias, qk-norm, rotary, store  |  attention  |  o + residual
    norm scale, gate and up, SiLU·mul  |  down + residual

Larger ones take the library's products and a few pointwise kernels between them (see many_rows). Gate and up
of a large weight have a kernel of their own from 17 to 128 rows, on both paths (see wide_gate_up). A step of
one row of a small model may run as one kernel instead, if asked for (see persistent). No path asks the host
anything, so all can be captured in a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec, ForwardContext
from octavo.kernels.triton import (
    attention,
    persistent,
    pointwise,
    products,
    prompt,
    query_tiles,
    shared,
    wide_gate_up,
)
from octavo.kernels.triton.attention import Scratch, TilePlan
from octavo.kernels.triton.attention_few import spans_of
from octavo.kernels.triton.launch import next_power_of_2
from octavo.kernels.triton.layer import Layer
from octavo.kernels.triton.many_rows import MOST_WANTED, ManyRows
from octavo.kernels.triton.products import SQUARES_WIDTH, Tiling, Workspace
from octavo.kernels.triton.query_tiles import Attend, plans_of

logger = logging.getLogger("octavo")

FEW_ROWS = 64  # beyond, the library's products are faster; up to MAX_ROWS the rows would stay invariant


@dataclass(frozen=True, slots=True)
class LayerTilings:
    """How the four products of a layer are cut; the same for all layers."""

    qkv: Tiling
    o: Tiling
    gate_up: Tiling
    down: Tiling


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
        self._many = ManyRows(table.shape[1], final_norm, cos, sin, eps)
        self._persistent: persistent.PersistentDecoder | None = None
        if self.few_rows:
            self._allocate()
            if runs_as_one:
                self._persistent = self._as_one()

    def _as_one(self) -> persistent.PersistentDecoder | None:
        """All layers as one kernel, for steps of one row; None, and a line in the log, where it cannot be."""
        programs = persistent.programs_of(self._table.device)
        reason = persistent.why_not(self._layers, programs)
        if reason is not None:
            logger.info("a row of the draft model takes separate kernels, not one for all layers: %s", reason)
            return None
        return persistent.PersistentDecoder(
            self._layers, self._table, self._final_norm, self._cos, self._sin, self._eps, programs
        )

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
    def one_row_context(self) -> int | None:
        """The longest context for which one row is one kernel; None if it never is."""
        return None if self._persistent is None else persistent.LONGEST

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
        """Hidden states after the final norm: [num_tokens, hidden], or of the rows that `ctx` wants."""
        is_plain = len(input_ids) <= self.few_rows or self._one_tiling
        if ctx.wanted is not None and (is_plain or len(ctx.wanted) > MOST_WANTED):
            return self.forward(input_ids, positions, replace(ctx, wanted=None))[ctx.wanted]
        if ctx.attention.long_chunks and not (self._serves_long_chunks and len(input_ids) > self.few_rows):
            ctx = replace(ctx, attention=replace(ctx.attention, long_chunks=()))
        if self._persistent is not None and persistent.takes(ctx.attention):
            try:
                return self._persistent.run(input_ids, ctx.kv_caches, ctx.attention)
            except persistent.Refused as error:
                self._persistent = None
                logger.warning("a row of the draft model takes separate kernels: %s", error)
        plans = plans_of(
            ctx.attention, self._layers[0].attention, self._table.dtype, self._one_tiling,
            ctx.kv_caches[0].shape[3],
        )  # fmt: skip
        scratch, prefixes = self._scratch_for(ctx.attention, plans), self._prefix_scratch_for(ctx.attention)
        attend = Attend(plans, scratch, prefixes)
        if len(input_ids) <= self.few_rows:
            return self._few(input_ids, positions, ctx, attend)
        stream = self._table.new_empty(len(input_ids), self._table.shape[1])
        pointwise.embed(input_ids, self._table, stream)
        return self._many.run(self._layers, stream, positions, ctx, attend)

    def _few(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        ctx: ForwardContext,
        attend: Attend,
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

    def load_products(self, most: int) -> None:
        """Have the library load its kernels for steps of up to so many rows: no request shall wait for it."""
        self._many.load_products(self._layers[0], most)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Forwards in here run one layer of each kind: they launch every kernel, and mean nothing."""
        layers = self._layers
        first = {layer.attention.sliding_window: layer for layer in reversed(layers)}
        self._layers = [layer for layer in layers if first[layer.attention.sliding_window] is layer]
        if self._layers[-1] is not layers[-1]:  # where few rows are wanted, the last layer is another kind
            self._layers.append(layers[-1])
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
        if all(plan.extra == 0 for plan in plans):
            return None
        spec = self._layers[0].attention
        spans = spans_of(metadata.max_seq_len, attention.GROUP)
        places = query_tiles.SHARED_ROWS * spec.num_heads * spans
        if not self._scratch or self._scratch[-1].stats.numel() < places * 2:
            rows, device = query_tiles.SHARED_ROWS, metadata.positions.device
            self._scratch.append(Scratch.allocate(rows, metadata.max_seq_len, spec, device))
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
