"""What crosses the socket between the server's front end and the engine's process.

Every message is one msgspec struct, encoded as a MessagePack array with a tag and checked against its
type when it is read, so a damaged or foreign message is an error and never code: nothing is pickled.
On the socket each message follows its length.

    front end -> engine   Start, then Admit | Abort | GetStats | Shutdown
    engine -> front end   Loading … and Found, then Ready or Failed,
                          then Outputs | Refused | Stats | Heartbeat

All outputs of a step travel in one message. Times are seconds of the system's monotonic clock, which
the processes of one machine share.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from octavo.engine.engine_stats import EngineStats
from octavo.outputs import CompletionOutput, Logprob, LogprobsAt, RequestMetrics, RequestOutput
from octavo.sampling_params import SamplingParams

MAX_MESSAGE_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_PARAMS = [(f.name, f.default) for f in dataclasses.fields(SamplingParams) if f.init]


class Message(msgspec.Struct, array_like=True, tag=True, gc=False, frozen=True):
    """Base of all messages."""


# ---------------------------------------------------------------------- front end -> engine


class Start(Message, frozen=True):
    """The first message: what to build."""

    engine_args: dict[str, Any]  # keyword arguments of EngineArgs
    log_level: str
    grammar_timeout: float  # seconds, 0: no limit
    heartbeat_interval: float  # seconds


class Admit(Message, frozen=True):
    """Serve a request. `key` is the front end's number of it, never used twice."""

    key: int
    prompt_ids: list[int]
    params: dict[str, Any]
    kind: str
    continue_prompt: bool
    arrival_time: float


class Abort(Message, frozen=True):
    """Nobody waits for these any more."""

    keys: list[int]


class GetStats(Message, frozen=True):
    """Answer with Stats between two steps."""

    serial: int
    check_integrity: bool


class Shutdown(Message, frozen=True):
    """End. Open requests get nothing more."""


ToEngine: TypeAlias = Start | Admit | Abort | GetStats | Shutdown


# ---------------------------------------------------------------------- engine -> front end


class Loading(Message, frozen=True):
    """How far loading has come."""

    stage: str
    fraction: float | None


class Found(Message, frozen=True):
    """Where the model lies: known long before the engine is ready, so that others can read its tokenizer."""

    model_path: str
    tokenizer_path: str


class Ready(Message, frozen=True):
    """The engine serves. Fields as in `octavo.server.engine_client.EngineClientInfo`."""

    model: str
    model_path: str
    tokenizer_path: str | None
    chat_template: str | None
    trust_remote_code: bool
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    max_num_seqs: int
    block_size: int
    num_blocks: int
    speculative_method: str | None
    generation_defaults: dict[str, Any]
    notes: tuple[str, ...]


class Failed(Message, frozen=True):
    """The engine ends. `kind` is the name of the error's class."""

    kind: str
    message: str


class Refused(Message, frozen=True):
    """One request cannot be served; the others go on."""

    key: int
    kind: str
    message: str
    param: str | None


class Stats(Message, frozen=True):
    """The answer to GetStats. `fault` is what check_integrity found."""

    serial: int
    stats: EngineStats
    fault: str | None


class Heartbeat(Message, frozen=True):
    """Sent at intervals by a thread that does nothing else."""

    step_seconds: float  # how long the present step has been running; 0 between steps


# One entry of a position: token id, logprob, rank, text.
WireLogprob: TypeAlias = tuple[int, float, int | None, str | None]
WireLogprobsAt: TypeAlias = list[WireLogprob]


class WireAnswer(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """A CompletionOutput. What most steps do not have comes last, and is left out."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[WireLogprobsAt] | None = None


class WireOutput(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """A RequestOutput of the request `key`."""

    key: int
    answers: list[WireAnswer]
    metrics: RequestMetrics | None = None  # with the last output, which is thereby known
    prompt_logprobs: list[WireLogprobsAt | None] | None = None  # once, with the first output


class Outputs(Message, frozen=True):
    """What one step, or several that the socket could not take one by one, brought."""

    outputs: list[WireOutput]


FromEngine: TypeAlias = Loading | Found | Ready | Failed | Refused | Stats | Heartbeat | Outputs

_encode = msgspec.msgpack.Encoder().encode
_decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
_decode_from_engine: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode


# ---------------------------------------------------------------------- framing


def frame(message: Message) -> bytes:
    """The bytes of one message on the socket. Raises ValueError for one that cannot be encoded."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def read_to_engine(body: bytes) -> ToEngine:
    """A message of the front end. Raises msgspec.DecodeError."""
    return _decode_to_engine(body)


def read_from_engine(body: bytes) -> FromEngine:
    """A message of the engine. Raises msgspec.DecodeError."""
    return _decode_from_engine(body)


class FrameReader:
    """Cuts what a socket brings into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are whole by now. Raises ValueError for an impossible length."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start, end = 0, len(buffer)
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes cannot be")
            stop = start + _LENGTH.size + length
            if stop > end:
                break
            bodies.append(bytes(memoryview(buffer)[start + _LENGTH.size : stop]))
            start = stop
        if start:
            del buffer[:start]
        return bodies


# ---------------------------------------------------------------------- outputs and parameters


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """Keyword arguments that make equal SamplingParams again."""
    given = {name: value for name, default in _PARAMS if (value := getattr(params, name)) != default}
    schema = (params.structured_outputs or {}).get("json")
    if schema is not None:  # as text: JSON has numbers that MessagePack has not
        given["structured_outputs"] = {"json": json.dumps(schema)}
    return given


def output_to_wire(key: int, output: RequestOutput, with_prompt_logprobs: bool) -> WireOutput:
    """For the engine's process."""
    answers = [
        WireAnswer(
            answer.index,
            answer.text,
            answer.token_ids,
            answer.finish_reason,
            answer.stop_reason,
            answer.error,
            answer.cumulative_logprob,
            None if answer.logprobs is None else [_logprobs_to_wire(at) for at in answer.logprobs],
        )
        for answer in output.outputs
    ]
    prompt_logprobs = output.prompt_logprobs if with_prompt_logprobs else None
    return WireOutput(
        key,
        answers,
        output.metrics if output.finished else None,
        None
        if prompt_logprobs is None
        else [None if at is None else _logprobs_to_wire(at) for at in prompt_logprobs],
    )


def output_from_wire(
    wire: WireOutput, request_id: str, prompt: str | None, prompt_ids: list[int]
) -> RequestOutput:
    """For the front end. It is the last one of its request if it has metrics."""
    outputs = [
        CompletionOutput(
            answer.index,
            answer.text,
            answer.token_ids,
            answer.cumulative_logprob,
            None if answer.logprobs is None else [_logprobs_from_wire(at) for at in answer.logprobs],
            answer.finish_reason,  # type: ignore[arg-type]
            answer.stop_reason,
            answer.error,
        )
        for answer in wire.answers
    ]
    metrics, given = wire.metrics, wire.prompt_logprobs
    return RequestOutput(
        request_id,
        prompt,
        prompt_ids,
        None if given is None else [None if at is None else _logprobs_from_wire(at) for at in given],
        outputs,
        metrics is not None,
        metrics,
    )


def _logprobs_to_wire(at: LogprobsAt) -> WireLogprobsAt:
    return [(token_id, *entry) for token_id, entry in at.items()]


def _logprobs_from_wire(at: WireLogprobsAt) -> LogprobsAt:
    return {token_id: Logprob(logprob, rank, text) for token_id, logprob, rank, text in at}
