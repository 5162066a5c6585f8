"""Answers of /v1/responses: items (reasoning, a message, function calls), whole or as OpenAI's events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.outputs import CompletionOutput, RequestOutput
from octavo.server.answer.tool_parsers import Piece
from octavo.server.chat import ReasoningCount, new_id, start, warning_headers
from octavo.server.chat_plan import ChatPlan, plan_chat
from octavo.server.errors import http_error
from octavo.server.logprobs import TokenNames, chat_logprobs
from octavo.server.protocol.responses import ResponsesRequest, chat_request
from octavo.server.state import ServerState
from octavo.server.streaming import (
    FIRST_OUTPUT_SECONDS,
    WAITING,
    EventStream,
    OutputReader,
    check_answer,
    json_response,
    unless_gone,
)
from octavo.server.usage import UsageCounter


async def serve_response(state: ServerState, http: Request, request: ResponsesRequest) -> Response:
    """Answer one request. Raises OctavoError, and ClientGone."""
    arrival_time = time.monotonic()
    warnings = request.check(state.settings)
    plan = await plan_chat(state, chat_request(request))
    answer = ResponseAnswer(request, plan)
    reader = start(state, plan, answer.id, arrival_time)
    headers = warning_headers([*warnings, *plan.warnings])
    if request.stream:
        await unless_gone(http, reader.begin(FIRST_OUTPUT_SECONDS))
        return EventStream(answer.stream(reader), reader, headers)
    return json_response(await unless_gone(http, answer.whole(reader)), headers)


class ResponseAnswer:
    """Writes the answer of one plan. Items are built from pieces; each change is an event besides."""

    def __init__(self, request: ResponsesRequest, plan: ChatPlan) -> None:
        self.id = new_id("resp")
        self._request = request
        self._plan = plan
        self._created = int(time.time())
        self._reader = plan.reader()
        self._reasoning = None if plan.reasoning is None else ReasoningCount(plan)
        self._usage = UsageCounter(
            len(plan.prompt_ids), has_prediction="prediction" in plan.params.set_fields
        )
        self._names = TokenNames(plan.model.tokenizer)
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # the last item may still grow
        self._events: list[str] = []
        self._sequence_number = 0

    # ------------------------------------------------------------------ whole and stream

    async def whole(self, reader: OutputReader) -> dict[str, Any]:
        """The body of an answer that does not stream."""
        last: RequestOutput | None = None
        try:
            async for item in reader.stream():
                assert item is not None
                last = item[1]
                self._add(last)
        finally:
            await reader.close()
        assert last is not None
        return self._end(last.outputs[0])

    async def stream(self, reader: OutputReader) -> AsyncGenerator[bytes, None]:
        """The events of a stream, several in one where they come together."""
        body = self._body("in_progress")
        self._event("response.created", response=body)
        self._event("response.in_progress", response=body)
        try:
            async for item in reader.stream():
                if item is None:
                    yield self._taken() + WAITING
                    continue
                output = item[1]
                self._add(output)
                if output.finished:
                    whole = self._end(output.outputs[0])
                    self._event(f"response.{whole['status']}", response=whole)
                if self._events:
                    yield self._taken()
        except Exception as error:
            found = http_error(error)
            code = "rate_limit_exceeded" if found.status == 429 else "server_error"
            failed = {**self._body("failed"), "error": {"code": code, "message": found.message}}
            self._event("response.failed", response=failed)
            yield self._taken()
            if found.code == "internal":
                raise

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return "".join(events).encode()

    def _event(self, kind: str, **fields: Any) -> None:
        if self._plan.request.streams:
            event = {"type": kind, "sequence_number": self._sequence_number, **fields}
            self._sequence_number += 1
            self._events.append(f"event: {kind}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n")

    # ------------------------------------------------------------------ items

    def _add(self, output: RequestOutput) -> None:
        """What an output adds to the items."""
        self._usage.note(output)
        answer = output.outputs[0]
        check_answer(answer)
        if self._reader is None:
            pieces = [Piece("content", answer.text)] if answer.text else []
        else:
            pieces = self._reader.feed(answer.text, final=answer.finish_reason is not None)
        if self._reasoning is not None:
            self._reasoning.note(answer.token_ids, pieces)
        self._logprobs += self._new_logprobs(answer)
        for piece in pieces:
            if piece.kind == "reasoning":
                self._add_text("reasoning", piece.text, [])
                self._logprobs.clear()
            elif piece.kind == "content":
                self._add_text("message", piece.text, self._logprobs)
                self._logprobs = []
            elif piece.kind == "call":
                self._close_item("completed")
                self._open_call(piece.text)
            else:
                self._items[-1]["arguments"] += piece.text
                self._item_event("response.function_call_arguments.delta", delta=piece.text)

    def _new_logprobs(self, answer: CompletionOutput) -> list[dict[str, Any]]:
        if answer.logprobs is None:
            return []
        return chat_logprobs(
            self._names, answer.token_ids, answer.logprobs, self._plan.request.top_logprobs or 0
        )

    def _add_text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> None:
        if not self._is_open or self._items[-1]["type"] != kind:
            self._close_item("completed")
            self._open_text(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        if kind == "reasoning":
            self._item_event("response.reasoning_text.delta", content_index=0, delta=text)
        else:
            part["logprobs"] += logprobs
            shown = [_without_bytes(entry) for entry in logprobs]
            self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=shown)

    def _open_text(self, kind: str) -> None:
        """A message, or reasoning: an item with one part."""
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        item: dict[str, Any] = {"id": _id("rs"), "type": kind, "summary": [], "status": "in_progress"}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": _id("msg"), "type": kind, "role": "assistant", "status": "in_progress"}
        self._open({**item, "content": []})
        self._items[-1]["content"].append(part)
        self._item_event("response.content_part.added", content_index=0, part=dict(part))

    def _open_call(self, name: str) -> None:
        self._open(
            {
                "id": _id("fc"),
                "type": "function_call",
                "call_id": _id("call"),
                "name": name,
                "arguments": "",
                "status": "in_progress",
            }
        )

    def _open(self, item: dict[str, Any]) -> None:
        self._items.append(item)
        self._is_open = True
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close_item(self, status: str) -> None:
        """The last item is complete, or as complete as it will be."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            self._item_event("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                self._item_event("response.reasoning_text.done", content_index=0, text=part["text"])
            else:
                shown = [_without_bytes(entry) for entry in part["logprobs"]]
                self._item_event(
                    "response.output_text.done", content_index=0, text=part["text"], logprobs=shown
                )
            self._item_event("response.content_part.done", content_index=0, part=part)
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _item_event(self, kind: str, **fields: Any) -> None:
        self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    # ------------------------------------------------------------------ the response

    def _end(self, answer: CompletionOutput) -> dict[str, Any]:
        """Close what is open; the body of the whole response."""
        is_cut = answer.finish_reason == "length"
        self._close_item("incomplete" if is_cut else "completed")
        body = self._body("incomplete" if is_cut else "completed")
        if is_cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        body["output"] = self._items
        body["usage"] = self._told_usage()
        return body

    def _body(self, status: str) -> dict[str, Any]:
        """The response without its output."""
        request, params = self._request, self._plan.params
        text: dict[str, Any] = {"format": {"type": "text"}}
        if request.text is not None and request.text.format is not None:
            text["format"] = request.text.format
        if request.text is not None and request.text.verbosity is not None:
            text["verbosity"] = request.text.verbosity
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._plan.model.name,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _told_usage(self) -> dict[str, Any]:
        """The usage in the words of this API."""
        if self._reasoning is not None:
            self._usage.num_reasoning_tokens = self._reasoning.count
        told = self._usage.usage()
        usage: dict[str, Any] = {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0, **told.get("completion_tokens_details", {})},
            "total_tokens": told["total_tokens"],
        }
        usage |= {name: told[name] for name in ("speculation", "energy_joules") if name in told}
        return usage


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """A token's log-probabilities as events show them: by its text alone."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}
