"""What one decode step costs on this GPU: the decoder's forward and the head, as one CUDA graph.

Random weights, every row a request of its own with the same context. One JSON line a size, with the
least time that reading weights and KV, or the arithmetic, allows.

    python -m benchmarks.decode_step --model qwen3-8b --rows 1 16 64
"""

# mypy: disable-error-code="no-untyped-call, misc"
from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.gpu_workloads import MODELS
from octavo.attention.backend import AttentionMetadata, AttentionSpec, ForwardContext
from octavo.kernels.triton import attention, launch, sample
from octavo.kernels.triton.decoder import FEW_ROWS, FusedDecoder
from octavo.kernels.triton.layer import Layer
from octavo.kernels.triton.query_tiles import plans_of
from octavo.models.gpu_ops import GpuOps, GpuPacked

BANDWIDTH, FLOPS = 4.19e12, 789e12  # one H200, measured
BLOCK_SIZE = 16


def random_decoder(
    config: dict[str, Any], few_rows: int = FEW_ROWS, device: str = "cuda", runs_as_one: bool = False
) -> tuple[FusedDecoder, torch.Tensor]:
    """(a decoder, its head's weight) of a Qwen3-like shape."""
    hidden, heads, kv_heads = (
        config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"],
    )  # fmt: skip
    head_dim, width, vocab = config["head_dim"], config["intermediate_size"], config["vocab_size"]

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)

    def norm(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).uniform_(0.9, 1.1)

    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5)
    layers = [
        Layer(
            spec, norm(hidden), weight((heads + 2 * kv_heads) * head_dim, hidden), None,
            (norm(head_dim), norm(head_dim)), weight(hidden, heads * head_dim), None, norm(hidden),
            weight(2 * width, hidden), None, weight(hidden, width), None,
        )
        for _ in range(config["num_hidden_layers"])
    ]  # fmt: skip
    angles = torch.arange(4096, device=device)[:, None] / 1e6 ** (
        torch.arange(0, head_dim, 2, device=device) / head_dim
    )
    table = weight(vocab, hidden)
    head = table if config["tie_word_embeddings"] else weight(vocab, hidden)
    decoder = FusedDecoder(
        layers, table, norm(hidden), angles.cos(), angles.sin(), 1e-6, few_rows, runs_as_one=runs_as_one
    )
    return decoder, head


def decode_batch(rows: int, context: int, device: str = "cuda") -> AttentionMetadata:
    """Every row decodes at position context - 1 of its own request; blocks are scattered."""
    per_request = -(-context // BLOCK_SIZE)
    order = torch.randperm(rows * per_request, device=device).to(torch.int32).view(rows, per_request)
    last = order[:, (context - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    return AttentionMetadata(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((rows,), context, dtype=torch.int32, device=device),
        block_table=order,
        slot_mapping=last,
        positions=torch.full((rows,), context - 1, dtype=torch.int64, device=device),
        num_reqs=rows,
        num_tokens=rows,
        max_query_len=1,
        max_seq_len=4096,
    )


def milliseconds(graph: torch.cuda.CUDAGraph, repeats: int = 30) -> float:
    """Median time of a replay."""
    times = []
    for _ in range(3):
        graph.replay()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(sorted(times)[len(times) // 2])


def limit(config: dict[str, Any], rows: int, context: int) -> float:
    """Least milliseconds of a step."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    body = layers * (hidden * (2 * q + 2 * kv) + 3 * hidden * config["intermediate_size"])
    weights = body + hidden * config["vocab_size"]
    memory = (2 * weights + rows * context * layers * 4 * kv) / BANDWIDTH
    arithmetic = rows * (2 * weights + 4 * q * layers * context) / FLOPS
    return float(max(memory, arithmetic) * 1e3)


def capture(work: Any) -> torch.cuda.CUDAGraph:
    """Run once, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--plain-launches", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--few-rows", type=int, default=FEW_ROWS, help="most rows of the five-kernel path")
    parser.add_argument("--one-kernel", action="store_true", help="one row of a small model as one kernel")
    arguments = parser.parse_args()
    if arguments.plain_launches:
        launch._can_launch_dependents = lambda index: False  # type: ignore[assignment]
    config = dict(MODELS[arguments.model])
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    with torch.inference_mode():
        decoder, head = random_decoder(config, arguments.few_rows, runs_as_one=arguments.one_kernel)
        ops, packed = GpuOps(few_rows=arguments.few_rows), GpuPacked(head, None, "head")
        for rows in arguments.rows:
            meta = decode_batch(rows, arguments.context)
            blocks = meta.block_table.numel()
            shape = (blocks, 2, config["num_key_value_heads"], BLOCK_SIZE, config["head_dim"])
            caches = [
                torch.randn(shape, dtype=torch.bfloat16, device="cuda")
                for _ in range(config["num_hidden_layers"])
            ]
            ids = torch.randint(0, 1000, (rows,), device="cuda")
            context = ForwardContext(meta, caches)

            def body(ids: torch.Tensor = ids, context: ForwardContext = context) -> torch.Tensor:
                return decoder.forward(ids, context.attention.positions, context)

            def whole() -> torch.Tensor:
                return ops.linear(body(), packed, torch.float32)

            spec = decoder.spec
            q = torch.randn(rows, spec.num_heads, spec.head_dim, dtype=torch.bfloat16, device="cuda")

            def attend(
                context: ForwardContext = context, q: torch.Tensor = q, spec: AttentionSpec = spec
            ) -> None:
                plans, out = plans_of(context.attention, spec, block_size=BLOCK_SIZE), torch.empty_like(q)
                scratch = decoder._scratch_for(context.attention, plans)
                for index, cache in enumerate(context.kv_caches):
                    for plan in plans:
                        attention.attend(q, cache, out, context.attention, spec, plan, scratch, index > 0)

            alone = milliseconds(capture(attend))
            logits = torch.randn(rows, config["vocab_size"], device="cuda") * 3
            ones = torch.ones(rows, device="cuda")
            seed = torch.arange(rows, device="cuda")
            top_k = torch.full((rows,), 50, dtype=torch.int32, device="cuda")
            columns = (top_k, ones * 0.9, ones * 0.0)

            def draw(
                columns: tuple[torch.Tensor, ...] | tuple[None, ...],
                logits: torch.Tensor = logits,
                ones: torch.Tensor = ones,
                seed: torch.Tensor = seed,
            ) -> torch.Tensor:
                top_k, top_p, min_p = columns
                return sample.draw(logits, ones, top_k, top_p, min_p, seed, seed)

            drawn = milliseconds(capture(lambda draw=draw: draw((None, None, None))))
            filtered = milliseconds(capture(lambda draw=draw, columns=columns: draw(columns)))
            both, only = milliseconds(capture(whole)), milliseconds(capture(body))
            least = limit(config, rows, arguments.context)
            print(
                json.dumps(
                    {
                        "model": arguments.model, "rows": rows, "context": arguments.context,
                        "ms": round(both, 3), "decoder_ms": round(only, 3),
                        "attention_ms": round(alone, 3),
                        "draw_ms": round(drawn, 3), "draw_top_k_p_ms": round(filtered, 3),
                        "limit_ms": round(least, 3),
                        "of_limit": round(least / both, 3),
                    }
                ),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
