"""Answers of /v1/chat/completions.

A stream is written as bytes around `json.dumps` of the new text; no object is built or checked for a
token. Where nothing in a text needs reading (no tools, no reasoning) it goes through as it is.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.outputs import CompletionOutput, LogprobsAt, RequestOutput
from octavo.server.answer.reader import AnswerReader
from octavo.server.answer.reasoning import END
from octavo.server.answer.tool_parsers import Piece
from octavo.server.chat_plan import ChatPlan, plan_chat
from octavo.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from octavo.server.protocol.base import warning_header
from octavo.server.protocol.chat import ChatRequest
from octavo.server.request_record import CURRENT_RECORD
from octavo.server.state import ServerState, need_tokenizer
from octavo.server.streaming import (
    DONE,
    FIRST_OUTPUT_SECONDS,
    WAITING,
    EventStream,
    OutputReader,
    check_answer,
    chunk_frame,
    json_response,
    unless_gone,
)
from octavo.server.usage import UsageCounter


async def serve_chat(state: ServerState, http: Request, request: ChatRequest) -> Response:
    """Answer one chat request. Raises OctavoError, and ClientGone."""
    arrival_time = time.monotonic()
    plan = await plan_chat(state, request)
    answer = ChatAnswer.begin(plan)
    reader = start(state, plan, answer.id, arrival_time)
    headers = warning_headers(plan.warnings)
    if request.streams:
        await unless_gone(http, reader.begin(FIRST_OUTPUT_SECONDS))
        return EventStream(answer.stream(reader), reader, headers)
    return json_response(await unless_gone(http, answer.whole(reader)), headers)


def start(state: ServerState, plan: ChatPlan, answer_id: str, arrival_time: float) -> OutputReader:
    """Ask the engine."""
    return OutputReader(
        [
            state.client.generate(
                plan.prompt_ids,
                plan.params,
                request_id=answer_id,
                arrival_time=arrival_time,
                kind="delta" if plan.request.streams else "final",
                continue_prompt=False,
                prompt=plan.prompt,
            )
        ]
    )


def new_id(prefix: str) -> str:
    """An id for an answer: the HTTP request's own, so that logs and answers can be laid side by side."""
    record = CURRENT_RECORD.get()
    return f"{prefix}-{record.request_id if record is not None else secrets.token_hex(16)}"


def new_call_id(plan: ChatPlan) -> str:
    """An id for a tool call. Mistral's templates insist on nine letters and digits."""
    if plan.tool_format is not None and plan.tool_format.name == "mistral":
        return secrets.token_hex(5)[:9]
    return f"call_{secrets.token_hex(12)}"


def warning_headers(warnings: tuple[str, ...] | list[str]) -> dict[str, str]:
    """The header that names what was not used, if there is any."""
    return {"x-octavo-warnings": warning_header(list(warnings))} if warnings else {}


def finish_reason(answer: CompletionOutput, num_calls: int) -> str:
    """OpenAI's word for how an answer ended."""
    return "tool_calls" if num_calls and answer.finish_reason == "stop" else answer.finish_reason or "stop"


class ReasoningCount:
    """Counts the tokens of one answer up to `</think>`."""

    def __init__(self, plan: ChatPlan) -> None:
        tokenizer = need_tokenizer(plan.model, "chat")
        self._tokenizer = tokenizer
        self._end_id = tokenizer.backend.token_to_id(END)
        self._text = ""
        self._ended = False
        self.count = 0

    def note(self, token_ids: list[int], pieces: list[Piece]) -> None:
        """More tokens, and what the reader made of them."""
        if self._end_id is None:  # the mark is several tokens: the text is counted instead
            new = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
            if new:
                self._text += new
                self.count = len(self._tokenizer.encode(self._text, add_special_tokens=False))
        elif not self._ended:
            self._ended = self._end_id in token_ids
            self.count += token_ids.index(self._end_id) + 1 if self._ended else len(token_ids)


@dataclass(slots=True)
class _Choice:
    """One of the answers to a request."""

    reader: AnswerReader | None
    reasoning: ReasoningCount | None
    begun: bool = False
    finished: bool = False

    def read(self, answer: CompletionOutput) -> list[Piece]:
        """What an output adds to this answer."""
        if self.reader is None:
            return [Piece("content", answer.text)] if answer.text else []
        pieces = self.reader.feed(answer.text, final=answer.finish_reason is not None)
        if self.reasoning is not None:
            self.reasoning.note(answer.token_ids, pieces)
        return pieces

    @property
    def num_calls(self) -> int:
        """Tool calls that have begun."""
        return self.reader.num_calls if self.reader is not None else 0


class ChatAnswer:
    """Writes the answer of one plan, whole or as a stream."""

    def __init__(self, plan: ChatPlan, answer_id: str, created: int) -> None:
        self.id = answer_id
        self._plan = plan
        self._created = created
        request = plan.request
        self._usage = UsageCounter(
            len(plan.prompt_ids), has_prediction="prediction" in plan.params.set_fields
        )
        self._names = TokenNames(plan.model.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._shows_reasoning = request.include_reasoning is not False
        self._choices = [
            _Choice(plan.reader(), None if plan.reasoning is None else ReasoningCount(plan))
            for _ in range(plan.params.n)
        ]

    @classmethod
    def begin(cls, plan: ChatPlan) -> ChatAnswer:
        """With a new id, now."""
        return cls(plan, new_id("chatcmpl"), int(time.time()))

    # ------------------------------------------------------------------ whole

    async def whole(self, reader: OutputReader) -> dict[str, Any]:
        """The body of an answer that does not stream."""
        last: RequestOutput | None = None
        try:
            async for item in reader.stream():
                assert item is not None
                last = item[1]
        finally:
            await reader.close()
        assert last is not None
        self._usage.note(last)
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._plan.model.name,
            "choices": [self._choice(answer) for answer in last.outputs],
            "usage": self._told_usage(),
            "system_fingerprint": None,
        }
        request = self._plan.request
        if request.metadata is not None:
            body["metadata"] = request.metadata
        if request.prompt_logprobs is not None and last.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(
                self._names, last.prompt_logprobs, request.prompt_logprobs
            )
        if request.return_token_ids:
            body["prompt_token_ids"] = self._plan.prompt_ids
        return body

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        check_answer(answer)
        choice = self._choices[answer.index]
        pieces = choice.read(answer)
        content = self._plan.echoed + "".join(p.text for p in pieces if p.kind == "content")
        reasoning = "".join(p.text for p in pieces if p.kind == "reasoning")
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.kind == "call":
                function = {"name": piece.text, "arguments": ""}
                calls.append({"id": new_call_id(self._plan), "type": "function", "function": function})
            elif piece.kind == "arguments":
                calls[piece.call_index]["function"]["arguments"] += piece.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        if reasoning and self._shows_reasoning:
            message["reasoning_content"] = reasoning
        told: dict[str, Any] = {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.token_ids, answer.logprobs),
            "finish_reason": finish_reason(answer, choice.num_calls),
            "stop_reason": answer.stop_reason,
        }
        if self._plan.request.return_token_ids:
            told["token_ids"] = answer.token_ids
        return told

    # ------------------------------------------------------------------ a stream

    async def stream(self, reader: OutputReader) -> AsyncGenerator[bytes, None]:
        """The events of a stream, several in one where they come together."""
        request = self._plan.request
        self._head, self._tail = chunk_frame(
            self.id, "chat.completion.chunk", self._created, self._plan.model.name, request.includes_usage
        )
        is_plain = self._plan.params.logprobs is None and not request.return_token_ids
        is_plain = is_plain and self._choices[0].reader is None
        async for item in reader.stream():
            if item is None:
                yield WAITING
                continue
            output = item[1]
            self._usage.note(output)
            if request.has_continuous_usage:
                self._tail = f',"usage":{json.dumps(self._usage.counts())}}}\n\n'
            events: list[str] = []
            for answer in output.outputs:
                choice = self._choices[answer.index]
                if is_plain and choice.begun and answer.finish_reason is None:
                    if answer.text:  # a token of plain text, most of the time
                        events.append(self._event(answer.index, f'{{"content":{json.dumps(answer.text)}}}'))
                elif not choice.finished:
                    self._add_events(events, answer, choice, output)
            if events:
                yield "".join(events).encode()
        if request.includes_usage:
            usage = json.dumps(self._told_usage(), separators=(",", ":"))
            yield f'{self._head}],"usage":{usage}}}\n\n'.encode()
        yield DONE

    def _add_events(
        self, events: list[str], answer: CompletionOutput, choice: _Choice, output: RequestOutput
    ) -> None:
        """Everything one output says of one choice."""
        index = answer.index
        reason = answer.finish_reason
        if not choice.begun:
            choice.begun = True
            self._begin(events, index, output)
        extra = ""
        if answer.logprobs:
            found = self._logprobs(answer.token_ids, answer.logprobs)
            extra += f',"logprobs":{json.dumps(found, separators=(",", ":"))}'
        if self._plan.request.return_token_ids and answer.token_ids:
            extra += f',"token_ids":{answer.token_ids}'
        deltas = [delta for piece in choice.read(answer) if (delta := self._delta(piece))]
        if extra and not deltas:  # the tokens are known before their text is certain
            deltas = ['{"content":""}']
        for delta in deltas:
            events.append(self._event(index, delta, extra))
            extra = ""
        if reason is not None:
            check_answer(answer)
            choice.finished = True
            stop_reason = json.dumps(answer.stop_reason)
            word = finish_reason(answer, choice.num_calls)
            events.append(self._event(index, "{}", f',"stop_reason":{stop_reason}', f'"{word}"'))

    def _begin(self, events: list[str], index: int, output: RequestOutput) -> None:
        """The first delta, which carries the role, and what else is known before the answer."""
        request = self._plan.request
        extra = ""
        if request.return_token_ids:
            extra = f',"prompt_token_ids":{self._plan.prompt_ids}'
        if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            found = prompt_logprobs(self._names, output.prompt_logprobs, request.prompt_logprobs)
            extra += f',"prompt_logprobs":{json.dumps(found)}'
        delta = json.dumps({"role": "assistant", "content": self._plan.echoed, "refusal": None})
        events.append(self._event(index, delta, extra))

    def _event(self, index: int, delta: str, extra: str = "", reason: str = "null") -> str:
        if not extra:
            extra = ',"logprobs":null'
        return f'{self._head}{{"index":{index},"delta":{delta}{extra},"finish_reason":{reason}}}]{self._tail}'

    def _delta(self, piece: Piece) -> str:
        """A piece as the JSON of a delta; "" for what is not shown."""
        if piece.kind == "content":
            return f'{{"content":{json.dumps(piece.text)}}}'
        if piece.kind == "reasoning":
            return f'{{"reasoning_content":{json.dumps(piece.text)}}}' if self._shows_reasoning else ""
        call: dict[str, Any] = {"index": piece.call_index, "function": {"arguments": piece.text}}
        if piece.kind == "call":
            call = {
                "index": piece.call_index,
                "id": new_call_id(self._plan),
                "type": "function",
                "function": {"name": piece.text, "arguments": ""},
            }
        return json.dumps({"tool_calls": [call]}, separators=(",", ":"))

    # ------------------------------------------------------------------ both

    def _logprobs(self, token_ids: list[int], found: list[LogprobsAt] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        content = chat_logprobs(self._names, token_ids, found, self._plan.request.top_logprobs or 0)
        return {"content": content, "refusal": None}

    def _told_usage(self) -> dict[str, Any]:
        counts = [choice.reasoning for choice in self._choices if choice.reasoning is not None]
        if counts:
            self._usage.num_reasoning_tokens = sum(count.count for count in counts)
        return self._usage.usage()
