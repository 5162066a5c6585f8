"""What a GPU worker is built from: kernels, graphs, and the memory they take beside the KV cache.

The counterpart of the CPU's part of octavo/worker/build.py. Triton is imported where a kernel is
first asked for: a machine without a GPU never comes there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo import platform
from octavo.attention.backend import AttentionMetadata, ForwardContext
from octavo.attention.triton_backend import TritonBackend
from octavo.config import EngineConfig
from octavo.errors import ConfigError, InsufficientMemoryError
from octavo.kernels import triton as triton_kernels
from octavo.layers.ops import Kernels
from octavo.models.decoder import CausalLM
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.sampler import DrawKernels, Sampler
from octavo.speculation.acceptance import Acceptance, SyntheticAcceptance
from octavo.speculation.lookup import MIN_MATCH
from octavo.speculation.proposer import Proposer
from octavo.worker.cuda_graph import CudaGraphs, Forward, StepBuffers
from octavo.worker.graph_sizes import GraphSizes
from octavo.worker.input_batch import MAX_DRAFTS, DeviceState
from octavo.worker.kv_cache import MemoryPlan
from octavo.worker.prefix_groups import PrefixGroups
from octavo.worker.step_math import StepMath
from octavo.worker.warm_up import warm_up

if TYPE_CHECKING:
    # they import Triton
    from octavo.kernels.triton.decoder import FusedDecoder
    from octavo.kernels.triton.step import SlotDraws
    from octavo.worker.gpu_draft_passes import GpuDraftPasses
    from octavo.worker.model_runner import ModelRunner
    from octavo.worker.whole_step import WholeSteps

GRAPH_ROWS = 512  # steps of more rows hide their launches behind matrices
DETERMINISTIC_ROWS = 128  # up to so many rows one family of kernels computes every row alike
NARROWEST_TILE = 8  # rows and heads that attention packs into one product, at least
# Rows of a request that graphs which verify pack together. Where it has more they take two tiles, which read
# the same keys and values at the same time; wider tiles would be slower where it has fewer.
VERIFY_ROWS = 4

MIB, GIB = 1 << 20, 1 << 30
# The driver's context, the modules of kernels and the libraries' workspaces. On an H200 the context alone
# takes 527 MiB.
CONTEXT = 700 * MIB


@dataclass(frozen=True)
class GpuKernels:
    """The Triton kernels, as this configuration uses them."""

    ops: Kernels
    backend: TritonBackend
    draw: DrawKernels


def why_not_triton(config: EngineConfig) -> str | None:
    """Why the Triton kernels do not run here; None if they do."""
    return platform.why_not_triton(config.platform, triton_kernels.available())


def gpu_kernels(config: EngineConfig) -> GpuKernels:
    """The Triton kernels. Raises ConfigError for a deterministic=True that they cannot keep."""
    from octavo.models.gpu_ops import GpuOps
    from octavo.sampling.gpu_draw import GpuDraw

    if not config.args.deterministic:
        return GpuKernels(GpuOps(), TritonBackend(), GpuDraw())
    if config.dtype == "float16":
        raise ConfigError(
            "deterministic=True on a GPU computes in bfloat16 or float32, not in float16: set dtype"
        )
    if config.max_num_batched_tokens > DETERMINISTIC_ROWS:
        raise ConfigError(
            f"deterministic=True on a GPU needs steps of at most {DETERMINISTIC_ROWS} rows, where every row "
            f"is computed alike; set max_num_batched_tokens={DETERMINISTIC_ROWS} (not "
            f"{config.max_num_batched_tokens}), or leave it open"
        )
    every = (torch.bfloat16, torch.float32)
    ops = GpuOps(every, few_rows=DETERMINISTIC_ROWS, one_tiling=True)
    return GpuKernels(ops, TritonBackend(one_tiling=True), GpuDraw())


def gpu_draft_ops(config: EngineConfig, ops: Kernels) -> Kernels:
    """The kernels of a draft model, where the target has `ops`: its own, which run one row as one kernel.

    The bits of that kernel differ from those of steps of more rows. A draft model's bits change no text; with
    deterministic=True it takes the target's kernels all the same.
    """
    from octavo.models.gpu_ops import GpuOps

    return ops if config.args.deterministic else GpuOps(runs_as_one=True)


def check_deterministic(model: CausalLM, ops: Kernels) -> None:
    """Raise ConfigError if a model's rows would not be computed alike."""
    from octavo.models.gpu_ops import GpuOps

    decoder = ops.decoder if isinstance(ops, GpuOps) else None
    if not model.is_fused or decoder is None or decoder.few_rows < DETERMINISTIC_ROWS:
        raise ConfigError(
            "deterministic=True: this model's shape (head size, or hidden size not a multiple of 64) takes "
            "the library's products on a GPU, whose bits depend on the number of rows. Use device='cpu'"
        )


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn the device's refusal during a start into an InsufficientMemoryError with the options that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        release_memory()
        free, total = platform.gpu_memory() if torch.cuda.is_available() else (0, 0)
        raise InsufficientMemoryError(
            "the GPU ran out of memory while the engine started "
            f"({free / GIB:.1f} of {total / GIB:.1f} GiB are free now): {str(error).splitlines()[0]}\n"
            "Lower gpu_memory_utilization, kv_cache_memory, max_num_batched_tokens or max_num_seqs, or end "
            "what else runs on this GPU."
        ) from error


def spare_the_collector() -> None:
    """Keep Python's garbage collector from walking what was imported, and what an engine is made of.

    torch and triton bring some 190,000 objects. A full collection looks at each of them, which takes
    about a tenth of a second, and comes in the middle of a step: a hundred steps of a small model.
    """
    gc.freeze()


def release_memory() -> None:
    """Give back to the device what nothing uses any more. Engines hold themselves in cycles."""
    gc.unfreeze()  # see spare_the_collector
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def check_gpu_is_free(budget: int, share: float) -> None:
    """Raise InsufficientMemoryError if others hold so much of the GPU that `budget` bytes are not left."""
    if not torch.cuda.is_available():  # planning for another machine
        return
    free, total = platform.gpu_memory()
    left = free + min(total - free, CONTEXT)  # what this process holds already is its own
    if budget > left:
        possible = max(0.0, left / total - 0.005)
        raise InsufficientMemoryError(
            f"gpu_memory_utilization={share} asks for {budget / GIB:.1f} GiB, and {left / GIB:.1f} of "
            f"{total / GIB:.1f} GiB are free: other processes hold the rest.\n"
            f"Set gpu_memory_utilization to at most {possible:.2f}, or end what runs on this GPU."
        )


def graph_sizes_of(config: EngineConfig) -> GraphSizes:
    """The sizes that graphs are captured for."""
    most, shares = min(GRAPH_ROWS, config.max_num_batched_tokens), shares_prefixes(config)
    tile = max(1, NARROWEST_TILE * config.model.num_kv_heads // config.model.num_heads)
    if config.draft is None and 1 + most_drafts(config) <= tile:
        return GraphSizes.up_to(most, shares)
    return GraphSizes.with_drafts(most, config.max_num_seqs, tile, shares)


def draft_graph_sizes_of(config: EngineConfig) -> GraphSizes:
    """The same for the draft model: however few draft, each has its prompt to catch up."""
    rows = 2 * config.max_num_seqs
    return GraphSizes.of_a_draft_model(min(GRAPH_ROWS, rows), config.max_num_batched_tokens + rows)


def shares_prefixes(config: EngineConfig) -> bool:
    """True if prefixes that requests share are read once. A row's last bits then depend on who shares."""
    return not config.args.deterministic and set(config.model.sliding_windows) == {None}


def gpu_steps(config: EngineConfig, state: DeviceState) -> tuple[StepMath, StepBuffers]:
    """The arithmetic around a forward, and the buffers it writes each step into."""
    from octavo.kernels.triton import attention, shared
    from octavo.worker.gpu_step import GpuStep

    rows, requests = config.max_num_batched_tokens, state.num_slots
    usual = min(1 + most_drafts(config), VERIFY_ROWS)
    if not shares_prefixes(config):
        buffers = StepBuffers.allocate(rows, requests, state.block_table, usual_query_len=usual)
        return GpuStep(state, buffers, graph_sizes_of(config)), buffers
    tile_rows = shared.tile_rows(config.model.num_heads // config.model.num_kv_heads)
    buffers = StepBuffers.allocate(rows, requests, state.block_table, tile_rows, usual)
    prefixes = PrefixGroups(
        requests, state.block_table.shape[1], state.block_size, tile_rows, attention.GROUP
    )
    return GpuStep(state, buffers, graph_sizes_of(config), prefixes), buffers


def gpu_sampling(config: EngineConfig, device: torch.device) -> SamplingSlots:
    """Sampling settings of all slots; what changes logits lies on the device."""
    from octavo.sampling.device_rules import DeviceRules

    return SamplingSlots(
        config.max_num_seqs, DeviceRules(config.max_num_seqs, config.model.vocab_size, device)
    )


def gpu_lookup(state: DeviceState, *, prompt: bool, min_match: int = MIN_MATCH) -> Proposer:
    """Drafts from the text itself, made on the device."""
    from octavo.kernels.triton.step import SlotTables
    from octavo.speculation.gpu_lookup import GpuLookup

    tables = SlotTables(
        state.tokens, state.block_table, state.stop_ids, state.num_tokens, state.num_computed,
        state.num_drafts, state.limit, state.finished, state.block_size,
    )  # fmt: skip
    return GpuLookup(tables, prompt=prompt, min_match=min_match)


def gpu_graphs(
    config: EngineConfig,
    model: CausalLM,
    kv_caches: list[torch.Tensor],
    steps: StepMath,
    buffers: StepBuffers,
    acceptance: Acceptance | None,
) -> tuple[CudaGraphs, WholeSteps]:
    """The graphs of the target's steps, to be captured."""
    from octavo.worker.gpu_step import GpuStep
    from octavo.worker.whole_step import WholeSteps

    assert isinstance(steps, GpuStep)
    synthetic = acceptance if isinstance(acceptance, SyntheticAcceptance) else None
    whole = WholeSteps(steps, buffers, model, whole_step_rows(config), synthetic)
    forward, rehearsal = _forward_of(model, kv_caches), _rehearsal_of(model)
    graphs = CudaGraphs(forward, graph_sizes_of(config), buffers, model.max_model_len, whole, rehearsal)
    return graphs, whole


def make_ready(config: EngineConfig, runner: ModelRunner, sampler: Sampler, plan: MemoryPlan) -> None:
    """Compile what is missing, capture all graphs, and launch once what lies in none."""
    from octavo.worker.compile_ahead import compile_what_is_missing

    graphs = [] if runner.graphs is None else [runner.graphs]
    models = [runner.model]
    network = None if runner.draft_model is None else runner.draft_model.network
    if isinstance(network, GraphedNetwork):
        graphs.append(network.graphs)
        models.append(network.model)
    elif isinstance(network, CausalLM):
        models.append(network)

    def launch_the_rest(reads: bool) -> None:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(_rehearsal_of(model)())
            warm_up(
                runner, sampler, max_step_rows=config.max_num_batched_tokens,
                block_size=config.args.block_size, num_blocks=plan.num_blocks,
                num_draft_blocks=plan.num_draft_blocks, reads=reads,
            )  # fmt: skip

    def launch_all() -> None:
        for each in graphs:
            for key in each.keys:
                each.rehearse(key)
        launch_the_rest(reads=False)
        if runner.whole_steps is not None:
            runner.whole_steps.start_over()

    with torch.inference_mode():
        compile_what_is_missing(config, launch_all)
        for each in graphs:
            each.capture_all()
        for model in models:
            decoder = _fused_decoder(model)
            if decoder is not None:
                decoder.load_products(config.max_num_batched_tokens)
    launch_the_rest(reads=True)
    spare_the_collector()


def whole_step_rows(config: EngineConfig) -> int:
    """Rows of the largest graph that ends with tokens: one for each row there may be to draw."""
    sizes = graph_sizes_of(config)
    return sizes.padded(config.max_num_seqs * (1 + most_drafts(config))) or sizes.largest


def most_drafts(config: EngineConfig) -> int:
    """Drafts of a request and step, at most."""
    return 0 if config.speculative is None else config.speculative.num_speculative_tokens or MAX_DRAFTS


def _forward_of(model: CausalLM, kv_caches: list[torch.Tensor]) -> Forward:
    def forward(input_ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        return model.forward(input_ids, metadata.positions, ForwardContext(metadata, kv_caches))

    return forward


def _fused_decoder(model: CausalLM) -> FusedDecoder | None:
    from octavo.kernels.triton.decoder import FusedDecoder

    decoder = getattr(model.fused, "__self__", None)
    return decoder if isinstance(decoder, FusedDecoder) else None


def _rehearsal_of(model: CausalLM) -> Callable[[], AbstractContextManager[None]]:
    """In it a forward of this model launches every kernel, and not every layer."""
    decoder = _fused_decoder(model)
    return nullcontext if decoder is None else decoder.rehearsal


def _one_row_context(model: CausalLM) -> int | None:
    """The longest context for which one row of this model takes other kernels; None if it never does."""
    decoder = _fused_decoder(model)
    return None if decoder is None else decoder.one_row_context


class GraphedNetwork:
    """A draft model whose passes are replayed; see octavo.speculation.draft_model.DraftNetwork."""

    def __init__(self, model: CausalLM, graphs: CudaGraphs) -> None:
        self.device = model.device
        self.model = model
        self.graphs = graphs

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[num_tokens, hidden], or of the rows that `ctx` wants; valid until the next pass"""
        step = ctx.attention
        if self.graphs.replays(step):
            return self.graphs.replay(input_ids, step, ctx.wanted)
        return self.model.forward(input_ids, positions, ctx)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size] float32"""
        return self.model.logits(hidden)


def gpu_draft_model(
    config: EngineConfig,
    model: CausalLM,
    kv_caches: list[torch.Tensor],
    state: DeviceState,
    sampling: SamplingSlots,
    draws: SlotDraws,
    records: bool,
) -> tuple[GraphedNetwork | CausalLM, GpuDraftPasses]:
    """A loaded draft model with its passes, and with graphs to be captured unless the user wants none.

    `records`: what drafts are drawn from is recorded.
    """
    from octavo.worker.gpu_draft_passes import GpuDraftPasses
    from octavo.worker.whole_pass import WholePasses

    rows = 2 * config.max_num_seqs
    sizes = None if config.args.enforce_eager else draft_graph_sizes_of(config)
    passes = GpuDraftPasses(state, sizes, max_rows=rows + max(GRAPH_ROWS, config.max_num_batched_tokens))
    if sizes is None:
        return model, passes
    whole = None
    if model.config.vocab_size == config.model.vocab_size:  # another vocabulary is fitted outside of a graph
        whole = WholePasses(passes.tables, draws, passes.buffers, model, sizes.short[-1])
    graphs = CudaGraphs(
        _forward_of(model, kv_caches), sizes, passes.buffers, model.max_model_len, whole,
        _rehearsal_of(model), one_row_context=_one_row_context(model),
    )  # fmt: skip
    if whole is not None:
        whole.graphs = graphs
        passes.use_graphs(whole, sampling, records)
    return GraphedNetwork(model, graphs), passes


def gpu_workspace(config: EngineConfig, longest: int) -> int:
    """Bytes that a GPU worker holds beside weights, KV cache and slots; an upper bound, and close."""
    model, itemsize = config.model, int(getattr(torch, config.dtype).itemsize)
    hidden, width, heads = model.hidden_size, model.intermediate_size, model.num_heads
    rows, graphed = config.max_num_batched_tokens, min(GRAPH_ROWS, config.max_num_batched_tokens)
    q_and_kv = (heads + 2 * model.num_kv_heads) * model.head_dim
    # octavo/kernels/triton/many_rows.py: a layer's buffers stay while the others are launched
    a_row = (4 * hidden + 3 * width + q_and_kv + 2 * heads * model.head_dim) * itemsize
    sizes = graph_sizes_of(config)
    results = sum(key.rows for key in sizes.keys) * hidden * itemsize  # what each graph returns
    sampled = min(config.max_num_seqs * (1 + most_drafts(config)), max(rows, config.max_num_seqs))
    logits = (sampled + whole_step_rows(config)) * model.vocab_size * 4
    # octavo/kernels/triton/decoder.py: partial sums of products, and of attention's shared groups
    few = DETERMINISTIC_ROWS if config.args.deterministic else 64
    products = (16 * hidden + 4 * max(q_and_kv, 2 * width)) * few * 4
    shared = 32 * heads * -(-longest // 128) * (model.head_dim + 2) * 4
    prefixes = max(sizes.shared, default=0) * heads * 8 * (model.head_dim + 2) * 4
    earlier = min(65_536, config.max_num_seqs * longest)  # octavo/kernels/triton/prompt.py: gathered
    gathered = earlier * 2 * model.num_kv_heads * model.head_dim * itemsize
    rotary = 2 * longest * (model.head_dim // 2) * 4
    # octavo/sampling/device_rules.py: counters of penalties, masks of allowed tokens
    rules = 64 * model.vocab_size * 4 + config.max_num_seqs * model.vocab_size // 8
    return (
        CONTEXT
        + rules
        + (rows + graphed) * a_row
        + results
        + logits
        + products
        + shared
        + prefixes
        + gathered
        + rotary
    )
