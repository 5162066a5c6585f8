"""This engine's attention kernels beside FlashInfer's, on the same KV cache of one GPU.

    python -m benchmarks.attention_peers --model qwen3-8b

Octavo's KV cache has the shape that FlashInfer calls HND, so both read the same bytes. A chain of layers runs
in one CUDA graph, over so many caches that none stays in the second-level cache; plans are made before it.
One JSON line a shape: microseconds a layer, and the largest difference between the outputs. FlashInfer is
used where it is installed; nothing else in Octavo needs it.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.decode_step import BANDWIDTH, BLOCK_SIZE, capture, milliseconds
from benchmarks.gpu_workloads import MODELS
from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton import attention, prompt
from octavo.kernels.triton.attention import Scratch
from octavo.kernels.triton.query_tiles import plans_of

Work = Callable[[], None]


def batch(lengths: list[int], rows: int) -> AttentionMetadata:
    """Requests of these lengths; the last `rows` positions of each are computed."""
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(blocks), device="cuda").int()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device="cuda")
    first = 0
    for request, count in enumerate(blocks):
        table[request, :count] = order[first : first + count]
        first += count
    positions = torch.cat([torch.arange(length - rows, length, device="cuda") for length in lengths])
    starts = torch.arange(0, len(lengths) * rows + 1, rows, dtype=torch.int32, device="cuda")
    chunks = tuple((i, i * rows, rows, length - rows) for i, length in enumerate(lengths))
    return AttentionMetadata(
        query_start_loc=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        block_table=table, slot_mapping=positions, positions=positions, num_reqs=len(lengths),
        num_tokens=len(positions), max_query_len=rows, max_seq_len=max(lengths),
        long_chunks=chunks if rows >= prompt.LEAST_ROWS else (),
    )  # fmt: skip


class Shape:
    """Queries and caches of one shape, and the work of each engine on them."""

    def __init__(self, config: dict[str, Any], lengths: list[int], rows: int, copies: int) -> None:
        heads, kv_heads, dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        self.spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5)
        self.meta, self.lengths = batch(lengths, rows), lengths
        blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
        shape = (blocks, 2, kv_heads, BLOCK_SIZE, dim)
        self.caches = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies)]
        self.q = torch.randn(self.meta.num_tokens, heads, dim, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)

    def octavo(self) -> Work:
        """Our kernels: those for long chunks, or those for a few rows of many requests."""
        meta, spec = self.meta, self.spec
        if meta.long_chunks:
            dim, kv = spec.head_dim, spec.num_kv_heads
            # Rows of this step are read from the products' output: put the same keys and values there.
            keys = torch.empty(
                len(self.caches), meta.num_tokens, 2 * kv, dim, dtype=self.q.dtype, device="cuda"
            )
            for index, cache in enumerate(self.caches):
                for request, first, rows, start in meta.long_chunks:
                    span = torch.arange(start, start + rows, device="cuda")
                    found = cache[
                        meta.block_table[request, span // BLOCK_SIZE].long(), :, :, span % BLOCK_SIZE
                    ]
                    keys[index, first : first + rows] = found.flatten(1, 2)
            qkv = torch.cat([self.q.expand(len(self.caches), -1, -1, -1), keys], 2).flatten(2)
            plan = prompt.plan(meta)

            def chunks() -> None:
                for index, cache in enumerate(self.caches):
                    prompt.attend(self.q, qkv[index], cache, self.out, meta, spec, plan)

            return chunks
        plans = plans_of(meta, spec, block_size=BLOCK_SIZE)
        scratch = Scratch.allocate(meta.num_tokens, meta.max_seq_len, spec, self.q.device)

        def few() -> None:
            for index, cache in enumerate(self.caches):
                for plan in plans:
                    attention.attend(self.q, cache, self.out, meta, spec, plan, scratch, index > 0)

        return few

    def flashinfer(self, variant: str) -> Work:
        """FlashInfer's wrapper: "cores" and "tensor" for single rows, "fa2" and "fa3" for any."""
        library = importlib.import_module("flashinfer")
        meta, spec = self.meta, self.spec
        blocks = [-(-length // BLOCK_SIZE) for length in self.lengths]
        indptr = torch.tensor([0, *blocks], device="cuda").cumsum(0).int()
        indices = torch.cat([meta.block_table[i, :count] for i, count in enumerate(blocks)]).int()
        last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in self.lengths], device="cuda").int()
        space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        if variant in ("cores", "tensor"):
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_tensor_cores=variant == "tensor"
            )
            wrapper.plan(indptr, indices, last, *sizes, BLOCK_SIZE, q_data_type=self.q.dtype)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(space, "HND", backend=variant)
            wrapper.plan(
                meta.query_start_loc, indptr, indices, last, *sizes, BLOCK_SIZE, causal=True,
                q_data_type=self.q.dtype,
            )  # fmt: skip

        def work() -> None:
            for cache in self.caches:
                wrapper.run(self.q, cache, out=self.out)

        return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-8b")
    arguments = parser.parse_args()
    config = MODELS[arguments.model]
    shapes = [([640] * n, 1, 16) for n in (1, 16, 64, 256)] + [([8192] * n, 1, 8) for n in (1, 4, 16)]
    shapes += [([2048], 1, 16), ([32768], 1, 4), ([32768, *[640] * 15], 1, 8)]
    shapes += [([640] * n, 6, 16) for n in (1, 16, 64)] + [([8192] * n, 6, 8) for n in (1, 4)]
    shapes += [([4000] * 2, 4000, 4), ([512] * 16, 512, 4), ([8192], 2048, 4)]
    for lengths, rows, copies in shapes:
        shape = Shape(config, lengths, rows, copies)
        kv = config["num_key_value_heads"] * config["head_dim"]
        line: dict[str, Any] = {
            "model": arguments.model, "requests": len(lengths), "rows": rows, "context": lengths[0],
            "read_us": round(sum(lengths) * 4 * kv / BANDWIDTH * 1e6, 1),
        }  # fmt: skip
        expected = None
        variants = ("octavo", "cores", "tensor") if rows == 1 else ("octavo", "fa2", "fa3")
        for name in variants:
            try:
                work = shape.octavo() if name == "octavo" else shape.flashinfer(name)
                line[name] = round(milliseconds(capture(work)) / copies * 1e3, 2)
            except Exception as error:  # a variant that cannot run here is a result too
                line[name] = repr(error)[:160]
                continue
            if expected is None:
                expected = shape.out.float()
            else:
                line[f"{name}_differs"] = round(float((shape.out.float() - expected).abs().max()), 4)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
