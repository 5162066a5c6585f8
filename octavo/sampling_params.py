"""What one request asks of the sampler, checked once and then never doubted again.

A `SamplingParams` is immutable and already legal: every wrong type or value is refused when it is
built, with a `RequestError` whose `param` names the field, so nothing behind this module has to
check again. Two things depend on the model and are checked by `check_for_model`: token ids against
the vocabulary's size, and the number of logprobs.

It also remembers which fields the caller set (`set_fields`), because a model's generation_config
fills in only what the caller left open.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from octavo import other_names
from octavo.core.mix import fold_seed
from octavo.errors import ConfigError, RequestError

GREEDY_BELOW = 1e-5  # a temperature below this one is greedy
MAX_TEMPERATURE = 100.0
MAX_N = 16_384
MAX_LOGPROBS = 1_024
MAX_SPECULATIVE_TOKENS = 16
_MAX_TOKEN_ID = 2**31 - 1  # token ids are int32 on the device

# generation_config.json's names for our fields
_GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

_STRUCTURED_KINDS = ("json", "regex", "grammar", "choice")

T = TypeVar("T")


def unknown_name_message(name: str, known: Iterable[str], owner: str) -> str:
    """'no such parameter' with the nearest name, for any set of keyword arguments."""
    names = sorted(known)
    near = None
    if owner == "SamplingParams":
        if name in other_names.SAMPLING_ADVICE:
            return f"{owner} has no parameter {name!r}: {other_names.SAMPLING_ADVICE[name]}"
        near = other_names.SAMPLING.get(name)
    if near is None:
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        near = close[0] if close else None
    hint = f"did you mean {near}?" if near else f"it knows: {', '.join(names)}"
    return f"{owner} has no parameter {name!r}; {hint}"


def _remember_and_explain(cls: type[T]) -> type[T]:
    """Give a dataclass's constructor readable errors for unknown names, and note what was set.

    The generated constructor does the work. The class keeps its static signature, since this
    decorator maps a type to the same type.
    """
    generated: Callable[..., None] = cls.__init__
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise RequestError(unknown_name_message(name, names, cls.__name__), param=name)
        positional = names[: len(args)]
        if len(args) > len(names):
            raise RequestError(f"{cls.__name__} takes at most {len(names)} values, got {len(args)}")
        for name in positional:
            if name in kwargs:
                raise RequestError(f"{name} is given twice, by position and by name", param=name)
        object.__setattr__(self, "set_fields", frozenset(positional).union(kwargs))
        generated(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_remember_and_explain
@dataclass(frozen=True, slots=True, repr=False)
class SamplingParams:
    """How to choose the tokens of one request, and what to report about them.

    Lists are kept as tuples, `logit_bias` with int keys; a `structured_outputs` of
    `{"json": "<text>"}` or `{"json_object": True}` becomes `{"json": <schema>}`.

    Raises RequestError for any wrong name, type or value.
    """

    n: int = 1  # answers returned
    best_of: int | None = None  # answers made, of which the n best (mean raw logprob) are returned
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None draws a fresh one; any int is taken modulo 2**64
    stop: Sequence[str] = ()  # one string or several
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    min_tokens: int = 0
    max_tokens: int | None = 16  # None is the rest of the context; left open, at least min_tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # number of top logprobs; 0 is only the token's own
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = field(default=None, hash=False)
    num_speculative_tokens: int | Literal["auto"] | None = None  # None: what the engine is set to
    prediction: str | Sequence[int] | None = None  # a guess of the answer, drafted from
    cache_salt: str | None = None  # prefix-cache blocks are shared only within one salt
    priority: int = 0  # smaller is served earlier
    trace: bool = False  # one record a step in metrics.speculation
    set_fields: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("n", _integer("n", self.n, 1, MAX_N))
        if self.best_of is not None:
            put("best_of", _integer("best_of", self.best_of, 1, MAX_N))
            if self.best_of < self.n:
                raise _wrong("best_of", f"must be at least n ({self.n})", self.best_of)
        put("temperature", _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0, low_open=True))
        put("top_k", _integer("top_k", self.top_k, -1, note=" (0 or -1 is off)"))
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.seed is not None:
            put("seed", fold_seed(_integer("seed", self.seed)))

        put("stop", _strings("stop", self.stop))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        put("bad_words", _strings("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _wrong("allowed_token_ids", "must name at least one token, or be None", [])
        if self.logit_bias is not None:
            put("logit_bias", _logit_bias(self.logit_bias))

        put("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1, note=" or None"))
            if "max_tokens" not in self.set_fields:
                put("max_tokens", max(self.max_tokens, self.min_tokens))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"must be at most max_tokens ({self.max_tokens})", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                put(name, _integer(name, value, 0, MAX_LOGPROBS, note=" or None"))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "must be True or False", getattr(self, name))

        if self.structured_outputs is not None:
            put("structured_outputs", _structured_outputs(self.structured_outputs))
        if self.num_speculative_tokens is not None and self.num_speculative_tokens != "auto":
            name = "num_speculative_tokens"
            note = ", 'auto' or None"
            put(name, _integer(name, self.num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS, note))
        if self.prediction is not None and not isinstance(self.prediction, str):
            put("prediction", _token_ids("prediction", self.prediction))
        if self.cache_salt is not None:
            put("cache_salt", _text("cache_salt", self.cache_salt))
        put("priority", _integer("priority", self.priority, -(2**63), 2**63 - 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from plain data such as a JSON object; unknown keys are refused like unknown keywords."""
        if not isinstance(values, Mapping):
            raise RequestError(f"sampling parameters must be an object (a dict), got {_shown(values)}")
        for key in values:
            if not isinstance(key, str):
                raise RequestError(f"names of sampling parameters must be strings, got {_shown(key)}")
        return cls(**values)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed. Fields that nobody set stay open for `with_defaults`."""
        kept = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.init and (f.name in self.set_fields or getattr(self, f.name) != f.default)
        }
        changed = type(self)(**{**kept, **changes})
        object.__setattr__(changed, "set_fields", self.set_fields.union(changes))
        return changed

    def with_defaults(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Fill fields that the caller did not set from a model's generation_config.

        Taken are temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens (as
        max_tokens). `do_sample` is not looked at, as in vLLM: greedy is asked for by temperature=0.
        The filled fields still count as not set by the caller.

        Raises ConfigError if the config holds an illegal value.
        """
        given = {
            ours: generation_config[theirs]
            for theirs, ours in _GENERATION_CONFIG_FIELDS.items()
            if generation_config.get(theirs) is not None and ours not in self.set_fields
        }
        if "max_tokens" in given and _is_integer(given["max_tokens"]):
            # what the caller set wins over a default that contradicts it
            given["max_tokens"] = max(given["max_tokens"], self.min_tokens)
        try:
            filled = self.replace(**given)
        except RequestError as error:
            raise ConfigError(f"the model's generation_config cannot be used: {error}") from error
        object.__setattr__(filled, "set_fields", self.set_fields)
        return filled

    def check_for_model(self, vocab_size: int) -> None:
        """Check token ids and logprobs against a vocabulary; raises RequestError."""
        ids: dict[str, Iterable[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (),
        }
        if self.prediction is not None and not isinstance(self.prediction, str):
            ids["prediction"] = self.prediction
        for name, values in ids.items():
            for token in values:
                if token >= vocab_size:
                    allowed = f"0 … {vocab_size - 1}"
                    raise _wrong(name, f"must hold token ids of this model ({allowed})", token)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > vocab_size:
                raise _wrong(name, f"must be at most the vocabulary's size ({vocab_size})", value)

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is taken and no noise is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_samples(self) -> int:
        """Answers the engine makes: best_of where it is given, otherwise n."""
        return self.n if self.best_of is None else self.best_of

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.init and getattr(self, f.name) != f.default
        )
        return f"SamplingParams({shown})"


def _shown(value: object) -> str:
    """A value as an error message shows it: short, and never failing itself."""
    try:
        text = repr(value)
    except Exception:  # a foreign object's repr may raise anything
        text = "…"
    text = text if len(text) <= 60 else text[:57] + "…"
    return f"{text} ({type(value).__name__})"


def _wrong(name: str, rule: str, value: object) -> RequestError:
    return RequestError(f"{name} {rule}, got {_shown(value)}", param=name)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def _integer(
    name: str, value: object, low: int | None = None, high: int | None = None, note: str = ""
) -> int:
    """`value` as an int within [low, high]; numpy's integers are welcome, bools and floats are not."""
    if high is not None:
        rule = f"must be a whole number from {low} to {high}{note}"
    elif low is not None:
        rule = f"must be a whole number of at least {low}{note}"
    else:
        rule = f"must be a whole number{note}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, rule, value)
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise _wrong(name, rule, value)
    return number


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> float:
    """`value` as a finite float within the bounds; `low_open` leaves `low` itself out."""
    start = f"above {low:g} and up" if low_open else f"from {low:g}"
    rule = f"must be a number {start} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, rule, value)
    try:
        number = float(value)
    except (OverflowError, ValueError):
        raise _wrong(name, rule, value) from None
    if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
        raise _wrong(name, rule, value)
    return number


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(name, "must be a non-empty string or None", value)
    return value


def _items(name: str, value: object, what: str) -> list[Any]:
    """The members of a list-like; text, mappings and single values are not lists."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, f"must be a list of {what}", value)
    return list(value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    members = [value] if isinstance(value, str) else _items(name, value, "strings")
    for member in members:
        if not isinstance(member, str) or not member:
            raise _wrong(name, "must hold non-empty strings", member)
    return tuple(members)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_integer(name, member, 0, _MAX_TOKEN_ID) for member in _items(name, value, "token ids"))


def _logit_bias(value: object) -> dict[int, float] | None:
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", "must map token ids to numbers", value)
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token: object = key
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
            token = int(key)  # JSON has no other keys than strings
        token_id = _integer("logit_bias", token, 0, _MAX_TOKEN_ID, note=" as key")
        if token_id in bias:
            raise RequestError(f"logit_bias names token {token_id} twice", param="logit_bias")
        bias[token_id] = _number("logit_bias", amount, -100.0, 100.0)
    return bias or None


def _structured_outputs(value: object) -> dict[str, Any]:
    """Exactly one of json (schema), regex, grammar, choice; see the class for what is normalised."""
    name = "structured_outputs"
    kinds = ", ".join(_STRUCTURED_KINDS)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise _wrong(name, f"must be a dict with exactly one of {kinds}", value)
    ((kind, content),) = value.items()
    if kind == "json_object":
        if content is not True:
            raise _wrong(name, "with json_object must say True", content)
        return {"json": {"type": "object"}}
    if kind not in _STRUCTURED_KINDS:
        raise _wrong(name, f"must be a dict with exactly one of {kinds}", kind)
    if kind == "json":
        return {kind: _json_schema(content)}
    if kind == "choice":
        choices = _strings(name, _items(name, content, "strings"))
        if not choices:
            raise _wrong(name, "with choice must offer at least one string", content)
        return {kind: choices}
    if not isinstance(content, str) or not content:
        raise _wrong(name, f"with {kind} must be a non-empty string", content)
    return {kind: content}


def _json_schema(content: object) -> Any:
    rule = "with json must be a JSON schema (an object, or its text)"
    try:
        schema = json.loads(content) if isinstance(content, str) else json.loads(json.dumps(content))
    except (TypeError, ValueError, RecursionError):
        raise _wrong("structured_outputs", rule, content) from None
    if not isinstance(schema, dict):
        raise _wrong("structured_outputs", rule, content)
    return schema
