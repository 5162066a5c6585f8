"""Times ways to cut decode attention on this GPU, against the time its keys and values take to read.

    python -m benchmarks.tune_attention --model qwen3-0.6b --rows 1 16 64 --context 640

Each row is a request of its own with the same context; a chain of layers runs in one CUDA graph, over
so many caches that none stays in the second-level cache. Variants are compiled by several processes first.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.decode_step import BANDWIDTH, BLOCK_SIZE, capture, decode_batch, milliseconds
from benchmarks.gpu_workloads import MODELS
from octavo.attention.backend import AttentionSpec
from octavo.kernels.triton import attention
from octavo.kernels.triton.attention import QueryTiling, Scratch
from octavo.kernels.triton.query_tiles import narrow_tiling


class Cut(NamedTuple):
    """One way to cut."""

    block_q: int
    stages: int
    registers: int | None
    extra: int


def cuts(rows: int, kv_heads: int) -> list[Cut]:
    """What is tried."""
    found = []
    for block_q, stages, registers in itertools.product((8, 16, 32), (2, 3, 4, 5), (None, 128)):
        if (block_q > 8 and (stages > 3 or registers)) or (registers and stages > 2):
            continue
        for programs in (0, 128, 256, 384, 512):
            extra = max(0, programs // kv_heads - rows)
            if not programs or extra:
                found.append(Cut(block_q, stages, registers, extra))
    return found


class Bench:
    """A chain of attention launches."""

    def __init__(self, config: dict[str, Any], rows: int, context: int, copies: int) -> None:
        heads, kv_heads, dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        self.spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5)
        self.meta = replace(decode_batch(rows, context), max_seq_len=context)
        shape = (self.meta.block_table.numel(), 2, kv_heads, BLOCK_SIZE, dim)
        self.caches = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies)]
        self.q = torch.randn(rows, heads, dim, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)

    def all(self, cut: Cut) -> Callable[[], None]:
        """The chain that is timed."""
        tiling = QueryTiling(cut.block_q, cut.stages, registers=cut.registers)
        scratch = Scratch.allocate(self.meta.num_tokens, self.meta.max_seq_len, self.spec, self.q.device)

        def work() -> None:
            plan = attention.plan(self.meta, self.spec, tiling, cut.extra, block_size=BLOCK_SIZE)
            attention.attend(self.q, self.caches[0], self.out, self.meta, self.spec, plan, scratch, False)
            for cache in self.caches[1:]:
                attention.attend(self.q, cache, self.out, self.meta, self.spec, plan, scratch, True)

        return work


def _compile(job: tuple[dict[str, Any], int, list[Cut]]) -> int:
    config, rows, wanted = job
    bench = Bench(config, rows, 40, 2)
    for cut in wanted:
        try:
            bench.all(cut)()
        except Exception as error:
            print(rows, cut, repr(error)[:100], flush=True)
    torch.cuda.synchronize()
    return len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", choices=sorted(MODELS), nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    jobs = []
    for model in arguments.models:
        config = MODELS[model]
        wanted = {cut for rows in arguments.rows for cut in cuts(rows, config["num_key_value_heads"])}
        every = sorted(wanted, key=str)
        shares = arguments.processes // len(arguments.models)
        jobs += [(config, 16, every[start::shares]) for start in range(shares)]
    with concurrent.futures.ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn")
    ) as pool:
        print("compiled", sum(pool.map(_compile, jobs)), flush=True)
    for model, rows in itertools.product(arguments.models, arguments.rows):
        config = MODELS[model]
        bench = Bench(config, rows, arguments.context, arguments.copies)
        kv = config["num_key_value_heads"] * config["head_dim"]
        least = rows * arguments.context * 4 * kv / BANDWIDTH * 1e6
        results = []
        for cut in cuts(rows, config["num_key_value_heads"]):
            try:
                took = milliseconds(capture(bench.all(cut)), 9) / arguments.copies * 1e3
            except Exception as error:
                print(rows, cut, repr(error)[:100], flush=True)
                continue
            results.append((took, cut))
        results.sort(key=lambda result: result[0])
        tiling, extra = narrow_tiling(rows, 1, bench.spec)
        now = Cut(tiling.block_q, tiling.stages, tiling.registers, extra)
        for took, cut in results[: arguments.show] + [pair for pair in results if pair[1] == now]:
            print(
                json.dumps({
                    "model": model, "rows": rows, "us": round(took, 2), "limit_us": round(least, 2),
                    "of_limit": round(least / took, 3), "cut": tuple(cut), "now": cut == now,
                }), flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
