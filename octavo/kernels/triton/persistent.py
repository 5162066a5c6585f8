"""All layers of a small model in one kernel, for steps of one row.

A decode step of a small model is bound by launches that wait for one another: five kernels a layer, each of
at least two microseconds, around weights that take less. Here one program for each multiprocessor stays
for the whole step. They go through the phases of the layers together and wait for one another between two
of them (persistent_sync). Whatever does not depend on the step's row comes before a wait: a program's
weights, keys and values are in its registers by then.

So that there is but one wait between two phases, nothing is shared below a phase: a program computes whole
rows of a weight (persistent_products), norms are computed by whoever reads the stream, qk-norm and rotary
by whoever attends. Only the parts of a context are added up by the program that arrives last.

The products multiply and add; the matrix unit has no share in them. So the last bits of a row differ from
those of the separate kernels: this is for a draft model, whose bits change no text.

Programs of a launch wait for one another, so all must be on the device at once. The launch is a cooperative
one: the driver either places all programs together, beside whatever else runs, or refuses the launch, which
then is `Refused` and the separate kernels' business. Each decoder counts in memory of its own, so several may
run beside one another; launches of one decoder must not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from octavo.attention.backend import AttentionMetadata
from octavo.kernels.triton import pointwise
from octavo.kernels.triton.attention import LOG2_E
from octavo.kernels.triton.launch import dot_precision, next_power_of_2
from octavo.kernels.triton.layer import Layer
from octavo.kernels.triton.persistent_kernel import COLUMNS, PHASES, decoder_kernel
from octavo.kernels.triton.persistent_products import CHUNK, UNIT

WARPS = 8
TOKENS = 64  # whose keys and values a program holds
MOST_PARTS = 16
LONGEST = 4096  # tokens of a context: beyond, a kernel that is made for attention alone reads them faster
MOST_SHARED = 16  # queries of a KV head
MOST_LAYER_BYTES = 64 << 20  # of weights: above, waits are small beside reading them
LEAST_PROGRAMS = 64  # with fewer, a program holds too small a part of a layer
_WEIGHT_REGISTERS = 100  # of a thread, at most: those of the units whose weights a program holds


class Refused(RuntimeError):
    """The device cannot hold all programs of the kernel at once."""


class PersistentDecoder:
    """The layers of one model as one kernel. Its launches must not overlap."""

    def __init__(
        self,
        layers: Sequence[Layer],
        embedding: torch.Tensor,  # [vocab, hidden]
        final_norm: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        programs: int,
    ) -> None:
        """`why_not(layers, ...)` must be None. `programs`: see programs_of."""
        self._layers = list(layers)
        self._embedding, self._final_norm = embedding, final_norm
        self._cos, self._sin, self._eps = cos, sin, eps
        self._programs = programs
        first, device = self._layers[0], cos.device
        spec = first.attention
        self._parts = max(2, min(MOST_PARTS, next_power_of_2(programs // spec.num_kv_heads + 1) // 2))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._stream = empty(1, first.o.shape[0], dtype=first.o.dtype)
        self._raw = empty(len(first.qkv))
        self._attended = empty(first.o.shape[1], dtype=first.o.dtype)
        self._activated = empty(first.down.shape[1], dtype=first.o.dtype)
        self._sums = empty(spec.num_heads, self._parts, spec.head_dim)
        self._stats = empty(spec.num_heads, self._parts, 2)
        self._counters = torch.zeros(spec.num_kv_heads, dtype=torch.int32, device=device)
        self._done = torch.zeros(len(self._layers) * PHASES + 1, dtype=torch.int32, device=device)
        self._tables: dict[tuple[int, ...], torch.Tensor] = {}

    def _table(self, caches: Sequence[torch.Tensor]) -> torch.Tensor:
        """[layers, COLUMNS] int64: how far each layer's tensors lie behind the first layer's."""
        key = tuple(cache.data_ptr() for cache in caches)
        if key not in self._tables:
            rows = [
                (
                    layer.qkv, layer.qkv_bias, *(layer.qk_norms or (None, None)), layer.o, layer.o_bias,
                    layer.post_norm, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias,
                    layer.input_norm, cache,
                )
                for layer, cache in zip(self._layers, caches, strict=True)
            ]  # fmt: skip
            offsets = torch.zeros(len(rows), COLUMNS, dtype=torch.int64)
            for index, row in enumerate(rows):
                for column, (tensor, first) in enumerate(zip(row, rows[0], strict=True)):
                    if tensor is not None and first is not None:
                        apart = tensor.data_ptr() - first.data_ptr()
                        offsets[index, column] = apart // tensor.element_size()
            if offsets.remainder(16).any():
                raise ValueError("the layers' tensors must lie multiples of 16 numbers apart")
            self._tables[key] = offsets.to(self._done.device)
        return self._tables[key]

    def _batch(self, rows: int, k: int, matrices: int = 1) -> int:
        """Units of a weight of so many rows whose weights a program holds at a time."""
        chunks = -(-k // CHUNK) * matrices
        registers = chunks * UNIT * CHUNK * self._layers[0].o.element_size() // (4 * 32 * WARPS)
        return min(-(-rows // (UNIT * self._programs)), max(1, _WEIGHT_REGISTERS // registers))

    def run(
        self,
        input_ids: torch.Tensor,  # [1] int64
        caches: Sequence[torch.Tensor],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states after the final norm: [1, hidden]. Raises Refused."""
        if len(input_ids) != 1 or metadata.num_tokens != 1 or metadata.shared is not None:
            raise ValueError("this kernel is for steps of one row, which share nothing")
        first, cache = self._layers[0], caches[0]
        spec, hidden, width = first.attention, first.o.shape[0], first.down.shape[1]
        _, _, kv_heads, block_size, head_dim = cache.shape
        q_norm, k_norm = first.qk_norms or (first.qkv, first.qkv)

        def bias(tensor: torch.Tensor | None) -> torch.Tensor:
            return first.qkv if tensor is None else tensor

        options: dict[str, Any] = {"launch_cooperative_grid": True} if cache.is_cuda else {}
        has_cap = spec.soft_cap is not None
        pointwise.embed(input_ids, self._embedding, self._stream)
        try:
            decoder_kernel[(self._programs,)](
                self._table(caches), first.input_norm, first.qkv, bias(first.qkv_bias), q_norm, k_norm,
                first.o, bias(first.o_bias), first.post_norm, first.gate_up, bias(first.gate_up_bias),
                first.down, bias(first.down_bias), cache, self._cos, self._sin, metadata.positions,
                metadata.slot_mapping, metadata.block_table, metadata.table_rows, self._stream, self._raw,
                self._attended, self._activated, self._sums, self._stats, self._counters, self._done,
                len(self._layers),
                metadata.block_table.stride(0), spec.sliding_window or 0,
                spec.scale * (1.0 if has_cap else LOG2_E), spec.soft_cap or 1.0, self._eps,
                HIDDEN=hidden, WIDTH=width, HEADS=spec.num_heads, KV_HEADS=kv_heads, D=head_dim,
                HALF_ROTARY=self._cos.shape[1], BLOCK_SIZE=block_size, NORM=first.qk_norms is not None,
                QKV_BIAS=first.qkv_bias is not None, O_BIAS=first.o_bias is not None,
                GATE_UP_BIAS=first.gate_up_bias is not None, DOWN_BIAS=first.down_bias is not None,
                CHUNK=CHUNK, UNIT=UNIT,
                QKV_BATCH=self._batch(len(first.qkv), hidden), O_BATCH=self._batch(hidden, first.o.shape[1]),
                GATE_UP_BATCH=self._batch(width, hidden, 2), DOWN_BATCH=self._batch(hidden, width),
                TOKENS=TOKENS, PARTS=self._parts, HAS_CAP=has_cap, HAS_WINDOW=spec.sliding_window is not None,
                PRECISION=dot_precision(cache.dtype), PROGRAMS=self._programs,
                COUNTERS=next_power_of_2(len(self._layers) * PHASES), SPINS=cache.is_cuda,
                num_warps=WARPS, num_stages=1, **options,
            )  # fmt: skip
        except RuntimeError as error:
            if "cooperative" not in str(error):
                raise
            raise Refused(f"{self._programs} programs do not fit the device at once: {error}") from error
        return pointwise.norm(self._stream, self._final_norm, self._eps)


def takes(metadata: AttentionMetadata) -> bool:
    """True for the steps that the kernel is made for: one row of a context that is not too long."""
    return metadata.num_tokens == 1 and metadata.shared is None and metadata.max_seq_len <= LONGEST


def programs_of(device: torch.device) -> int:
    """Programs of a launch: one for each multiprocessor; one where programs run one after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def why_not(layers: Sequence[Layer], programs: int) -> str | None:
    """Why the kernel does not compute these layers; None if it does."""
    first = layers[0]

    def shape(layer: Layer) -> tuple[Any, ...]:
        biases = layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias
        return (
            layer.attention, layer.qkv.shape, layer.o.shape, layer.gate_up.shape, layer.down.shape,
            layer.qk_norms is None, *(bias is None for bias in biases),
        )  # fmt: skip

    spec, hidden, width = first.attention, first.o.shape[0], first.down.shape[1]
    numbers = sum(weight.numel() for weight in (first.qkv, first.o, first.gate_up, first.down))
    size = numbers * first.o.element_size()
    if any(shape(layer) != shape(first) for layer in layers):
        return "its layers differ from one another"
    if size > MOST_LAYER_BYTES:
        return f"a layer's weights take {size >> 20} MiB, and {MOST_LAYER_BYTES >> 20} at most pay"
    if first.o.is_cuda and first.o.dtype != torch.bfloat16:
        return f"it is made for bfloat16, not {str(first.o.dtype).removeprefix('torch.')}"
    if first.o.is_cuda and programs < LEAST_PROGRAMS:
        return f"it needs {LEAST_PROGRAMS} multiprocessors, and this GPU has {programs}"
    if not 16 <= spec.head_dim <= 128 or spec.head_dim != next_power_of_2(spec.head_dim):
        return f"it is not made for heads of {spec.head_dim} numbers"
    if spec.num_heads // spec.num_kv_heads > MOST_SHARED:
        return f"more than {MOST_SHARED} queries share a KV head"
    if hidden % UNIT or width % UNIT:
        return f"{hidden} and {width} are not multiples of {UNIT}"
    return None
