"""/v1/responses: items, events in OpenAI's order, and what a stateless server refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.server import strict
from tests.server.serving import HERMES, THINKING, Server, serving, tokens
from tests.server.test_chat import CALL_TEXTS, last_request, post

PATH = "/v1/responses"
SAID = "Grüße aus 東京!"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TIME: dict[str, Any] = {"type": "function", "name": "get_time", "strict": False}


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that always says the same."""
    with serving(SAID) as server:
        yield server


def ask(server: Server, **body: Any) -> Any:
    answer = post(server, PATH, **{"input": "Hi", **body})
    assert answer.status_code == 200, answer.text
    return strict.response(answer.json())


def stream(server: Server, **body: Any) -> list[Any]:
    answer = post(server, PATH, **{"input": "Hi", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return strict.response_events(answer.text)


def test_a_response(plain: Server) -> None:
    answer = ask(plain, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=99)
    assert answer.status == "completed"
    assert answer.output_text == SAID
    assert answer.metadata == {"a": "b"}
    assert answer.temperature == 0.5
    assert answer.max_output_tokens == 99
    assert answer.usage.output_tokens == len(tokens(SAID))
    prompt = "<|start|>system\nBe brief.<|eot|>\n<|start|>user\nHi<|eot|>\n<|start|>assistant\n"
    assert last_request(plain).prompt == prompt
    assert last_request(plain).params.max_tokens == 99


def test_events_of_a_text(plain: Server) -> None:
    events = stream(plain)
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == SAID
    assert next(e.text for e in events if e.type == "response.output_text.done") == SAID
    whole = events[-1].response
    assert whole.output_text == SAID
    assert whole.usage.output_tokens == len(tokens(SAID))
    assert events[0].response.status == "in_progress"
    assert events[0].response.id == whole.id


def test_a_response_that_is_cut_short(plain: Server) -> None:
    answer = ask(plain, max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    events = stream(plain, max_output_tokens=2)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "incomplete"


def test_calls_whole_and_as_events() -> None:
    with serving(CALL_TEXTS[HERMES], template=HERMES) as server:
        answer = ask(server, tools=[WEATHER, TIME])
        assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
        assert answer.output[1].name == "get_weather"
        assert json.loads(answer.output[1].arguments) == {"city": "Zürich"}
        events = stream(server, tools=[WEATHER, TIME])
        added = [e for e in events if e.type == "response.output_item.added"]
        assert [e.output_index for e in added] == [0, 1, 2]
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        for index, event in enumerate(done, start=1):
            pieces = [
                e.delta for e in events if getattr(e, "item_id", None) == event.item_id and "delta" in e.type
            ]
            assert "".join(pieces) == event.arguments
            assert event.item_id == added[index].item.id
        assert [item.type for item in events[-1].response.output] == [
            "message",
            "function_call",
            "function_call",
        ]
        choice = {"type": "function", "name": "get_time"}
        ask(server, tools=[WEATHER, TIME], tool_choice=choice)
        form = last_request(server).params.structured_outputs
        assert form is not None
        assert form["json"]["type"] == "object"


def test_reasoning_is_an_item() -> None:
    with serving("Hm.\n</think>\nYes.", template=THINKING) as server:
        answer = ask(server)
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output[0].content[0].text == "Hm."
        assert answer.output_text == "Yes."
        assert answer.usage.output_tokens_details.reasoning_tokens > 0
        events = stream(server)
        assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "Hm."
        assert events[-1].response.output_text == "Yes."


def test_conversations() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "X"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    with serving(template=HERMES) as server:
        ask(server, input=items, tools=[WEATHER])
        prompt = str(last_request(server).prompt)
        assert "<|start|>system\nBe brief.<|eot|>\n<|start|>user\nWeather?<|eot|>\n" in prompt
        assert (
            '<|start|>assistant\n<tool_call>{"name": "get_weather", "arguments": {"city": "X"}}</tool_call>'
            '<tool_call>{"name": "get_time", "arguments": {}}</tool_call><|eot|>\n'
            "<|start|>tool\nrain<|eot|>\n<|start|>tool\nnoon<|eot|>\n" in prompt
        )


def test_logprobs(plain: Server) -> None:
    answer = ask(plain, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = answer.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == SAID
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    events = stream(plain, include=["message.output_text.logprobs"])
    streamed = [p.token for e in events if e.type == "response.output_text.delta" for p in e.logprobs]
    assert streamed == [entry.token for entry in entries]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": []}, "messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call"}]}, "input"),
        ({"input": [{"type": 7}]}, "input[0]"),
        ({"input": 3}, "input"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}, "verbosity": 3}}, "text"),
    ],
)
def test_refused(plain: Server, body: dict[str, Any], param: str) -> None:
    for streams in (False, True):
        answer = post(plain, PATH, **{"input": "Hi", "stream": streams, **body})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


def test_warnings(plain: Server) -> None:
    answer = post(plain, PATH, input="Hi", user="me", truncation="auto", store=False, frobnicate=1)
    named = [warning.split(":")[0] for warning in answer.headers["x-octavo-warnings"].split("; ")]
    assert sorted(named) == ["frobnicate", "truncation", "user"]


def test_the_official_client(plain: Server) -> None:
    client = openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)
    assert client.responses.create(model="fake", input="Hi").output_text == SAID
    with client.responses.stream(model="fake", input="Hi") as helped:
        assert helped.get_final_response().output_text == SAID

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0) as client:
            answer = await client.responses.create(model="fake", input="Hi")
            return answer.output_text

    assert asyncio.run(run()) == SAID


def test_the_official_client_reads_forms() -> None:
    class City(BaseModel):
        name: str

    with serving('{"name": "Bern"}') as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        parsed = client.responses.parse(model="fake", input="Hi", text_format=City)
        assert parsed.output_parsed == City(name="Bern")
        form = last_request(server).params.structured_outputs
        assert form is not None
        assert form["json"]["properties"]["name"]["type"] == "string"
