"""The loop: schedule, execute, update, detokenize.

`Engine` is synchronous and single-threaded; `octavo.llm.LLM` drives it directly and
`octavo.engine.async_engine.AsyncLLM` from a thread. It owns the scheduler and talks to the muscle
through an executor; it never sees a tensor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Mapping, Sequence

from octavo.core.messages import ModelOutput, SchedulerOutput
from octavo.core.mix import mix64
from octavo.core.request import FinishReason, Request
from octavo.core.scheduler import RequestUpdate, Scheduler
from octavo.engine.detokenizer import IncrementalDetokenizer
from octavo.engine.energy_account import EnergyAccount
from octavo.engine.engine_stats import EngineStats
from octavo.engine.grammar import GrammarCompiler, Matcher
from octavo.engine.inputs import PromptInput
from octavo.engine.request_reader import EngineInfo, PreparedRequest, RequestReader, make_sequence
from octavo.engine.request_state import OutputKind, RequestState, Sample
from octavo.engine.row_masks import masks_of
from octavo.engine.stats import StatsLog, take_stats
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import EngineDeadError, RequestError
from octavo.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    SpeculationMetrics,
    SpeculationStep,
)
from octavo.sampling_params import SamplingParams
from octavo.speculation.suffix import SuffixGuesser
from octavo.worker.executor import Executor


class Engine:
    """Requests in, outputs out. `step` once for every step while `has_work`."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer | None,
        grammar: GrammarCompiler | None = None,
        log: StatsLog | None = None,
        suffix: SuffixGuesser | None = None,
    ) -> None:
        self.info = info
        self._log = log
        self.scheduler = scheduler
        self.executor = executor
        self.tokenizer = tokenizer
        self._reader = RequestReader(info, tokenizer, grammar)
        self._suffix = suffix
        self._depth = scheduler.config.pipeline_depth
        self._states: dict[str, RequestState] = {}
        self._samples: dict[str, tuple[RequestState, Sample]] = {}  # by the sequence's id
        self._arrivals = itertools.count()
        self._dead: BaseException | None = None
        self._speculation = SpeculationMetrics(synthetic=info.synthetic_acceptance)  # of all requests
        self._drafts: dict[int, list[int]] = {}  # by slot, the latest; only where a grammar runs
        self._energy: EnergyAccount | None = None
        self._num_sequences = 0  # in the latest step

    # ------------------------------------------------------------------ requests

    def add_request(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams,
        kind: OutputKind = "final",
        *,
        add_special_tokens: bool = True,
        arrival_time: float | None = None,
    ) -> None:
        """Queue a request. Raises RequestError, and keeps nothing of it, if it cannot be served."""
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        prepared = self.read_request(prompt, params, add_special_tokens=add_special_tokens)
        self.admit(request_id, prepared, kind, arrival_time=arrival_time)

    def read_request(
        self, prompt: PromptInput, params: SamplingParams, *, add_special_tokens: bool = True
    ) -> PreparedRequest:
        """Check, tokenize, compile: all that needs no engine state, so any thread may do it.

        Raises RequestError that says what to change.
        """
        return self._reader.read(prompt, params, add_special_tokens=add_special_tokens)

    def admit(
        self,
        request_id: str,
        prepared: PreparedRequest,
        kind: OutputKind = "final",
        *,
        arrival_time: float | None = None,
    ) -> None:
        """Queue what `read_request` made. Raises RequestError for an id in use, or best_of with a stream."""
        self._check_alive()
        params, given = prepared.params, prepared.prompt
        if request_id in self._states:
            raise RequestError(f"a request with id {request_id!r} is being served already", "request_id")
        if params.best_of is not None and kind != "final":
            raise RequestError("best_of cannot stream: which answers are best is known at the end", "best_of")
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        metrics = RequestMetrics(arrival_time, num_prompt_tokens=len(given.token_ids))
        if self.info.speculates:
            metrics.speculation = SpeculationMetrics(
                steps=[] if params.trace else None, synthetic=self.info.synthetic_acceptance
            )
        state = RequestState(request_id, given.text, given.token_ids, params, kind, metrics)
        arrival = next(self._arrivals)
        base_seed = mix64(self.info.seed, arrival) if params.seed is None else params.seed
        for index in range(params.num_samples):
            seed = mix64(base_seed, index)
            request = make_sequence(self.info, prepared, request_id, arrival, index, seed)
            detokenizer = None
            if self.tokenizer is not None:
                detokenizer = IncrementalDetokenizer(
                    self.tokenizer,
                    given.token_ids,
                    stop=params.stop,
                    include_stop_str_in_output=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens,
                    min_tokens=params.min_tokens,
                    continue_prompt=prepared.continue_prompt,
                )
            matcher = prepared.matcher
            sample = Sample(index, request, detokenizer, matcher.copy() if matcher is not None else None)
            state.samples.append(sample)
            self._samples[request.request_id] = (state, sample)
        self._states[request_id] = state
        for sample in state.samples:
            self.scheduler.add(sample.request)

    def rows_to_come(self, request_id: str) -> int:
        """Rows that the prompt of an admitted request brings: of one whose beginning is cached, one block."""
        sequence = self._states[request_id].samples[0].request
        kv = self.scheduler.kv
        return kv.block_size if kv.knows_beginning(sequence) else len(sequence.token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. Returns what it has so far, or None for an id that is not served."""
        state = self._states.get(request_id)
        if state is None:
            return None
        for sample in state.samples:
            if sample.finish_reason is None:
                self.scheduler.finish(sample.request.request_id, FinishReason.ABORT)
                self._close(sample, FinishReason.ABORT)
        del self._states[request_id]
        self._account(state)
        return state.output()

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._states)

    @property
    def speculation(self) -> SpeculationMetrics | None:
        """What speculation did for all requests since the start; None for an engine without."""
        if not self.info.speculates:
            return None
        total, planner = self._speculation, self.scheduler.planner
        account = planner.account() if planner is not None else None
        if account is not None:
            total.draft_seconds, total.verify_seconds = account.draft_seconds, account.verify_seconds
            total.num_cut, total.net_speedup = account.num_cut, account.net_speedup
        return total

    def stats(self) -> EngineStats:
        """What the engine holds and has done; for the thread that steps it."""
        energy = None if self._energy is None else self._energy.read()
        return take_stats(self.scheduler, self.speculation, energy)

    def measure_energy(self, account: EnergyAccount) -> None:
        """Tell each request that begins from now on what it cost in joules."""
        self._energy = account

    def has_work(self) -> bool:
        """True while a step could bring something."""
        return self._dead is None and self.scheduler.has_work()

    def shutdown(self) -> None:
        """Stop the executor; open requests get nothing more."""
        self.executor.shutdown()

    # ------------------------------------------------------------------ the step

    def step(self) -> list[RequestOutput]:
        """One step: launch what can be launched, read what is due.

        An exception in it leaves host and device apart: the engine is dead then, and says so.
        """
        self._check_alive()
        energy = self._energy
        try:
            if energy is not None:
                energy.begin_step()
            outputs = self._step()
            if energy is not None:
                energy.end_step(self._num_sequences)
        except BaseException as error:
            self._dead = error
            raise
        if self._log is not None:
            self._log.step(self.scheduler)
        return outputs

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self._dead!r}; make a new one") from self._dead

    def _step(self) -> list[RequestOutput]:
        out = self.scheduler.schedule()
        outputs: list[RequestOutput] = []
        if out is not None:
            self._note_first_schedule(out)
            self._num_sequences = len(out.row_keys)
            if self._suffix is not None:
                self._suggest(self._suffix, out)
            self.executor.launch(out)
            if out.needs_mask:  # grammars follow the tokens, so these must be in first
                while self.scheduler.num_unread_steps > 1:
                    outputs += self._process(self.executor.collect())
                masks = masks_of(out, self._matcher, self._drafts, self.info.vocab_size)
                self.executor.provide_masks(masks)
        if self.scheduler.num_unread_steps > (self._depth if out is not None else 0):
            outputs += self._process(self.executor.collect())
        return outputs

    def _process(self, output: ModelOutput) -> list[RequestOutput]:
        now = time.monotonic()
        touched: dict[str, RequestState] = {}
        for update in self.scheduler.update(output):
            state, sample = self._samples[update.request.request_id]
            if update.new_token_ids or update.finish_reason is not None:
                if state.metrics.first_token_time is None:
                    state.metrics.first_token_time = now
                self._add_tokens(state, sample, update, output.errors.get(update.request.key))
            if update.prompt_logprobs is not None and sample.index == 0:
                state.add_prompt_logprobs(update.prompt_logprobs, self.tokenizer)
            if sample.finish_reason is not None or (state.kind != "final" and update.new_token_ids):
                touched[state.request_id] = state
        self._drafts.update(output.drafts)
        outputs = []
        for state in touched.values():
            self._account(state)
            if state.finished:
                del self._states[state.request_id]
            if state.finished or state.kind != "final":
                outputs.append(state.output())
        return outputs

    def _add_tokens(
        self, state: RequestState, sample: Sample, update: RequestUpdate, error: str | None
    ) -> None:
        """Tokens of one step, to the first one that ends the request; the rest vanish."""
        tokens, reason = update.new_token_ids, update.finish_reason
        if error is not None:
            cause = sample.matcher.error if sample.matcher is not None else None
            reason, sample.error = FinishReason.ERROR, f"{error}: {cause}" if cause else error
        request, params = sample.request, state.params
        if sample.matcher is not None and tokens:
            sample.matcher.accept(tokens)
        num_accepted = update.num_accepted
        stop_token = reason is FinishReason.STOP and bool(tokens)
        if stop_token and tokens[-1] in params.stop_token_ids:
            sample.stop_reason = tokens[-1]
        detokenizer = sample.detokenizer
        if detokenizer is not None:
            sample.new_text += detokenizer.append(tokens, reason is not None, stop_token)
            if detokenizer.stop_reason is not None:  # a stop string, which came before all else
                kept = detokenizer.num_tokens
                vanished = request.num_output_tokens - kept
                num_accepted = min(num_accepted, len(tokens) - vanished)
                tokens = tokens[: len(tokens) - vanished]
                sample.stop_reason, reason = detokenizer.stop_reason, FinishReason.STOP
                if update.finish_reason is None:
                    self.scheduler.finish(request.request_id, FinishReason.STOP, kept)
                elif vanished:
                    del request.token_ids[request.num_prompt_tokens + kept :]
        speculation = state.metrics.speculation
        if speculation is not None and update.is_verify and update.new_token_ids:
            # A request that ends with an accepted draft has nothing to say about those behind it.
            cut = reason is not None and num_accepted == len(tokens)
            num_drafts = num_accepted if cut else update.num_drafts
            speculation.record(num_drafts, num_accepted)
            self._speculation.record(num_drafts, num_accepted)
            sample.drafts_held = 0 < num_drafts == num_accepted
            if speculation.steps is not None:
                drafts = self._drafts.get(request.key.slot, [])[:num_drafts]
                start = request.num_output_tokens - len(tokens)
                speculation.steps.append(SpeculationStep(drafts, num_accepted, *update.decision, start))
        if update.logprobs is not None:
            sample.add_logprobs(update.logprobs[: len(tokens)], tokens, self.tokenizer)
        if reason is not None:
            self._close(sample, reason)

    def _close(self, sample: Sample, reason: FinishReason) -> None:
        sample.finish_reason = reason
        if self._suffix is not None:
            request = sample.request
            keep = reason in (FinishReason.STOP, FinishReason.LENGTH)
            self._suffix.finish(
                request.request_id, _space(request), request.token_ids, request.num_prompt_tokens, keep
            )
        if sample.detokenizer is not None and reason is FinishReason.ABORT:
            sample.new_text += sample.detokenizer.append([], True)
        state, _ = self._samples.pop(sample.request.request_id)
        if self._energy is not None and sample.energy_mark is not None:
            joules = self._energy.since(sample.energy_mark, self._num_sequences)
            if joules is not None:
                state.metrics.energy_joules = (state.metrics.energy_joules or 0.0) + joules

    def _suggest(self, suffix: SuffixGuesser, out: SchedulerOutput) -> None:
        """Continuations for the requests that are asked for drafts. One with a prediction follows that."""
        for new in out.new_slots:
            suffix.moved(new.request_id)
        if not out.propose:
            return
        ids = {key.slot: key.request_id for key in out.row_keys}
        for slot, _ in out.propose:
            entry = self._samples.get(ids[slot])
            if entry is None or entry[1].request.prediction_ids:
                continue
            sample = entry[1]
            request = sample.request
            found = suffix.suggest(
                request.request_id, _space(request), slot, request.token_ids, sample.drafts_held
            )
            if found is not None:
                out.continuations.append(found)

    def _account(self, state: RequestState) -> None:
        """What speculation cost and brought the request so far."""
        speculation, planner = state.metrics.speculation, self.scheduler.planner
        if speculation is None or planner is None:
            return
        accounts = [planner.account(sample.request) for sample in state.samples]
        known = [account for account in accounts if account is not None]
        if not known:
            return
        speculation.draft_seconds = sum(account.draft_seconds for account in known)
        speculation.verify_seconds = sum(account.verify_seconds for account in known)
        speculation.num_cut = sum(account.num_cut for account in known)
        speculation.net_speedup = sum(account.net_speedup for account in known) / len(known)

    def _matcher(self, sequence_id: str) -> Matcher | None:
        entry = self._samples.get(sequence_id)  # gone if it has just ended
        return None if entry is None else entry[1].matcher

    def _note_first_schedule(self, out: SchedulerOutput) -> None:
        for new in out.new_slots:
            entry = self._samples.get(new.request_id)
            if entry is None:
                continue
            state, sample = entry
            if state.metrics.first_scheduled_time is None:
                state.metrics.first_scheduled_time = time.monotonic()
            if self._energy is not None and sample.energy_mark is None:
                sample.energy_mark = self._energy.mark()


def _space(request: Request) -> Hashable:
    """Whose outputs a request may be drafted from."""
    return request.params.cache_salt or ""


def failed_output(request_id: str, prompt: PromptInput, error: RequestError) -> RequestOutput:
    """The output of a request that could not be served at all."""
    given = prompt.get("prompt", prompt.get("prompt_token_ids")) if isinstance(prompt, Mapping) else prompt
    text = given if isinstance(given, str) else None
    ids = list(given) if isinstance(given, Sequence) and text is None else []
    completion = CompletionOutput(index=0, finish_reason="error", error=str(error))
    return RequestOutput(request_id, text, ids, outputs=[completion], finished=True)
