"""From what a caller asks for to what the scheduler runs.

`RequestReader` checks, tokenizes and compiles, and touches nothing of an engine: any thread may use it
beside the steps. `make_sequence` then makes one of a request's samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.core.request import Request
from octavo.engine.grammar import GrammarCompiler, Matcher
from octavo.engine.inputs import Prompt, PromptInput, read_prompt
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError
from octavo.sampling.batch import bad_word_spellings
from octavo.sampling_params import SamplingParams


@dataclass(frozen=True)
class EngineInfo:
    """What the engine must know of the model."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    seed: int
    enable_prefix_caching: bool
    speculates: bool = False
    reads_predictions: bool = True  # some drafter follows SamplingParams(prediction=…)
    synthetic_acceptance: bool = False  # drafts are accepted by coins: the text means nothing


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was checked and tokenized, and touches no engine state yet."""

    prompt: Prompt
    params: SamplingParams
    prediction: tuple[int, ...]
    matcher: Matcher | None
    bad_words_ids: tuple[tuple[int, ...], ...]
    continue_prompt: bool  # the text goes on from the prompt's, its leading space included


class RequestReader:
    """Reads requests for one model."""

    def __init__(
        self, info: EngineInfo, tokenizer: Tokenizer | None, grammar: GrammarCompiler | None = None
    ) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._grammar = grammar

    def read(
        self, prompt: PromptInput, params: SamplingParams, *, add_special_tokens: bool = True
    ) -> PreparedRequest:
        """A request that can be served. Raises RequestError that says what to change."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be a SamplingParams, not {type(params).__name__}", "sampling_params"
            )
        params.check_for_model(self._info.vocab_size)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this engine has none", "stop")
        if params.bad_words and self._tokenizer is None:
            raise RequestError("bad_words needs a tokenizer, and this engine has none", "bad_words")
        given = read_prompt(
            prompt,
            self._tokenizer,
            self._info.vocab_size,
            self._info.max_model_len,
            add_special_tokens=add_special_tokens,
        )
        matcher = None
        if params.structured_outputs is not None:
            matcher = self._compile_grammar(params.structured_outputs)
        return PreparedRequest(
            given,
            params,
            self._prediction(params),
            matcher,
            self._bad_words(params),
            # A completion goes on from its prompt, space included; a chat answer stands alone.
            continue_prompt=add_special_tokens,
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        tokenizer = self._tokenizer
        assert tokenizer is not None
        return tuple(
            bad_word_spellings(
                params.bad_words, lambda text: tokenizer.encode(text, add_special_tokens=False)
            )
        )

    def _prediction(self, params: SamplingParams) -> tuple[int, ...]:
        if params.prediction is None:
            return ()
        if not self._info.speculates:
            raise RequestError(
                "prediction needs speculative decoding; start the engine with "
                "speculative={'method': 'predicted'} (or 'prompt_lookup')",
                "prediction",
            )
        if not self._info.reads_predictions:
            raise RequestError(
                "this engine's drafter follows no prediction; start the engine with the method hybrid (which "
                "has a draft model as well), prompt_lookup, suffix or predicted, or leave the prediction out",
                "prediction",
            )
        prediction = params.prediction
        if isinstance(prediction, str):
            if self._tokenizer is None:
                raise RequestError(
                    "a prediction given as text needs a tokenizer; give token ids", "prediction"
                )
            prediction = self._tokenizer.encode(prediction, add_special_tokens=False)
        if len(prediction) > self._info.max_model_len:
            raise RequestError(
                f"the prediction has {len(prediction)} tokens and the context holds "
                f"{self._info.max_model_len}; shorten it",
                "prediction",
            )
        return tuple(prediction)

    def _compile_grammar(self, structured_outputs: Mapping[str, Any]) -> Matcher:
        if self._info.synthetic_acceptance:
            raise RequestError(
                "structured_outputs cannot be had with synthetic_acceptance_rates: the text that follows an "
                "accepted draft belongs to another one, and no grammar can follow both",
                "structured_outputs",
            )
        if self._grammar is None:
            raise RequestError(
                "structured_outputs needs a tokenizer, and this engine has none", "structured_outputs"
            )
        return self._grammar.compile(structured_outputs)


def make_sequence(
    info: EngineInfo, prepared: PreparedRequest, request_id: str, arrival: int, index: int, seed: int
) -> Request:
    """Sample `index` of a request, which is the `arrival`th of its engine."""
    prompt, params = prepared.prompt, prepared.params
    if params.best_of is not None and params.logprobs is None:
        params = params.replace(logprobs=0)  # best_of ranks by them
    if index and params.prompt_logprobs is not None:
        params = params.replace(prompt_logprobs=None)  # the first sample's are everybody's
    num_prompt = len(prompt.token_ids)
    room = info.max_model_len - num_prompt
    wanted = room if params.max_tokens is None else params.max_tokens
    stop = tuple(params.stop_token_ids)
    if not params.ignore_eos:
        stop += tuple(token for token in info.eos_token_ids if token not in stop)
    namespace: Hashable | None = params.cache_salt or ""
    if not info.enable_prefix_caching:
        # Samples of one request share its prompt even then; nobody else does.
        namespace = ("samples of", request_id, arrival) if params.num_samples > 1 else None
    if info.synthetic_acceptance:
        namespace = None  # the KV behind an accepted draft is that of another text
    request = Request(
        request_id=f"{request_id}/{index}",
        prompt_token_ids=prompt.token_ids,
        params=params,
        seed=seed,
        limit=num_prompt + min(wanted, room),
        arrival=arrival * 2**20 + index,  # samples stay side by side in the order of arrival
        stop_token_ids=stop,
        bad_words_ids=prepared.bad_words_ids,
        prediction_ids=prepared.prediction,
        priority=params.priority,
        cache_namespace=namespace,
        read_cache=params.prompt_logprobs is None,
        uses_mask=params.structured_outputs is not None,
    )
    if isinstance(params.num_speculative_tokens, int):
        request.num_speculative_tokens = params.num_speculative_tokens
    return request
