"""Layers of steps with many rows: the library's products, and a few kernels of ours between them.

Nothing of a layer's launches depends on the layer but its weights and its KV cache. So the first layer of
each kind is launched from here, and the others as that one was, with tensors of their own (see quick): the
host takes a part of the time, for which a step of some thousand rows of a small model would wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionMetadata, ForwardContext
from octavo.kernels.triton import attention, pointwise, prompt, wide_gate_up
from octavo.kernels.triton.layer import Layer
from octavo.kernels.triton.query_tiles import Attend, narrow_tiling
from octavo.kernels.triton.quick import Recording, call, recorded
from octavo.kernels.triton.rope_store import rope_store
from octavo.kernels.triton.wide_gate_up import WideTiling

MOST_WANTED = 256  # rows that leave the others behind in the last layer; where more are wanted, all go on
# Wanted rows are padded to one of these: the library loads another kernel for another number of rows, and the
# first use of one waits until the device has done all that it was given (0.17 s behind a prompt step of 8B).
WANTED_SIZES = (16, 64, MOST_WANTED)
# Up to so many rows the library's o and down get a bias of zeros: a product with a bias goes to cuBLASLt,
# which cuts their K better (8B, 96 rows: 5.36 ms a step instead of 5.51; from 128 on nothing is gained).
_BIASED_ROWS = 96
# From more rows on, the library's o and down add to the residual stream themselves, so that the norm behind
# them reads half as much and writes half as much (8,192 rows: 0.6B 9.8 us instead of 17.8, 8B 33.8 and 67.6).
_ADDED_ROWS = 512
# Every so many rows, up to a number and beyond it: these have most kernels that the library takes for any.
_LOADED_EVERY, _SMALL, _LOADED_BEYOND = 128, 2048, 256


class _Own(NamedTuple):
    """What one layer's launches take that another's do not; weights turned: [in, out]."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    next_norm: torch.Tensor
    cache: torch.Tensor

    @classmethod
    def of(cls, layer: Layer, next_norm: torch.Tensor, cache: torch.Tensor) -> _Own:
        """`next_norm`: the norm behind this layer."""
        q_norm, k_norm = layer.qk_norms or (None, None)
        return cls(
            layer.qkv.t(), layer.qkv_bias, q_norm, k_norm, layer.o.t(), layer.o_bias, layer.post_norm,
            layer.gate_up.t(), layer.gate_up_bias, layer.down.t(), layer.down_bias, next_norm, cache,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Step:
    """What is the same for all layers of a step."""

    positions: torch.Tensor
    metadata: AttentionMetadata
    attend: Attend
    long: prompt.ChunkPlan | None
    wide: WideTiling | None  # how gate and up are cut, where they have a kernel of their own


class ManyRows:
    """All layers, for steps of more rows than the kernels for few rows take."""

    def __init__(
        self,
        hidden: int,
        final_norm: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
    ) -> None:
        self._final_norm = final_norm
        self._cos, self._sin, self._eps = cos, sin, eps
        self._zeros = final_norm.new_zeros(hidden)
        self._normed = final_norm.new_zeros(wide_gate_up.MAX_ROWS, hidden)  # whole tiles for wide_gate_up

    def run(
        self,
        layers: Sequence[Layer],
        stream: torch.Tensor,  # [num_tokens, hidden]: embedded rows; written
        positions: torch.Tensor,  # [num_tokens] int64
        ctx: ForwardContext,
        attend: Attend,
    ) -> torch.Tensor:
        """Hidden states after the final norm: [num_tokens, hidden], or of the rows that `ctx` wants."""
        metadata = ctx.attention
        long = prompt.plan(metadata) if metadata.long_chunks else None
        wide = wide_gate_up.choose_tiling(layers[0].gate_up, len(stream))
        step = _Step(positions, metadata, attend, long, wide)
        x = pointwise.norm(stream, layers[0].input_norm, self._eps)
        norms = [*(layer.input_norm for layer in layers[1:]), self._final_norm]
        ends = ctx.wanted is not None
        recordings: dict[object, Recording] = {}
        for index, layer in enumerate(layers[:-1] if ends else layers):
            own = _Own.of(layer, norms[index], ctx.kv_caches[index])
            kind = layer.attention, tuple(tensor is None for tensor in own)
            recording = recordings.get(kind)
            if recording is not None:
                recording.repeat(own)
            elif wide is not None:  # its tiles hold on to the weight
                self._layer(layer, own, x, stream, step)
            else:
                with recorded() as recording:
                    self._layer(layer, own, x, stream, step)
                if recording.is_whole:
                    recording.bind(own)
                    recordings[kind] = recording
        if ctx.wanted is None:
            return x
        return self._end(layers[-1], x, stream, ctx.kv_caches[len(layers) - 1], metadata, ctx.wanted)

    def load_products(self, layer: Layer, most: int) -> None:
        """Have the library load its kernels for steps of up to so many rows: no request shall wait for it."""
        small = range(_ADDED_ROWS + _LOADED_EVERY, min(most, _SMALL) + 1, _LOADED_EVERY)
        sizes = [*small, *range(_SMALL + _LOADED_BEYOND, most + 1, _LOADED_BEYOND)]
        if not sizes:
            return
        weights = (layer.qkv, False), (layer.o, True), (layer.gate_up, False), (layer.down, True)
        widest = max(max(weight.shape) for weight, _ in weights)
        # one piece of memory for all: the allocator would keep one for each size
        taken, given = layer.qkv.new_zeros(2, sizes[-1] * widest)
        for rows in sizes:
            for weight, adds in weights:
                width, depth = weight.shape
                x, out = taken[: rows * depth].view(rows, depth), given[: rows * width].view(rows, width)
                if adds:
                    torch.addmm(out, x, weight.t(), out=out)
                else:
                    torch.mm(x, weight.t(), out=out)

    def _layer(self, layer: Layer, own: _Own, x: torch.Tensor, stream: torch.Tensor, step: _Step) -> None:
        """One layer. `x`: the normed stream, and behind it what the next layer takes as such."""
        spec, metadata, rows = layer.attention, step.metadata, len(x)
        qkv = _product(x, own.qkv, own.qkv_bias)
        q = rope_store(
            qkv, layer.qk_norms, self._eps, self._cos, self._sin, step.positions, metadata.slot_mapping,
            own.cache, step.long is not None,
        )  # fmt: skip
        attended = torch.empty_like(q)
        if step.long is not None:
            prompt.attend(q, qkv, own.cache, attended, metadata, spec, step.long)
        step.attend(q, own.cache, attended, metadata, spec)
        attended = attended.flatten(1)
        if step.wide is not None:
            self._residual(attended, own.o, own.o_bias, stream, own.post_norm, self._normed[:rows])
            activated = x.new_empty(rows, len(own.down))
            wide_gate_up.gate_up(
                self._normed[: step.wide.block_m], layer.gate_up, own.gate_up_bias, None, self._eps,
                activated, step.wide,
            )  # fmt: skip
        else:
            self._residual(attended, own.o, own.o_bias, stream, own.post_norm, x)
            activated = pointwise.silu_mul(_product(x, own.gate_up, own.gate_up_bias))
        self._residual(activated, own.down, own.down_bias, stream, own.next_norm, x)

    def _residual(
        self,
        x: torch.Tensor,  # [num_tokens, in]
        weight: torch.Tensor,  # [in, hidden]
        bias: torch.Tensor | None,
        stream: torch.Tensor,  # [num_tokens, hidden], the product is added to it
        norm: torch.Tensor,
        out: torch.Tensor,  # [num_tokens, hidden], written
    ) -> None:
        """A product of the library into the residual stream: the norm behind it."""
        if len(x) > _ADDED_ROWS and bias is None:
            call(torch.addmm, stream, x, weight, out=stream)
            pointwise.norm(stream, norm, self._eps, out=out)
            return
        if len(x) <= _BIASED_ROWS and bias is None:
            bias = self._zeros
        pointwise.norm(_product(x, weight, bias), norm, self._eps, stream, out)

    def _end(
        self,
        layer: Layer,
        x: torch.Tensor,  # [num_tokens, hidden], normed
        stream: torch.Tensor,  # [num_tokens, hidden]
        cache: torch.Tensor,
        metadata: AttentionMetadata,
        wanted: torch.Tensor,  # [L] token rows
    ) -> torch.Tensor:
        """The last layer: keys and values of all rows, and the rest for the wanted ones: [L, hidden]."""
        spec, own = layer.attention, _Own.of(layer, self._final_norm, cache)
        bias = own.qkv_bias
        tables = layer.qk_norms, self._eps, self._cos, self._sin
        queries = spec.num_heads * spec.head_dim
        keys_values = _product(x, own.qkv[:, queries:], None if bias is None else bias[queries:])
        rope_store(keys_values, *tables, metadata.positions, metadata.slot_mapping, cache)
        count = len(wanted)
        if not count:
            return stream[:0]
        metadata = metadata.only(wanted)
        tiling, _ = narrow_tiling(MOST_WANTED, 1, spec, stream.dtype)  # one form for any number
        plan = attention.plan(metadata, spec, tiling, room=MOST_WANTED)
        size = next(size for size in WANTED_SIZES if size >= count)
        padded = F.pad(wanted, (0, size - count))  # with the step's first row
        x, stream = x[padded], stream[padded]
        nowhere = torch.full_like(metadata.slot_mapping, -1)
        q = rope_store(_product(x, own.qkv, bias)[:count], *tables, metadata.positions, nowhere, cache)
        attended = q.new_zeros(size, *q.shape[1:])
        Attend([plan], None, None)(q, cache, attended[:count], metadata, spec)
        self._residual(attended.flatten(1), own.o, own.o_bias, stream, own.post_norm, x)
        activated = pointwise.silu_mul(_product(x, own.gate_up, own.gate_up_bias))
        self._residual(activated, own.down, own.down_bias, stream, own.next_norm, x)
        return x[:count]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight + bias by the library: [num_rows, in] and [in, out] -> [num_rows, out]"""
    out = x.new_empty(len(x), weight.shape[1])
    if bias is None:
        call(torch.mm, x, weight, out=out)
    else:
        call(torch.addmm, bias, x, weight, out=out)
    return out
