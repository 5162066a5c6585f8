"""Times ways to cut the products of a decoder layer on this GPU, against the time their weight takes to read.

    python -m benchmarks.tune_products --model qwen3-8b --rows 1 16 64
    python -m benchmarks.tune_products --model qwen3-8b --rows 64 96 128 256 384 --quick

Each product runs as it does in a step: a chain of launches in one CUDA graph, over enough copies of
the weight that none lies in the cache. Variants are compiled by several processes first. The library's
product is timed as it is and with a bias of zeros, which takes it to cuBLASLt; beyond 128 rows it is alone.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.decode_step import BANDWIDTH, FLOPS, capture, milliseconds
from benchmarks.gpu_workloads import MODELS
from octavo.kernels.triton import products, wide_gate_up
from octavo.kernels.triton.products import Tiling, Workspace
from octavo.kernels.triton.wide_gate_up import WideTiling

Cut = Tiling | WideTiling
KINDS = ("qkv", "o", "gate_up", "down", "head")


def shape_of(config: dict[str, Any], kind: str) -> tuple[int, int]:
    """(N, K) of a product's weight."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    return {
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "gate_up": (2 * config["intermediate_size"], hidden),
        "down": (hidden, config["intermediate_size"]),
        "head": (config["vocab_size"], hidden),
    }[kind]


def tilings(config: dict[str, Any], kind: str, rows: int, quick: bool, only_early: bool = False) -> list[Cut]:
    """What is tried for so many rows, padded."""
    n, k = shape_of(config, kind)
    if rows > products.MAX_ROWS:
        return []
    widths = {"qkv": [config["head_dim"]]}.get(kind, [64, 128])
    splits = [1] if kind == "head" else [1, 2, 4, 8]
    depths = (
        [(128, 3), (64, 6)] if quick else [(64, 4), (64, 6), (64, 8), (128, 2), (128, 3), (128, 4), (256, 2)]
    )
    found: list[Tiling] = []
    for width, split, (block_k, stages), prefetch in itertools.product(widths, splits, depths, [0, 4]):
        programs = -(-n // width) * split
        if k % (split * block_k) or k // split < 2 * block_k:
            continue
        if kind != "head" and not 60 <= programs <= 800:
            continue
        if (width + rows) * block_k * 2 * stages > 200_000 or (quick and prefetch and rows > 16):
            continue
        for warps in (4, 8) if width == 128 and rows >= 64 else (4,):
            found.append(Tiling(width, split, block_k, stages, warps, prefetch))
    if kind in ("qkv", "o", "down") and rows <= 64:
        for split, early, (block_k, stages), warps in itertools.product(
            splits, [128, 256, 512], [(64, 4), (64, 6), (128, 3)], (4, 8) if quick is False else (4,)
        ):
            width = widths[0]
            room = (width + rows) * (early + block_k * stages) * 2 < 200_000
            if (
                room
                and k % (split * block_k) == 0
                and k // split > early
                and 48 <= -(-n // width) * split <= 300
            ):
                found.append(Tiling(width, split, block_k, stages, warps, 0, early))
    kept: list[Cut] = [cut for cut in found if cut.early or not only_early]
    if kind == "gate_up" and rows > 16:
        for (width, rest), stages in itertools.product([(32, 0), (64, 0), (64, 32)], [3, 4, 5, 6]):
            block_m = max(64, rows)
            room = 2 * 64 * (block_m + 2 * (width + rest)) * stages < 220_000
            if room and n // 2 % (width + rest) == 0:
                kept.append(WideTiling(block_m, width, rest, stages, 4 if block_m == 64 else 8))
    return kept


def padded(rows: int) -> int:
    """Rows of a tile; beyond what the kernels take, the rows themselves."""
    return products.padded_rows(rows) if rows <= products.MAX_ROWS else rows


class Bench:
    """One product with everything it needs."""

    def __init__(self, config: dict[str, Any], kind: str, rows: int, copies: int) -> None:
        self.kind, self.rows = kind, rows
        n, k = shape_of(config, kind)
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.weights = [torch.empty(n, k, **bf16).normal_(0, 0.02) for _ in range(copies)]
        self.whole_tiles = torch.randn(max(64, padded(rows)), k, **bf16)
        self.x = self.whole_tiles[:rows]
        self.bias = torch.zeros(n, **bf16)
        self.squares = torch.rand(rows, max(1, k // 64), device="cuda") * 64
        dim, kv = config["head_dim"], config["num_key_value_heads"]
        heads = config["num_attention_heads"]
        self.norms = (torch.rand(dim, **bf16), torch.rand(dim, **bf16))
        self.cos, self.sin = (
            torch.rand(1024, dim // 2, device="cuda"),
            torch.rand(1024, dim // 2, device="cuda"),
        )
        self.positions = torch.full((rows,), 511, device="cuda")
        self.slots = torch.arange(rows, device="cuda") * 16
        self.q = torch.empty(rows, heads, dim, **bf16)
        self.cache = torch.empty(rows + 1, 2, kv, 16, dim, **bf16)
        self.stream, self.scaled = torch.randn(rows, n, **bf16), torch.empty(rows, n, **bf16)
        self.new_squares = torch.empty(rows, max(1, n // 64), device="cuda")
        self.out = torch.empty(rows, n // 2, **bf16)
        self.logits = torch.empty(rows, n, device="cuda")
        self.norm = torch.rand(n, **bf16)
        self.space = Workspace.allocate(16 * n * 128 if kind != "head" else 1, n // 16, torch.device("cuda"))

    def launch(self, weight: torch.Tensor, tiling: Cut) -> None:
        """One product."""
        if isinstance(tiling, WideTiling):
            wide_gate_up.gate_up(self.whole_tiles, weight, None, self.squares, 1e-6, self.out, tiling)
        elif self.kind == "qkv":
            products.qkv(
                self.x, weight, None, self.squares, 1e-6, self.norms, self.cos, self.sin, self.positions,
                self.slots, self.q, self.cache, self.space, tiling,
            )  # fmt: skip
        elif self.kind == "gate_up":
            products.gate_up(self.x, weight, None, self.squares, 1e-6, self.out, self.space, tiling)
        elif self.kind == "head":
            products.plain(self.x, weight, None, self.logits, self.space, tiling)
        else:
            products.residual(
                self.x,
                weight,
                None,
                self.stream,
                self.norm,
                self.scaled,
                self.new_squares,
                self.space,
                tiling,
            )

    def all(self, tiling: Cut) -> Callable[[], None]:
        """The chain that is timed."""

        def work() -> None:
            for weight in self.weights:
                self.launch(weight, tiling)

        return work


def _compile(job: tuple[dict[str, Any], str, int, list[Cut]]) -> int:
    config, kind, rows, cuts = job
    bench = Bench(config, kind, rows, 1)
    for cut in cuts:
        try:
            bench.launch(bench.weights[0], cut)
        except Exception as error:
            print(kind, rows, cut, repr(error)[:200], flush=True)
    torch.cuda.synchronize()
    return len(cuts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-8b")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only-early", action="store_true")
    parser.add_argument("--show", type=int, default=3)
    parser.add_argument("--processes", type=int, default=12)
    arguments = parser.parse_args()
    config = MODELS[arguments.model]
    jobs = []
    for kind, rows in itertools.product(arguments.kinds, sorted({padded(r) for r in arguments.rows})):
        cuts = tilings(config, kind, rows, arguments.quick, arguments.only_early)
        jobs += [(config, kind, rows, cuts[start::4]) for start in range(4) if cuts[start::4]]
    with concurrent.futures.ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn")
    ) as pool:
        print("compiled", sum(pool.map(_compile, jobs)), flush=True)
    for kind, rows in itertools.product(arguments.kinds, arguments.rows):
        n, k = shape_of(config, kind)
        copies = max(2, min(24, -(-400_000_000 // (2 * n * k))))
        bench = Bench(config, kind, rows, copies)
        least = max(2 * n * k / BANDWIDTH, 2 * n * k * rows / FLOPS) * 1e6
        results = []
        library = capture(lambda bench=bench: [F.linear(bench.x, w) for w in bench.weights])
        base = milliseconds(library, 15) / copies * 1e3
        library = capture(lambda bench=bench: [F.linear(bench.x, w, bench.bias) for w in bench.weights])
        biased = milliseconds(library, 15) / copies * 1e3
        del library
        print(
            json.dumps(
                {
                    "kind": kind, "rows": rows, "limit_us": round(least, 2), "cublas_us": round(base, 2),
                    "with_bias_us": round(biased, 2),
                }
            ),
            flush=True,
        )  # fmt: skip
        for cut in tilings(config, kind, padded(rows), arguments.quick, arguments.only_early):
            try:
                took = milliseconds(capture(bench.all(cut)), 15) / copies * 1e3
            except Exception as error:
                print(kind, rows, cut, repr(error)[:200], flush=True)
                continue
            results.append((took, cut))
        results.sort(key=lambda pair: pair[0])
        for took, cut in results[: arguments.show]:
            print(
                json.dumps(
                    {
                        "kind": kind, "rows": rows, "us": round(took, 2), "limit_us": round(least, 2),
                        "of_limit": round(least / took, 3), "cut": str(cut),
                    }
                ),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
