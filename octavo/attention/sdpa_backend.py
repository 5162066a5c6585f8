"""Paged attention by torch's `scaled_dot_product_attention`: for devices that no kernel of ours serves.

Its keys and values have to lie in one piece, so they are gathered through the block table first. Requests
with few rows (decoding, verifying) are attended together, those of about the same length in one call; a
chunk of a prompt is attended by itself, some rows at a time. The rows of all query heads that share a KV
head are packed as rows of that head, so that nothing is copied once for each of them.

What is where is worked out on the host, once a step for all layers: it waits for the device there, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.attention.torch_backend import TorchBackend

# A request with more rows than this is a chunk. Padding to the longest wastes little below it.
FEW_ROWS = 16
# Tokens whose keys and values are gathered for one call, unless a single request has more.
GATHERED_TOKENS = 1 << 15
# Scores of one call and KV head, which bounds its mask.
SCORES = 1 << 23

IntArray = npt.NDArray[np.int64]


def scratch_bytes(spec: AttentionSpec, longest: int, itemsize: int) -> int:
    """Bytes of one call beside its arguments and its result, for contexts up to `longest`; an upper bound."""
    tokens = max(GATHERED_TOKENS, longest + 256)  # a block more than whole
    gathered = 2 * tokens * spec.num_kv_heads * spec.head_dim * itemsize
    scores = max(SCORES, longest * spec.num_heads // spec.num_kv_heads)
    # two masks of bits and the one that torch makes of them; torch's plain form keeps all scores as well
    plain = 3 * spec.num_kv_heads * 4 if spec.soft_cap is not None or spec.head_dim % 8 else 0
    return gathered + scores * (2 + itemsize + plain)


class SdpaBackend(TorchBackend):
    """Any mix of chunk, decode and verify rows, in every dtype, on every device. Cache as TorchBackend's."""

    name = "sdpa"

    def __init__(self) -> None:
        self._step: _Step | None = None  # the last one: every layer asks for it

    def store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        """Write the rows that have a slot."""
        step = self._step_of(metadata, kv_cache.shape[2])
        if step.stored is not None:
            key, value = key[step.stored], value[step.stored]
        kv_cache[step.blocks, 0, step.offsets] = key.to(kv_cache.dtype)
        kv_cache[step.blocks, 1, step.offsets] = value.to(kv_cache.dtype)

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]"""
        output = torch.zeros_like(query)
        for piece in self._step_of(metadata, kv_cache.shape[2]).pieces(spec):
            keys, values = (_gather(kv_cache[:, half], piece) for half in (0, 1))
            group = spec.num_heads // spec.num_kv_heads
            for tile in piece.tiles(group):
                # a row that stands there again is written again, with the same numbers
                output[tile.rows] = _attend(query[tile.rows], keys, values, tile, spec)
        return output.flatten(1)

    def _step_of(self, metadata: AttentionMetadata, block_size: int) -> _Step:
        step = self._step
        if step is None or step.metadata is not metadata:
            step = self._step = _Step(metadata, block_size)
        return step


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of a piece that are attended in one call. B requests, R rows each; keys up to S."""

    rows: torch.Tensor  # [B, R] int64, token rows; a request with fewer has its last one again
    mask: torch.Tensor  # [B, 1, group * R, S] bool, what a row may see

    @property
    def num_keys(self) -> int:
        return self.mask.shape[-1]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Requests whose keys and values are gathered together. B requests, R rows and W blocks each."""

    rows: IntArray  # [B, R] on the host; see _Tile
    positions: torch.Tensor  # [B, R] int64
    blocks: torch.Tensor  # [B, W] int64, ids
    kv_positions: torch.Tensor  # [B, W * block_size] int64
    beyond: torch.Tensor  # the same shape, bool: not written by this request, or not yet
    last: IntArray  # [R] the last place among the keys that each row sees, of any request
    window: int | None
    made: dict[int, list[_Tile]] = field(default_factory=dict)  # by group, where a step needs few

    def tiles(self, group: int) -> list[_Tile] | Iterator[_Tile]:
        """All rows, in as many calls as their scores need."""
        if self.rows.shape[1] > FEW_ROWS:
            return self._make(group)  # as large as the scores: not kept
        if group not in self.made:
            self.made[group] = list(self._make(group))
        return self.made[group]

    def _make(self, group: int) -> Iterator[_Tile]:
        requests, all_rows = self.rows.shape
        device, width = self.blocks.device, self.kv_positions.shape[1]
        block_size = width // self.blocks.shape[1]
        needed = np.minimum(width, (self.last // block_size + 1) * block_size)  # keys, by row
        begin = 0
        while begin < all_rows:
            scores = np.arange(1, all_rows - begin + 1) * needed[begin:] * (requests * group)
            end = begin + max(1, int(np.searchsorted(scores, SCORES, side="right")))
            keys = int(needed[end - 1])
            positions = self.positions[:, begin:end, None]
            kv_positions = self.kv_positions[:, None, :keys]
            mask = kv_positions <= positions
            if self.window is not None:
                mask &= kv_positions > positions - self.window
            mask = mask[:, None].expand(-1, group, -1, -1).reshape(requests, 1, -1, keys)
            yield _Tile(_sent(self.rows[:, begin:end], device), mask)
            begin = end


class _Step:
    """One step as the host sees it: who stores where, and who attends to what."""

    def __init__(self, metadata: AttentionMetadata, block_size: int) -> None:
        self.metadata = metadata
        self._block_size = block_size
        count, device = metadata.num_tokens, metadata.positions.device
        parts = (metadata.query_start_loc[: metadata.num_reqs + 1], metadata.positions, metadata.slot_mapping)
        # in one copy: this waits for the device
        known = torch.cat([part.to(torch.int64) for part in parts]).cpu().numpy()
        starts, positions, slots = np.split(known, [metadata.num_reqs + 1, metadata.num_reqs + 1 + count])
        self._positions: IntArray = positions
        self._requests: list[tuple[int, IntArray]] = []  # (request, its token rows that are not padding)
        for request in range(metadata.num_reqs):
            rows = np.arange(starts[request], starts[request + 1])
            rows = rows[positions[rows] >= 0]
            if len(rows):
                self._requests.append((request, rows))
        stored = np.flatnonzero(slots >= 0)
        self.stored = None if len(stored) == count else _sent(stored, device)  # None: all rows
        self.blocks = _sent(slots[stored] // block_size, device)
        self.offsets = _sent(slots[stored] % block_size, device)
        self._pieces: dict[int | None, list[_Piece]] = {}  # by sliding window

    def pieces(self, spec: AttentionSpec) -> list[_Piece]:
        """Those of a layer with this window."""
        window = spec.sliding_window
        if window not in self._pieces:
            self._pieces[window] = [self._piece(group, window) for group in self._groups(spec)]
        return self._pieces[window]

    def _groups(self, spec: AttentionSpec) -> Iterator[list[tuple[int, IntArray]]]:
        """Requests that go together: chunks alone, the others with those of similar length."""
        group = spec.num_heads // spec.num_kv_heads
        few = []
        for entry in self._requests:
            if len(entry[1]) > FEW_ROWS:
                yield [entry]
            else:
                few.append((self._width(entry[1], spec.sliding_window), entry))
        few.sort(key=lambda pair: -pair[0])
        while few:
            widest, most = few[0][0], 0
            size = 0
            for width, (_, rows) in few:
                most = max(most, len(rows))
                tokens = (size + 1) * widest * self._block_size
                fits = tokens <= GATHERED_TOKENS and tokens * group * most <= SCORES
                if size and not (fits and 2 * width >= widest):
                    break
                size += 1
            yield [entry for _, entry in few[:size]]
            few = few[size:]

    def _first(self, rows: IntArray, window: int | None) -> int:
        """The first block that any of these rows sees."""
        if window is None:
            return 0
        return max(0, int(self._positions[rows].min()) - window + 1) // self._block_size

    def _width(self, rows: IntArray, window: int | None) -> int:
        """Blocks that these rows of one request see together."""
        return int(self._positions[rows].max()) // self._block_size + 1 - self._first(rows, window)

    def _piece(self, group: list[tuple[int, IntArray]], window: int | None) -> _Piece:
        metadata, block_size = self.metadata, self._block_size
        device = metadata.positions.device
        most = max(len(rows) for _, rows in group)
        padded = np.stack([np.pad(rows, (0, most - len(rows)), mode="edge") for _, rows in group])
        first = np.array([self._first(rows, window) for _, rows in group])
        width = max(self._width(rows, window) for _, rows in group)
        numbers = first[:, None] + np.arange(width)  # of blocks, counted within each request
        positions = self._positions[padded]
        ends = positions.max(axis=1, keepdims=True)
        kv_positions = (numbers[:, :, None] * block_size + np.arange(block_size)).reshape(len(group), -1)
        table_rows = _sent(np.array([request for request, _ in group]), device)
        if metadata.table_rows is not None:
            table_rows = metadata.table_rows[table_rows].to(torch.int64)
        columns = _sent(np.minimum(numbers, ends // block_size), device)
        return _Piece(
            rows=padded,
            positions=_sent(positions, device),
            blocks=metadata.block_table[table_rows[:, None], columns].to(torch.int64),
            kv_positions=_sent(kv_positions, device),
            beyond=_sent(kv_positions > ends, device),
            last=(positions - first[:, None] * block_size).max(axis=0),
            window=window,
        )


def _gather(halves: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """Keys or values [B, num_kv_heads, W * block_size, head_dim] of [num_blocks, block_size, kv heads, dim].

    What a block held before is nobody's, and may be NaN: no weight is small enough for that.
    """
    gathered = halves[piece.blocks].flatten(1, 2)
    return gathered.masked_fill_(piece.beyond[:, :, None, None], 0.0).transpose(1, 2)


def _attend(
    query: torch.Tensor,  # [B, R, num_heads, head_dim]
    keys: torch.Tensor,  # [B, num_kv_heads, S or more, head_dim]
    values: torch.Tensor,
    tile: _Tile,
    spec: AttentionSpec,
) -> torch.Tensor:
    """[B, R, num_heads, head_dim]"""
    requests, rows, heads, head_dim = query.shape
    kv_heads, group = spec.num_kv_heads, heads // spec.num_kv_heads
    packed = query.view(requests, rows, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    packed = packed.reshape(requests, kv_heads, group * rows, head_dim)
    keys, values = keys[:, :, : tile.num_keys], values[:, :, : tile.num_keys]
    if spec.soft_cap is None:
        found = F.scaled_dot_product_attention(packed, keys, values, attn_mask=tile.mask, scale=spec.scale)
    else:  # torch's kernels know no cap
        scores = (packed.float() * spec.scale) @ keys.float().transpose(2, 3)
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        weights = scores.masked_fill(~tile.mask, float("-inf")).softmax(-1)
        found = (weights @ values.float()).to(query.dtype)
    found = found.view(requests, kv_heads, group, rows, head_dim).permute(0, 3, 1, 2, 4)
    return found.reshape(requests, rows, heads, head_dim)


def _sent(array: npt.NDArray[np.int64] | npt.NDArray[np.bool_], device: torch.device) -> torch.Tensor:
    """An array of the host on the device, without waiting for what the device does now."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
