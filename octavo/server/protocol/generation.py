"""The fields that chat and completions share, and how they become `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.server.protocol.base import ApiModel, ApiRequest, Whole
from octavo.server.settings import ServeSettings

MAX_STOP_LENGTH = 4096  # characters of one stop string
MAX_BAD_WORDS = 1000

# What goes to SamplingParams under its own name.
_SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop_token_ids", "include_stop_str_in_output", "bad_words",
    "allowed_token_ids", "logit_bias", "min_tokens", "ignore_eos", "prompt_logprobs",
    "skip_special_tokens", "num_speculative_tokens", "cache_salt", "priority", "trace",
)  # fmt: skip

COMMON_IGNORED = {
    "user": "not used",
    "service_tier": "there is one tier",
    "spaces_between_special_tokens": "special tokens are written as the tokenizer writes them",
    "guided_decoding_backend": "there is one backend",
    "include_obfuscation": "streams are not padded",
}
COMMON_REFUSED = {
    "use_beam_search": "beam search is not supported; use n or best_of",
    "length_penalty": "belongs to beam search, which is not supported",
    "early_stopping": "belongs to beam search, which is not supported",
    "logits_processors": "code in requests is not run; use logit_bias, bad_words or allowed_token_ids",
    "guided_whitespace_pattern": "not supported",
    "kv_transfer_params": "not supported",
    "mm_processor_kwargs": "this server reads text only",
}


class StreamOptions(ApiModel):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(default=None, description="one more chunk at the end, with the usage")
    continuous_usage_stats: bool | None = Field(default=None, description="the usage so far in every chunk")
    include_obfuscation: bool | None = Field(default=None, description="streams are never padded")


class JsonSchemaFormat(ApiModel):
    """The schema of response_format json_schema. It is enforced whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(ApiModel):
    """Exactly one of them: the form of the answer, in vLLM's spelling."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class Prediction(ApiModel):
    """A guess of the answer: where it is right, the answer comes faster."""

    type: Literal["content"] = "content"
    content: str | list[dict[str, Any]]


class GenerationRequest(ApiRequest):
    """What a request for text may ask for. Fields that are null count as not given."""

    IGNORED: ClassVar[Mapping[str, str]] = COMMON_IGNORED
    REFUSED: ClassVar[Mapping[str, str]] = COMMON_REFUSED

    model: str | None = Field(default=None, description="one of /v1/models; left out, the only one")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    best_of: Whole | None = Field(default=None, description="answers made, of which the n best are returned")
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Whole] | None = None
    logit_bias: dict[str, float] | None = Field(
        default=None, description="token id -> what is added to its logit"
    )
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Whole | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = Field(
        None, description="keep the last so many prompt tokens; -1: fit"
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    prediction: Prediction | None = None
    num_speculative_tokens: Whole | Literal["auto"] | None = None
    cache_salt: str | None = None
    priority: Whole | None = None
    trace: bool | None = Field(default=None, description="one record a verification in usage.speculation")

    @property
    def streams(self) -> bool:
        """True if the answer is to come in pieces."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with a chunk that holds the usage."""
        return self.streams and self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """True if every chunk of a stream holds the usage so far."""
        return self.includes_usage and bool(
            self.stream_options is not None and self.stream_options.continuous_usage_stats
        )

    def check(self, settings: ServeSettings) -> list[str]:
        """Hold the request to the server's bounds; returns warnings. Raises RequestError."""
        warnings = self.check_extra_fields()
        if self.stream_options is not None and not self.streams:
            raise RequestError("stream_options is for streams: set stream to true", "stream_options")
        for name in ("n", "best_of"):
            _at_most(name, getattr(self, name), settings.max_n)
        _at_most("prompt_logprobs", self.prompt_logprobs, settings.max_logprobs)
        if self.streams and self.ranks_answers:
            raise RequestError(
                "best_of cannot stream: which answers are best is known at the end; set stream to false",
                "best_of",
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        _at_most("stop (its number of texts)", len(stops), settings.max_stop)
        _at_most("stop (the length of a text)", max(map(len, stops), default=0), MAX_STOP_LENGTH)
        _at_most("bad_words (its number of texts)", len(self.bad_words or ()), MAX_BAD_WORDS)
        return warnings

    @property
    def ranks_answers(self) -> bool:
        """True if best_of asks for more answers than are returned."""
        return self.best_of is not None and self.best_of != (self.n or 1)

    def structured(self, settings: ServeSettings) -> dict[str, Any] | None:
        """What structured output the request asks for, in SamplingParams' form, within the bounds."""
        found: list[tuple[str, dict[str, Any]]] = []
        if self.response_format is not None and self.response_format.type != "text":
            found.append(("response_format", _of_response_format(self.response_format)))
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
            found.append(("structured_outputs", given))
        for kind in ("json", "regex", "grammar", "choice"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append((f"guided_{kind}", {kind: value}))
        if not found:
            return None
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise RequestError(f"{names} both say what form the answer must have; give one", found[1][0])
        name, form = found[0]
        check_form(form, settings, name)
        return form

    def sampling_kwargs(self) -> dict[str, Any]:
        """The fields that SamplingParams knows under the same name, where they are given."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["stop"] = self.stop or None
        if self.ranks_answers:
            given["best_of"] = self.best_of
        return {name: value for name, value in given.items() if value is not None}

    def prediction_kwargs(self, speculative_method: str | None, warnings: list[str]) -> dict[str, Any]:
        """The prediction in SamplingParams' form. Where nothing drafts it is left out, and warned about."""
        if self.prediction is None:
            return {}
        if speculative_method is None:
            warnings.append("prediction: not used, since the engine runs without speculative decoding")
            return {}
        return {"prediction": _text_of(self.prediction) or None}


def make_params(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of what was given, the rest from the model's generation_config. Raises RequestError."""
    return SamplingParams(**given).with_defaults(defaults)


def _text_of(prediction: Prediction) -> str:
    if isinstance(prediction.content, str):
        return prediction.content
    texts = []
    for part in prediction.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError("prediction.content must be a text or parts of type text", "prediction")
        texts.append(part["text"])
    return "".join(texts)


def check_form(form: Mapping[str, Any], settings: ServeSettings, param: str) -> None:
    """Refuse a schema, regex, grammar or list of choices beyond the server's bounds."""
    for value in form.values():
        size, depth = measure(value)
        if size > int(settings.max_schema_bytes):
            raise RequestError(
                f"{param} is longer than the {settings.max_schema_bytes} bytes this server allows", param
            )
        if depth > settings.max_schema_depth:
            raise RequestError(
                f"{param} is nested deeper than the {settings.max_schema_depth} levels this server allows",
                param,
            )


def measure(value: Any) -> tuple[int, int]:
    """(size in about bytes, depth of nesting) of plain JSON data, however deep it is."""
    size = depth = 0
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            size += 2
            if isinstance(item, str):
                size += len(item.encode("utf-8", "surrogatepass"))
            elif isinstance(item, Mapping):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
        depth += any(isinstance(item, (Mapping, list)) for item in level)
        level = below
    return size, depth


def _of_response_format(given: ResponseFormat) -> dict[str, Any]:
    if given.type == "json_object":
        return {"json_object": True}
    if given.json_schema is None:
        raise RequestError("response_format json_schema needs json_schema with the schema", "response_format")
    # A format without a schema is any object, as with OpenAI.
    return {"json": given.json_schema.schema_ or {"type": "object"}}


def _at_most(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        param = name.split(" ")[0]
        raise RequestError(f"{name} is {value}, and this server allows at most {limit}", param)
