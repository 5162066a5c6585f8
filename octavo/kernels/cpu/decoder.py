"""A whole decoder in one C call.

`FusedDecoder` collects the pointers of packed weights, norms and rotary tables once; `forward` then
runs every layer for the rows of a step without returning to Python between operations, and without
the GIL. The residual stream is float32; what enters a product has the model's dtype.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu import attention as cpu_attention
from octavo.kernels.cpu._checks import check, dtype_number
from octavo.kernels.cpu.library import AttnSpec, CpuLibrary, Step, load
from octavo.kernels.cpu.linear import Packed, PackedLinear

_NO_MEMORY, _BAD_ID, _BAD_ROW = 1, 2, 3


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What all layers share."""

    hidden_size: int
    dtype: torch.dtype  # of the weights and of the hidden states that come out
    rms_norm_eps: float


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. Norm weights float32; biases as `linear.pack_bias` returns them, or None."""

    attention: AttentionSpec
    input_norm: torch.Tensor  # [hidden]
    qkv: PackedLinear  # queries, keys, values: [(H + 2 KV) * D, hidden]
    o: PackedLinear  # [hidden, H * D]
    post_norm: torch.Tensor  # [hidden]
    gate_up: PackedLinear  # from pack_gate_up: [2 * intermediate, hidden]
    down: PackedLinear  # [hidden, intermediate]
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None


class _Layer(ctypes.Structure):
    """`oc_decoder_layer`."""

    _fields_ = (
        *((name, Packed) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("attention", AttnSpec),
    )


class _Decoder(ctypes.Structure):
    """`oc_decoder`."""

    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("rot_dim", ctypes.c_int32),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("packed_embedding", Packed),
        ("plain_embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("layers", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check_packed(packed: PackedLinear, name: str, n: int | None, k: int, spec: DecoderSpec) -> None:
    if packed.k != k or (n is not None and packed.n != n) or packed.dtype != spec.dtype:
        raise ValueError(
            f"{name} must be a packed weight {[n, k]} of {spec.dtype}, "
            f"not {[packed.n, packed.k]} of {packed.dtype}"
        )


def _layer_struct(layer: DecoderLayer, spec: DecoderSpec, where: str) -> _Layer:
    """The C view of a layer, after checking that its parts fit together."""
    attention, hidden = layer.attention, spec.hidden_size
    cpu_attention.check_spec(attention)
    heads = attention.num_heads * attention.head_dim
    rows = heads + 2 * attention.num_kv_heads * attention.head_dim
    _check_packed(layer.qkv, f"{where}.qkv", rows, hidden, spec)
    _check_packed(layer.o, f"{where}.o", hidden, heads, spec)
    _check_packed(layer.gate_up, f"{where}.gate_up", None, hidden, spec)
    _check_packed(layer.down, f"{where}.down", hidden, layer.gate_up.n // 2, spec)
    if not layer.gate_up.gate_up:
        raise ValueError(f"{where}.gate_up must come from pack_gate_up")
    for name in ("qkv", "o", "down"):
        if getattr(layer, name).gate_up:
            raise ValueError(f"{where}.{name} must come from pack, not from pack_gate_up")
    optional = {
        "qkv_bias": layer.qkv.n,
        "o_bias": layer.o.n,
        "gate_up_bias": layer.gate_up.packed_columns,
        "down_bias": layer.down.n,
        "q_norm": attention.head_dim,
        "k_norm": attention.head_dim,
    }
    for name, length in {"input_norm": hidden, "post_norm": hidden, **optional}.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            check(tensor, f"{where}.{name}", [length], torch.float32)
    return _Layer(
        layer.qkv.pointer(),
        layer.o.pointer(),
        layer.gate_up.pointer(),
        layer.down.pointer(),
        _pointer(layer.qkv_bias),
        _pointer(layer.o_bias),
        _pointer(layer.gate_up_bias),
        _pointer(layer.down_bias),
        _pointer(layer.input_norm),
        _pointer(layer.post_norm),
        _pointer(layer.q_norm),
        _pointer(layer.k_norm),
        AttnSpec(
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            0,  # the block size is the KV cache's: set when one comes
            attention.scale,
            attention.sliding_window or 0,
            attention.soft_cap or 0.0,
            dtype_number(spec.dtype, "dtype"),
        ),
    )


class FusedDecoder:
    """All layers, from token ids to the hidden states after the final norm."""

    def __init__(
        self,
        spec: DecoderSpec,
        layers: Sequence[DecoderLayer],
        embedding: PackedLinear | torch.Tensor,  # [vocab, hidden]
        final_norm: torch.Tensor,  # [hidden] float32
        cos: torch.Tensor,  # [max_positions, rot_dim / 2] float32
        sin: torch.Tensor,
        library: CpuLibrary | None = None,
    ) -> None:
        """Raises ValueError, naming the part, where shapes or dtypes do not fit together."""
        number = dtype_number(spec.dtype, "dtype")
        check(final_norm, "final_norm", [spec.hidden_size], torch.float32)
        check(cos, "cos", [None, None], torch.float32)
        check(sin, "sin", list(cos.shape), torch.float32)
        smallest = min((layer.attention.head_dim for layer in layers), default=0)
        if layers and 2 * cos.shape[1] > smallest:
            raise ValueError(
                f"cos must have at most head_dim / 2 = {smallest // 2} columns, not {cos.shape[1]}"
            )
        if isinstance(embedding, PackedLinear):
            _check_packed(embedding, "embedding", None, spec.hidden_size, spec)
            if embedding.gate_up:
                raise ValueError("embedding must come from pack, not from pack_gate_up")
            vocab = embedding.n
        else:
            check(embedding, "embedding", [None, spec.hidden_size], spec.dtype)
            vocab = embedding.shape[0]
        structs = [_layer_struct(layer, spec, f"layers[{i}]") for i, layer in enumerate(layers)]
        array = (_Layer * len(structs))(*structs)
        self.spec = spec
        self._max_positions = cos.shape[0]
        self._vocab = vocab
        self._array = array
        self._layers = list(layers)
        self._kept_alive = (embedding, final_norm, cos, sin)
        self._caches: tuple[torch.Tensor, ...] = ()
        self._cache_pointers = (ctypes.c_void_p * 0)()
        self._one_call = threading.Lock()
        self._decoder = _Decoder(
            hidden=spec.hidden_size,
            vocab=vocab,
            num_layers=len(structs),
            dtype=number,
            eps=spec.rms_norm_eps,
            rot_dim=2 * cos.shape[1],
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            final_norm=final_norm.data_ptr(),
            layers=ctypes.addressof(array),
        )
        if isinstance(embedding, PackedLinear):
            self._decoder.packed_embedding = embedding.pointer()
        else:
            self._decoder.plain_embedding = embedding.data_ptr()
        used = library or load()
        pointer, decoder = ctypes.c_void_p, ctypes.POINTER(_Decoder)
        self._forward = used.function(
            "oc_decoder_run",
            ctypes.c_int32,
            [
                decoder,
                ctypes.POINTER(Step),
                pointer,
                ctypes.POINTER(pointer),
                pointer,
                ctypes.c_int64,
                pointer,
            ],
        )
        release = used.function("oc_decoder_release", None, [decoder])
        weakref.finalize(self, release, self._decoder)

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64, -1 for padding rows
        metadata: AttentionMetadata,
        kv_caches: Sequence[torch.Tensor],  # one a layer, shaped by the CPU attention backend
        wanted: torch.Tensor | None = None,  # [L] int64, ascending token rows; None: all
    ) -> torch.Tensor:
        """Hidden states after the final norm, `[num_tokens, hidden]`, or [L, hidden], in the model's dtype.

        Raises ValueError for wrong shapes or dtypes, for an id outside the vocabulary and for wanted
        rows that do not ascend or are not there; nothing has been stored then.
        """
        rows = metadata.num_tokens
        check(input_ids, "input_ids", [rows], torch.int64)
        check(positions, "positions", [rows], torch.int64)
        if rows and int(positions.max()) >= self._max_positions:
            raise ValueError(f"positions must be below {self._max_positions}, the length of cos and sin")
        step = cpu_attention.step_view(metadata)
        step.positions = positions.data_ptr()
        count = rows
        if wanted is not None:
            check(wanted, "wanted", [None], torch.int64)
            count = len(wanted)
        out = torch.empty(count, self.spec.hidden_size, dtype=self.spec.dtype)
        # no rows are another thing than NULL, and an empty tensor may lie nowhere
        asked = None if wanted is None else wanted.data_ptr() or input_ids.data_ptr()
        with self._one_call:
            self._bind_caches(kv_caches)
            failed = self._forward(
                self._decoder, step, input_ids.data_ptr(), self._cache_pointers, asked, count, out.data_ptr()
            )
        if failed == _BAD_ROW:
            raise ValueError(f"wanted rows must ascend and be in 0 .. {rows - 1}")
        if failed == _BAD_ID:
            raise ValueError(f"input_ids must be in 0 .. {self._vocab - 1}")
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory for the activations of {rows} rows")
        return out

    def _bind_caches(self, kv_caches: Sequence[torch.Tensor]) -> None:
        """Check the caches and keep their pointers, once for as long as the same ones come."""
        if len(kv_caches) != len(self._layers):
            raise ValueError(f"kv_caches must be one a layer, {len(self._layers)}, not {len(kv_caches)}")
        if all(new is old for new, old in zip(kv_caches, self._caches, strict=False)) and self._caches:
            return
        block_size = 0
        for index, (cache, layer) in enumerate(zip(kv_caches, self._layers, strict=True)):
            if index == 0:
                block_size = cache.shape[1] * cpu_attention.TILE if cache.dim() > 1 else 0
            shape = cpu_attention.kv_cache_shape(cache.shape[0], block_size, layer.attention)
            check(cache, f"kv_caches[{index}]", shape, self.spec.dtype)
        for struct in self._array:
            struct.attention.block_size = block_size
        self._caches = tuple(kv_caches)
        self._cache_pointers = (ctypes.c_void_p * len(kv_caches))(*(cache.data_ptr() for cache in kv_caches))
