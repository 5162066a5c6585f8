"""/v1/chat/completions, field by field, against a fake engine; answers held to OpenAI's own types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from octavo.server.base_client import OpenRequest
from tests.server import strict
from tests.server.serving import HERMES, LLAMA, MISTRAL, THINKING, Server, serving, tokenizer, tokens

HI: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
CALL_TEXTS = {
    HERMES: 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    MISTRAL: 'I look.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich"}}, '
    '{"name": "get_time", "arguments": {}}]',
    LLAMA: 'I look.<|python_tag|>{"name": "get_weather", "parameters": {"city": "Zürich"}}; '
    '{"name": "get_time", "parameters": {}}',
}


def post(server: Server, path: str = "/v1/chat/completions", /, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120)


def ask(server: Server, **body: Any) -> Any:
    """A whole answer, checked."""
    answer = post(server, **{"messages": HI, **body})
    assert answer.status_code == 200, answer.text
    return strict.chat(answer.json())


def stream(server: Server, **body: Any) -> list[Any]:
    """A stream, checked."""
    answer = post(server, **{"messages": HI, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return strict.chat_chunks(answer.text)


def texts_of(chunks: list[Any], index: int = 0, field: str = "content") -> str:
    deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join(getattr(delta, field, None) or "" for delta in deltas)


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that always says the same, with words of several bytes."""
    with serving("Grüße aus 東京 👍 to you") as server:
        yield server


def last_request(server: Server) -> OpenRequest:
    request: OpenRequest = server.engine.requests[-1]
    return request


# ---------------------------------------------------------------------- text


def test_an_answer(plain: Server) -> None:
    answer = ask(plain, model="fake")
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content == "Grüße aus 東京 👍 to you"
    assert answer.choices[0].finish_reason == "stop"
    prompt = tokenizer().encode("<|start|>user\nHi<|eot|>\n<|start|>assistant\n", add_special_tokens=False)
    assert last_request(plain).prompt_ids == prompt
    assert last_request(plain).kind == "final"
    assert not last_request(plain).continue_prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens("Grüße aus 東京 👍 to you"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream(plain: Server) -> None:
    chunks = stream(plain)
    assert texts_of(chunks) == "Grüße aus 東京 👍 to you"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last_request(plain).kind == "delta"


def test_the_request_id_is_the_callers(plain: Server) -> None:
    body = {"messages": HI}
    answer = httpx.post(
        plain.url + "/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"}, timeout=120
    )
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "chatcmpl-mine-1"


def test_the_usage_chunk_has_no_choices(plain: Server) -> None:
    chunks = stream(plain, stream_options={"include_usage": True})
    *others, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == len(tokens("Grüße aus 東京 👍 to you"))
    assert all(chunk.usage is None and chunk.choices for chunk in others)


def test_continuous_usage(plain: Server) -> None:
    chunks = stream(plain, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == len(tokens("Grüße aus 東京 👍 to you"))


def test_several_answers(plain: Server) -> None:
    answer = ask(plain, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 3 * len(tokens("Grüße aus 東京 👍 to you"))
    chunks = stream(plain, n=3)
    assert {texts_of(chunks, index) for index in range(3)} == {"Grüße aus 東京 👍 to you"}


def test_best_of(plain: Server) -> None:
    ask(plain, n=2, best_of=3)
    assert last_request(plain).params.best_of == 3
    ask(plain, n=2, best_of=2)  # nothing to rank
    assert last_request(plain).params.best_of is None
    refused = post(plain, messages=HI, n=1, best_of=2, stream=True)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "best_of"
    assert stream(plain, n=1, best_of=1)


def test_sampling_fields_arrive(plain: Server) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.1, "seed": 17, "stop": ["x"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True, "bad_words": ["y"], "allowed_token_ids": [1, 2, 3],
        "logit_bias": {"4": -1.5}, "max_tokens": 9, "min_tokens": 2, "ignore_eos": True,
        "skip_special_tokens": False, "num_speculative_tokens": 3, "cache_salt": "s", "priority": 5,
        "prompt_logprobs": 1, "trace": True,
    }  # fmt: skip
    answer = post(plain, messages=HI, **given)
    assert "x-octavo-warnings" not in answer.headers
    params = last_request(plain).params
    for name, value in given.items():
        found = getattr(params, name)
        expected = {4: -1.5} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        assert found == expected, name


def test_what_is_left_open(plain: Server) -> None:
    ask(plain)
    params = last_request(plain).params
    assert params.max_tokens is None  # the rest of the context
    assert params.temperature == 1.0
    nulls = dict.fromkeys(
        ["temperature", "stop", "n", "tools", "logprobs", "seed", "response_format", "user"]
    )
    ask(plain, **nulls)
    assert last_request(plain).params == params
    ask(plain, max_completion_tokens=5)
    assert last_request(plain).params.max_tokens == 5


def test_the_models_own_defaults() -> None:
    with serving(generation_defaults={"temperature": 0.25, "max_new_tokens": 11}) as server:
        ask(server)
        assert last_request(server).params.temperature == 0.25
        assert last_request(server).params.max_tokens == 11
        ask(server, temperature=0.75)
        assert last_request(server).params.temperature == 0.75


def test_length(plain: Server) -> None:
    assert ask(plain, max_tokens=3).choices[0].finish_reason == "length"
    assert stream(plain, max_tokens=3)[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs(plain: Server, top: int) -> None:
    whole = ask(plain, logprobs=True, top_logprobs=top).choices[0].logprobs.content
    chunks = stream(plain, logprobs=True, top_logprobs=top)
    parts = [
        entry for chunk in chunks for c in chunk.choices if c.logprobs for entry in c.logprobs.content or []
    ]
    assert parts == whole
    assert b"".join(bytes(entry.bytes) for entry in whole).decode() == "Grüße aus 東京 👍 to you"
    assert all(len(entry.top_logprobs) == top for entry in whole)
    assert {entry.logprob for entry in whole} == {-0.5}
    if top:
        assert whole[0].top_logprobs[0].token == whole[0].token


def test_token_ids(plain: Server) -> None:
    answer = ask(plain, return_token_ids=True, prompt_logprobs=0)
    ids = [i for _, i in tokens("Grüße aus 東京 👍 to you")]
    assert answer.choices[0].token_ids == ids
    assert answer.prompt_token_ids == last_request(plain).prompt_ids
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    chunks = stream(plain, return_token_ids=True, prompt_logprobs=0)
    assert chunks[0].choices[0].prompt_token_ids == answer.prompt_token_ids
    assert chunks[0].choices[0].prompt_logprobs == answer.prompt_logprobs
    found = [c.token_ids for chunk in chunks for c in chunk.choices if hasattr(c, "token_ids")]
    assert [i for part in found for i in part] == ids
    named = ask(plain, logprobs=True, return_tokens_as_token_ids=True).choices[0].logprobs.content
    assert named[0].token == f"token_id:{ids[0]}"


def test_conversations_as_the_template_sees_them(plain: Server) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Yes"},
    ]
    ask(plain, messages=messages, add_generation_prompt=False)
    assert last_request(plain).prompt == (
        "<|start|>system\nBe brief.<|eot|>\n<|start|>user\na\nb<|eot|>\n<|start|>assistant\nYes<|eot|>\n"
    )
    answer = ask(plain, messages=messages, continue_final_message=True, echo=True)
    assert str(last_request(plain).prompt).endswith("<|start|>assistant\nYes")
    assert answer.choices[0].message.content == "YesGrüße aus 東京 👍 to you"
    chunks = stream(plain, messages=messages, continue_final_message=True, echo=True)
    assert texts_of(chunks) == "YesGrüße aus 東京 👍 to you"


def test_a_broken_template_refuses_conversations_alone() -> None:
    with serving(template="fine\n{% if %}") as server:
        refused = post(server, messages=HI)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("the chat template has a syntax error in line 2")
        plain = post(server, "/v1/completions", prompt="Hi", max_tokens=2)
        assert plain.status_code == 200


def test_prompts_are_cut_on_request(plain: Server) -> None:
    ask(plain, truncate_prompt_tokens=4)
    assert len(last_request(plain).prompt_ids) == 4
    assert post(plain, messages=HI, truncate_prompt_tokens=0).status_code == 400


# ---------------------------------------------------------------------- forms


def test_forms_of_answers(plain: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    forms: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            {"json": schema},
        ),
        ({"guided_json": json.dumps(schema)}, {"json": schema}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ("yes", "no")}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": schema}}, {"json": schema}),
    ]
    for body, expected in forms:
        ask(plain, **body)
        assert last_request(plain).params.structured_outputs == expected, body


def test_two_forms_contradict(plain: Server) -> None:
    refused = post(plain, messages=HI, guided_regex="a", response_format={"type": "json_object"})
    assert refused.status_code == 400
    assert "response_format and guided_regex" in refused.json()["error"]["message"]


# ---------------------------------------------------------------------- tools


@pytest.mark.parametrize("template", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
def test_tool_calls_whole_and_streamed(template: str) -> None:
    with serving(CALL_TEXTS[template], template=template) as server:
        answer = ask(server, tools=[WEATHER, TIME])
        assert '"name": "get_weather"' in str(last_request(server).prompt)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
        assert calls == [("get_weather", {"city": "Zürich"}), ("get_time", {})]
        ids = [c.id for c in choice.message.tool_calls]
        assert len(set(ids)) == 2
        if template is MISTRAL:
            assert all(len(i) == 9 and i.isalnum() for i in ids)

        chunks = stream(server, tools=[WEATHER, TIME])
        assert texts_of(chunks) == "I look."
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        built: dict[int, list[str]] = {}
        for delta in [c for chunk in chunks for ch in chunk.choices for c in ch.delta.tool_calls or []]:
            if delta.index not in built:
                assert delta.id
                assert delta.type == "function"
                assert delta.function.name
                built[delta.index] = [delta.function.name, ""]
            else:
                assert delta.id is None
                assert delta.function.name is None
            built[delta.index][1] += delta.function.arguments
        assert [(name, json.loads(text)) for name, text in built.values()] == calls

        single = ask(server, tools=[WEATHER, TIME], parallel_tool_calls=False).choices[0].message
        assert [c.function.name for c in single.tool_calls] == ["get_weather"]
        none = ask(server, tools=[WEATHER], tool_choice="none").choices[0]
        assert none.message.tool_calls is None
        assert none.message.content == CALL_TEXTS[template]
        assert "get_weather" not in str(last_request(server).prompt)


def test_a_call_can_be_required() -> None:
    def script(request: OpenRequest) -> str:
        form = request.params.structured_outputs
        assert form is not None
        schema = form["json"]
        if schema["type"] == "array":
            return '[{"name": "get_weather", "parameters": {"city": "Rome"}}]'
        return '{"city": "Rome"}'

    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "get_time"}}],
        },
    }
    with serving(script, template=HERMES) as server:
        for choice in ("required", named):
            message = ask(server, tools=[WEATHER, TIME], tool_choice=choice).choices[0].message
            assert message.content is None
            assert message.tool_calls[0].function.name == "get_weather"
            assert message.tool_calls[0].function.arguments == '{"city": "Rome"}'
            chunks = stream(server, tools=[WEATHER, TIME], tool_choice=choice)
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        form = last_request(server).params.structured_outputs
        assert form == {"json": WEATHER["function"]["parameters"]}
        ask(server, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
        form = last_request(server).params.structured_outputs
        assert form is not None
        assert form["json"]["maxItems"] == 1
        names = [call["properties"]["name"]["const"] for call in form["json"]["items"]["anyOf"]]
        assert names == ["get_weather", "get_time"]
        ask(server, tools=[WEATHER, TIME], tool_choice=allowed)
        form = last_request(server).params.structured_outputs
        assert form is not None
        names = [call["properties"]["name"]["const"] for call in form["json"]["items"]["anyOf"]]
        assert names == ["get_time"]


def test_definitions_of_required_calls_stand_at_the_root() -> None:
    place = {"$defs": {"P": {"type": "string"}}, "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}}
    other = {**place, "$defs": {"P": {"type": "integer"}}}

    def tool(name: str, parameters: Any) -> Any:
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    with serving("[]", template=HERMES) as server:
        ask(server, tools=[tool("a", place), tool("b", place)], tool_choice="required")
        form = last_request(server).params.structured_outputs
        assert form is not None
        assert form["json"]["$defs"] == place["$defs"]
        answer = post(server, messages=HI, tools=[tool("a", place), tool("b", other)], tool_choice="required")
        assert answer.status_code == 400
        assert "$defs/P" in answer.json()["error"]["message"]


def test_earlier_calls_go_back_to_the_template() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
    }
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    with serving(template=HERMES) as server:
        ask(server, messages=messages, tools=[WEATHER])
        prompt = str(last_request(server).prompt)
        assert '<tool_call>{"name": "get_weather", "arguments": {"city": "X"}}</tool_call>' in prompt
        assert "<|start|>tool\nrain" in prompt


def test_tools_for_a_template_that_knows_none() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    with serving(CALL_TEXTS[HERMES]) as server:
        answer = post(server, messages=messages, tools=[WEATHER])
        prompt = str(last_request(server).prompt)
        assert prompt.startswith("<|start|>system\nBe brief.\n\n# Tools")
        assert json.dumps(WEATHER) in prompt
        assert "<|start|>user\n<tool_response>\nrain\n</tool_response>" in prompt
        assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "X"}}\n</tool_call>' in prompt
        assert "knows none" in answer.headers["x-octavo-warnings"]
        assert strict.chat(answer.json()).choices[0].finish_reason == "tool_calls"


def test_special_tokens_that_mark_calls_reach_the_parser() -> None:
    """Where <tool_call> is a special token the engine must show it, and the answer no other one."""
    # The little tokenizer's marks are its own; the format is told so.
    from octavo.server.answer import tool_formats
    from octavo.server.answer.tool_parsers import HermesParser

    class Parser(HermesParser):
        _BEGIN, _END = "<|begin_of_text|>", "<|eot|>"

    special = tool_formats.ToolFormat(
        "special", ("never",), ("<|begin_of_text|>", "<|eot|>"), lambda names, drop: Parser(drop)
    )
    text = '<|start|>Look.<|begin_of_text|>{"name": "get_time", "arguments": {}}<|eot|><|end_of_text|>'
    with serving(text, template=HERMES) as server:
        model = server.app.state.octavo.served
        object.__setattr__(model, "tool_format", special)
        answer = ask(server, tools=[TIME])
        assert last_request(server).params.skip_special_tokens is False
        assert answer.choices[0].message.content == "Look."
        assert answer.choices[0].message.tool_calls[0].function.name == "get_time"
        kept = ask(server, tools=[TIME], skip_special_tokens=False)
        assert kept.choices[0].message.content == "<|start|>Look.<|end_of_text|>"


def test_a_template_of_an_unknown_format() -> None:
    template = HERMES.replace("<tool_call>", "<<call>>").replace("</tool_call>", "")
    with serving('[{"name": "get_time", "parameters": {}}]', template=template) as server:
        refused = post(server, messages=HI, tools=[TIME])
        assert refused.status_code == 400
        assert "--tool-parser" in refused.json()["error"]["message"]
        assert ask(server, tools=[TIME], tool_choice="required").choices[0].finish_reason == "tool_calls"
    options = {"tool_parser": "hermes"}
    with serving(CALL_TEXTS[HERMES], template=template, settings=options) as server:
        assert ask(server, tools=[WEATHER, TIME]).choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
    ],
)
def test_tools_that_contradict(plain: Server, body: dict[str, Any], param: str) -> None:
    refused = post(plain, messages=HI, **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


# ---------------------------------------------------------------------- reasoning


def test_reasoning_is_told_apart() -> None:
    with serving("Hm. 2+2?\n</think>\n\nFour.", template=THINKING) as server:
        answer = ask(server)
        assert str(last_request(server).prompt).endswith("<think>\n")
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm. 2+2?", "Four.")
        reasoning_tokens = answer.usage.completion_tokens_details.reasoning_tokens
        assert 0 < reasoning_tokens < answer.usage.completion_tokens
        chunks = stream(server, stream_options={"include_usage": True})
        assert texts_of(chunks, field="reasoning_content") == "Hm. 2+2?"
        assert texts_of(chunks) == "Four."
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == reasoning_tokens
        without = ask(server, include_reasoning=False).choices[0].message
        assert not hasattr(without, "reasoning_content")
        assert without.content == "Four."
        assert texts_of(stream(server, include_reasoning=False), field="reasoning_content") == ""
        held = ask(server, response_format={"type": "json_object"}).choices[0].message
        assert held.content == "Hm. 2+2?\n</think>\n\nFour."  # a form holds the whole answer


def test_thinking_can_be_switched_off() -> None:
    with serving("Four.", template=THINKING) as server:
        for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            message = ask(server, **body).choices[0].message
            assert str(last_request(server).prompt).endswith("</think>\n\n")
            assert message.content == "Four."
            assert not hasattr(message, "reasoning_content")
    with serving("Hm.</think>4", template=THINKING, settings={"reasoning_parser": "none"}) as server:
        assert ask(server).choices[0].message.content == "Hm.</think>4"


# ---------------------------------------------------------------------- predictions


def test_predictions(plain: Server) -> None:
    given = {
        "type": "content",
        "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "guess"}],
    }
    answer = post(plain, messages=HI, prediction=given)
    assert answer.status_code == 200
    assert "prediction: not used" in answer.headers["x-octavo-warnings"]
    with serving(speculative_method="predicted") as server:
        answer = post(server, messages=HI, prediction=given)
        assert "x-octavo-warnings" not in answer.headers
        assert last_request(server).params.prediction == "a guess"
        details = strict.chat(answer.json()).usage.completion_tokens_details  # type: ignore[union-attr]
        assert details is not None
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)


# ---------------------------------------------------------------------- what is not used, or refused


def test_warnings(plain: Server) -> None:
    answer = post(
        plain, messages=HI, user="me", store=True, frobnicate=1, verbosity="low", service_tier="auto",
        metadata={"a": "b"}, safety_identifier="z",
    )  # fmt: skip
    assert answer.status_code == 200
    named = [warning.split(":")[0] for warning in answer.headers["x-octavo-warnings"].split("; ")]
    assert sorted(named) == ["frobnicate", "safety_identifier", "store", "user", "verbosity"]
    assert strict.chat(answer.json()).metadata == {"a": "b"}
    hostile = post(plain, messages=HI, **{"a\r\nSet-Cookie: x": 1, "é" * 100: 1})
    assert hostile.status_code == 200
    assert "set-cookie" not in hostile.headers
    many = post(plain, messages=HI, **{f"x{i}": i for i in range(1000)})
    assert "and 980 more" in many.headers["x-octavo-warnings"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {"x": 1}}, "web_search_options"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"prediction": {"type": "thought", "content": "x"}}, "prediction"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
    ],
)
def test_refused(plain: Server, body: dict[str, Any], param: str) -> None:
    for streams in (False, True):
        if streams and "stream_options" in body:
            continue  # right, in a stream
        answer = post(plain, **{"messages": HI, "stream": streams, **body})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, error


def test_schemas_have_bounds(plain: Server) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(70):
        deep = {"type": "object", "properties": {"a": deep}}
    large = {"enum": ["x" * 1000] * 300}
    for schema in (deep, large):
        body = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        assert post(plain, messages=HI, response_format=body).status_code == 400
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert post(plain, messages=HI, tools=[tool]).status_code == 400


# ---------------------------------------------------------------------- the official client


def test_the_official_client(plain: Server) -> None:
    client = openai.OpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    answer = client.chat.completions.create(model="fake", messages=HI)
    assert answer.choices[0].message.content == "Grüße aus 東京 👍 to you"
    text = ""
    for chunk in client.chat.completions.create(model="fake", messages=HI, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == "Grüße aus 東京 👍 to you"
    with client.chat.completions.stream(model="fake", messages=HI) as helped:
        assert helped.get_final_completion().choices[0].message.content == text
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-4o", messages=HI)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=HI, temperature=-1)
    assert refused.value.param == "temperature"


def test_the_official_client_reads_forms_and_calls() -> None:
    class City(BaseModel):
        name: str
        inhabitants: int

    class get_weather(BaseModel):
        city: str

    def script(request: OpenRequest) -> str:
        if request.params.structured_outputs is not None:
            return '{"name": "Bern", "inhabitants": 134000}'
        return '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'

    with serving(script, template=HERMES) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        parsed = client.chat.completions.parse(model="fake", messages=HI, response_format=City)
        assert parsed.choices[0].message.parsed == City(name="Bern", inhabitants=134000)
        tools: Any = [openai.pydantic_function_tool(get_weather)]
        called = client.chat.completions.parse(model="fake", messages=HI, tools=tools)
        calls = called.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].function.parsed_arguments == get_weather(city="Bern")
        with client.chat.completions.stream(model="fake", messages=HI, tools=tools) as events:
            final = events.get_final_completion()
        calls = final.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].function.parsed_arguments == get_weather(city="Bern")


def test_the_official_client_async(plain: Server) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=plain.url + "/v1", api_key="none", max_retries=0) as client:

            async def one() -> str:
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="fake", messages=HI, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*[one() for _ in range(8)])

    assert asyncio.run(run()) == ["Grüße aus 東京 👍 to you"] * 8
