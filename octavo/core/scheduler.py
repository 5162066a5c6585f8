"""Who computes what in each step: one token budget, no phases.

Every running request has tokens that are computed and tokens that are known; `schedule` hands out
rows that close the gap. A request whose last known token was launched is *decoding*: it gets one
row, and one more for each draft proposed at the end of its previous step. Decoding requests come
first, then chunks of running prompts, then new requests, so that a long prompt never stalls the
others.

`schedule` may be called before the previous step's output was read (pipeline depth 1). `update`
reads outputs in the order of the steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.admission import Room, WaitingQueue
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import DraftPlanner
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.launched_step import LaunchedStep, assert_inflight
from octavo.core.messages import (
    Finish,
    ModelOutput,
    PromptLogprobs,
    RowKind,
    Rows,
    SchedulerOutput,
    SlotBlocks,
    TokenLogprobs,
)
from octavo.core.request import FinishReason, Request, Status
from octavo.core.slots import Slots
from octavo.core.step_drafts import propose, report


@dataclass(slots=True)
class RequestUpdate:
    """What one step brought to one request."""

    request: Request
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    is_verify: bool = False
    num_drafts: int = 0
    num_accepted: int = 0
    decision: tuple[int, str] = (0, "")  # with trace: the drafts asked for in this verify, and why


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_chunk_rows: int = 0
    num_verify_rows: int = 0


class Scheduler:
    """The brain's one entry: add, abort, schedule, update.

    `planner` says how many drafts to make at the end of a step; None: no speculation. `draft_kv` is
    the cache of a draft model, if there is one. Not thread-safe: one engine loop owns it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        planner: DraftPlanner | None = None,
        draft_kv: DraftKV | None = None,
    ) -> None:
        self.config = config
        self.kv = KVCacheManager(cache.num_blocks, cache.block_size)
        self.planner = planner
        self.draft_kv = draft_kv
        self.stats = SchedulerStats()
        self.requests: dict[str, Request] = {}  # waiting and running
        self._slots = Slots(config.max_num_seqs, self.kv, draft_kv)
        self.running = self._slots.running  # by Request.order
        self._unsent = self._slots.unsent
        self._waiting = WaitingQueue(self.kv, config.watermark_blocks, config.least_chunk_rows)
        self._launched: deque[LaunchedStep] = deque()
        self._step_id = 0

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queue a new request. Its prompt must fit the KV cache; the engine has checked that."""
        assert request.request_id not in self.requests, f"{request} was added twice"
        assert self.kv.blocks_for(request.limit) <= len(self.kv.pool.blocks), f"{request} never fits"
        self.requests[request.request_id] = request
        self._waiting.push(request)

    def finish(self, request_id: str, reason: FinishReason, num_output_tokens: int | None = None) -> None:
        """End a request from the host: an abort, a timeout, a stop string.

        `num_output_tokens` keeps only the first ones: what followed a stop string vanishes.
        An unknown id is ignored, because the request may just have ended by itself.
        """
        request = self.requests.get(request_id)
        if request is None:
            return
        if num_output_tokens is not None:
            del request.token_ids[request.num_prompt_tokens + num_output_tokens :]
        self._end(request, reason)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and are not zombies."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self.requests) - len(self.running)

    @property
    def num_unread_steps(self) -> int:
        """Steps launched and not yet read."""
        return len(self._launched)

    def has_work(self) -> bool:
        """True while some request has not ended or some step was not read."""
        return bool(self.requests or self._launched)

    # ------------------------------------------------------------------ one step

    def schedule(self) -> SchedulerOutput | None:
        """Build the next step, or None if no request can go on before an output is read."""
        out = SchedulerOutput(self._step_id)
        step = LaunchedStep(self._step_id)
        budget = self.config.max_num_batched_tokens
        budget = self._schedule_decodes(out, step, budget)
        left = self._schedule_chunks(out, step, budget)
        self._admit(out, step, left, has_chunks=left < budget)
        if not out.rows:
            return None
        # Only a step that is launched may carry slot changes: what was freed while nothing could
        # run waits for the next one.
        out.freed_slots = self._slots.take_freed()
        if self.planner is not None:
            propose(
                self.planner,
                self.draft_kv,
                out,
                step,
                self.running,
                self.kv.pool.num_free * self.kv.block_size,
                self.config.max_num_batched_tokens,
            )
        self._launched.append(step)
        self._step_id += 1
        self.stats.num_steps += 1
        return out

    def _schedule_decodes(self, out: SchedulerOutput, step: LaunchedStep, budget: int) -> int:
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            if not request.decoding:
                continue
            room = request.limit - request.num_tokens - request.num_inflight_samples
            if room <= 0:
                continue  # what is in flight ends it for certain
            num_rows = min(1 + request.num_proposed, room, budget)
            # KV of the last token is never needed, so a request holds at most limit - 1 of it.
            reach = request.num_computed_tokens + request.num_inflight_tokens + num_rows
            reach = min(reach, request.limit - 1)
            if reach > request.capacity and not self._grow(request, reach, out):
                continue
            self._emit(request, num_rows, RowKind.VERIFY, True, out, step)
            budget -= num_rows
        return budget

    def _schedule_chunks(self, out: SchedulerOutput, step: LaunchedStep, budget: int) -> int:
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            if request.decoding:
                continue
            num_rows = self._chunk_rows(request, budget)
            reach = request.num_computed_tokens + request.num_inflight_tokens + num_rows
            if reach > request.capacity and not self._grow(request, reach, out):
                continue
            self._emit_chunk(request, num_rows, out, step)
            budget -= num_rows
        return budget

    def _admit(self, out: SchedulerOutput, step: LaunchedStep, budget: int, has_chunks: bool) -> None:
        owed = sum(self.kv.blocks_for(r.num_tokens) - len(r.blocks) for r in self.running if not r.decoding)
        room = Room(self._step_id, budget, bool(self.running), has_chunks, owed)
        while room.rows > 0 and self._slots.has_free and (taken := self._waiting.take(room)):
            request, prefix = taken
            self._slots.enter(request, prefix)
            num_rows = self._chunk_rows(request, room.rows)
            new = self.kv.grow(request, request.num_computed_tokens + num_rows)
            assert new is not None, "admission counted wrongly"
            out.new_slots.append(self._slots.message(request))
            self._emit_chunk(request, num_rows, out, step)
            room.owed += self.kv.blocks_for(request.num_tokens) - len(request.blocks)
            room.rows -= num_rows
            room.is_busy = room.has_chunks = True

    def _chunk_rows(self, request: Request, budget: int) -> int:
        known = request.num_tokens - request.num_computed_tokens - request.num_inflight_tokens
        return min(known, budget, self.config.max_chunk_tokens)

    def _emit_chunk(self, request: Request, num_rows: int, out: SchedulerOutput, step: LaunchedStep) -> None:
        reach = request.num_computed_tokens + request.num_inflight_tokens + num_rows
        self.kv.register(request, reach)
        samples = reach == request.num_tokens
        request.decoding = samples
        self._emit(request, num_rows, RowKind.CHUNK, samples, out, step)

    def _emit(
        self,
        request: Request,
        num_rows: int,
        kind: RowKind,
        samples: bool,
        out: SchedulerOutput,
        step: LaunchedStep,
    ) -> None:
        if request in self._unsent:
            out.new_slots.append(self._slots.message(request))
        rows = Rows(request.slot, num_rows, kind, samples)
        out.rows.append(rows)
        out.row_keys.append(request.key)
        # Of the drafts this step verifies; `propose` will set that of the next one.
        request.verified_decision = request.decision
        if kind is RowKind.VERIFY:
            self.stats.num_verify_rows += num_rows
            step.num_verify += 1
            if num_rows > 1:
                step.drafting.append(len(step.requests))
        else:
            self.stats.num_chunk_rows += num_rows
            step.chunk_rows += num_rows
        step.num_rows += num_rows
        step.requests.append(request)
        step.rows.append(rows)
        request.num_inflight_steps += 1
        request.num_inflight_tokens += num_rows
        request.num_proposed = 0
        if not samples:
            return
        request.num_inflight_samples += 1
        if request.uses_mask:
            out.mask_slots.append(request.slot)

    # ------------------------------------------------------------------ blocks

    def _grow(self, request: Request, num_tokens: int, out: SchedulerOutput) -> bool:
        """Give `request` blocks for `num_tokens`, preempting the last requests in order if need be.

        False if it cannot run in this step: it waits for blocks that zombies return when their
        last step is read, or that requests before it return when they end.
        """
        while (new := self.kv.grow(request, num_tokens)) is None:
            missing = self.kv.blocks_for(num_tokens) - len(request.blocks)
            if missing <= self.kv.pool.num_free + self._slots.num_zombie_blocks():
                return False
            victim = self._victim(request, out)
            if victim is None:
                return False
            self._preempt(victim)
        if new and request not in self._unsent:
            out.new_blocks.append(SlotBlocks(request.slot, new))
        return True

    def _victim(self, request: Request, out: SchedulerOutput) -> Request | None:
        """The last request behind `request` in order that has no rows in this step.

        A request is never its own victim: it keeps its blocks and waits, because whoever goes
        before it can take them and whoever goes behind it will end.
        """
        scheduled = set(out.row_keys)
        for candidate in reversed(self.running):
            if candidate is request:
                return None
            if candidate.key not in scheduled:
                return candidate
        return None

    def _preempt(self, request: Request) -> None:
        """Back to the queue; what is known is kept and computed again after the next admission."""
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._slots.leave(request)
        self._waiting.push(request)

    def drop_device_state(self) -> None:
        """Have every slot sent anew. Only between steps, when everything launched was read."""
        assert not self._launched, "read every launched step first"
        self._slots.send_anew()

    # ------------------------------------------------------------------ outputs

    def update(self, output: ModelOutput) -> list[RequestUpdate]:
        """Read the oldest unread step. Requests that ended meanwhile are left out."""
        step = self._launched.popleft()
        assert output.step_id == step.step_id, f"step {output.step_id} read, {step.step_id} expected"
        updates: list[RequestUpdate] = []
        from_model: set[Request] = set()
        for index, (request, rows) in enumerate(zip(step.requests, step.rows, strict=True)):
            request.num_inflight_steps -= 1
            request.num_inflight_tokens -= rows.num_rows
            request.num_inflight_samples -= rows.samples
            if request.status is not Status.FINISHED:
                updates.append(self._update_one(request, rows, output, index))
            by_model = rows.slot in output.drafted_by_model
            if self.draft_kv is not None and rows.samples and self.draft_kv.read(request, by_model):
                from_model.add(request)
            if request.status is not Status.RUNNING:
                self._slots.read(request)
        if self.draft_kv is not None:
            self.draft_kv.release(step.draft_blocks)
        if self.planner is not None:
            report(self.planner, step, output, from_model)
        return updates

    def _update_one(self, request: Request, rows: Rows, output: ModelOutput, index: int) -> RequestUpdate:
        tokens = output.tokens[index]
        decision = request.verified_decision
        if rows.kind is RowKind.CHUNK:
            request.num_computed_tokens += rows.num_rows
        else:
            request.num_computed_tokens += len(tokens)
        request.token_ids += tokens
        # Blocks filled by generated tokens; those of chunks were registered when scheduled.
        if request.status is Status.RUNNING and rows.kind is RowKind.VERIFY:
            self.kv.register(request, request.num_computed_tokens)
        finish = output.finished[index]
        reason: FinishReason | None = None
        if finish is not Finish.NO:
            reason = FinishReason.STOP if finish is Finish.STOP else FinishReason.LENGTH
            self._end(request, reason)
        return RequestUpdate(
            request=request,
            new_token_ids=tokens,
            finish_reason=reason,
            logprobs=output.logprobs[index],
            prompt_logprobs=output.prompt_logprobs[index],
            is_verify=rows.kind is RowKind.VERIFY,
            num_drafts=output.num_drafts_valid[index],
            num_accepted=output.num_accepted[index],
            decision=decision,
        )

    def _end(self, request: Request, reason: FinishReason) -> None:
        running = request.status is Status.RUNNING
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]
        if running:
            self._slots.leave(request)
        # A waiting one leaves the queue lazily; a preempted zombie is released by update().

    # ------------------------------------------------------------------ checks

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two calls. For tests; O(everything)."""
        holders = self._slots.holders()
        self.kv.check_integrity(holders)
        self._slots.check_integrity()
        if self.draft_kv is not None:
            self.draft_kv.check_integrity(self.running, [step.draft_blocks for step in self._launched])
        for request in self.running:
            assert request.num_inflight_tokens >= 0, f"{request}: negative in flight"
            assert request.num_tokens <= request.limit, f"{request} is over its limit"
            assert request.num_registered_blocks <= len(request.blocks), f"{request}: registered"
        assert_inflight(holders, self._launched)
