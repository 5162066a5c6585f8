"""Prompts equal those of transformers, and a template can neither break out nor run on for ever."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from octavo.engine import template_sandbox
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import CheckpointError, ConfigError, RequestError
from tests.engine import sample_tokenizers

LLAMA3 = """{{- bos_token }}
{%- set system = namespace(text='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system.text = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system.text }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim ~ '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set text = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- generation %}{{- turn('assistant', text) }}{% endgeneration %}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

CHAT = [
    {"role": "user", "content": " Hi <b>&amp; 你 \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello there  "},
    {"role": "user", "content": 'What is "1 + 1"?'},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief. "}, *CHAT]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a <&> b é",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def folder_with(tmp_path: Path, template: Any) -> Path:
    config = {"chat_template": template, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    return sample_tokenizers.save(sample_tokenizers.byte_level(), tmp_path, config)


def of_folder(folder: Path) -> ChatTemplate:
    return ChatTemplate.for_tokenizer(Tokenizer.from_folder(folder))


@pytest.mark.parity
@pytest.mark.parametrize("template", [LLAMA3, QWEN, MISTRAL], ids=["llama3", "qwen", "mistral"])
def test_same_as_transformers(tmp_path: Path, template: str) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        folder_with(tmp_path, template)
    )
    ours = of_folder(tmp_path)
    conversations = [CHAT, CHAT[:1], CHAT[:2]] + ([] if template is MISTRAL else [WITH_SYSTEM])
    for messages in conversations:
        for tools in (None, TOOLS):
            for more in ({}, {"enable_thinking": False}):
                for prompt in (True, False):
                    expected = theirs.apply_chat_template(
                        messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **more
                    )
                    assert ours.render(messages, tools, add_generation_prompt=prompt, **more) == expected
        if messages[-1]["role"] == "assistant" and template is not QWEN:
            expected = theirs.apply_chat_template(messages, continue_final_message=True, tokenize=False)
            got = ours.render(messages, add_generation_prompt=False, continue_final_message=True)
            assert got == expected


@pytest.mark.parity
def test_smollm2_same_as_transformers(smollm2_path: Path) -> None:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer = Tokenizer.from_folder(smollm2_path)
    assert tokenizer is not None
    ours = ChatTemplate.for_tokenizer(tokenizer)
    for messages in (CHAT, WITH_SYSTEM, CHAT[:2]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = ours.render(messages)
        assert text == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(text, add_special_tokens=False) == list(ids)


def test_parts_become_one_text_unless_the_template_reads_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    plain = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert plain.render([{"role": "user", "content": parts}]) == "a\nb"
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source).render([{"role": "user", "content": parts}]) == "[a][b]"
    assert ChatTemplate(source).render([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], '"role"'),
        ([{"role": 3, "content": "x"}], '"role"'),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": ["x"]}], "only parts of type"),
        ([{"role": "user", "content": [{"type": "text"}]}], '"text"'),
        ([{"role": "user", "content": "x", "more": object()}], "object"),
    ],
)
def test_malformed_messages(messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ChatTemplate("{{ messages[0].content }}").render(messages)


def test_keys_that_are_none_are_left_out_and_objects_are_read() -> None:
    class Reply:
        def model_dump(self, exclude_none: bool) -> dict[str, Any]:
            return {"role": "assistant", "content": "hello"}

    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    message = {"role": "user", "content": None, "name": None}
    assert template.render([message, Reply()]) == '{"role": "user"}{"role": "assistant", "content": "hello"}'  # type: ignore[list-item]
    assert message == {"role": "user", "content": None, "name": None}


def test_model_without_template_says_what_to_pass(tmp_path: Path) -> None:
    sample_tokenizers.save(sample_tokenizers.byte_level(), tmp_path)
    with pytest.raises(RequestError, match="chat_template="):
        of_folder(tmp_path).render(CHAT)
    with pytest.raises(RequestError, match="chat_template="):
        ChatTemplate.for_tokenizer(None).render(CHAT)


def test_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = folder_with(tmp_path / "a", [*named, {"name": "rag", "template": "rag"}])
    assert of_folder(folder).render(CHAT) == "plain"
    assert of_folder(folder).render(CHAT, tools=TOOLS) == "with tools"
    assert ChatTemplate.for_tokenizer(Tokenizer.from_folder(folder), "rag").render(CHAT, tools=TOOLS) == "rag"
    no_default = folder_with(tmp_path / "b", named[1:])
    with pytest.raises(RequestError, match="tool_use"):
        of_folder(no_default).render(CHAT)


def test_template_given_as_text_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("from a file: {{ messages[0].content }}", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path / "model", "own"))
    hi = [{"role": "user", "content": "hi"}]
    for given in (tmp_path / "mine.jinja", str(tmp_path / "mine.jinja")):
        assert ChatTemplate.for_tokenizer(tokenizer, given).render(hi) == "from a file: hi"
    assert ChatTemplate.for_tokenizer(tokenizer, "{{ eos_token }}").render(hi) == "<|eot|>"
    with pytest.raises(ConfigError, match=r"no-such\.jinja"):
        ChatTemplate.for_tokenizer(tokenizer, "no-such.jinja")


def test_a_fault_names_its_file(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", "ok\n{% if %}")
    (fault,) = of_folder(folder).faults()
    assert "(tokenizer_config.json) has a syntax error in line 2" in fault
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert of_folder(folder).faults() == []
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{% for %}", encoding="utf-8")
    template = of_folder(folder)
    (fault,) = template.faults()
    assert "(additional_chat_templates/tool_use.jinja) has a syntax error in line 1" in fault
    template.check()  # conversations without tools do
    with pytest.raises(RequestError) as raised:
        template.render(CHAT, tools=TOOLS)
    assert str(raised.value) == fault
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% endif %}", encoding="utf-8")
    (fault,) = ChatTemplate.for_tokenizer(None, str(mine)).faults()
    assert f"({mine})" in fault
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        of_folder(folder)


def test_continue_final_message() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer "}]
    render = template.render
    assert (
        render(messages, add_generation_prompt=False, continue_final_message=True)
        == "<user>q</><assistant>The answer "
    )
    trimming = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}")
    got = trimming.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert got == "<user>q</><assistant>The answer"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render(parts, add_generation_prompt=False, continue_final_message=True) == "<assistant>a\nb"
    with pytest.raises(RequestError, match="set one of them to False"):
        render(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("nothing").render(messages, add_generation_prompt=False, continue_final_message=True)
    nothing_said = [{"role": "assistant", "content": None}]
    with pytest.raises(RequestError, match="has a text"):
        render(nothing_said, add_generation_prompt=False, continue_final_message=True)


def test_a_message_of_nothing_but_a_role_is_named() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\] has no content"):
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(
            [{"role": "user", "content": "q"}, {"role": "assistant"}]
        )


def test_errors_carry_the_words_of_the_template() -> None:
    with pytest.raises(RequestError, match=r"^Conversation roles must alternate"):
        ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""}).render(CHAT[1:])
    with pytest.raises(RequestError, match="syntax error in line 2"):
        ChatTemplate("ok\n{% if %}").render(CHAT)
    with pytest.raises(RequestError, match="No filter named 'shout'"):
        ChatTemplate("{{ messages | shout }}").check()
    ChatTemplate("{{ nobody.name }}").check()  # shows only when it runs
    with pytest.raises(RequestError, match="no chat template"):
        ChatTemplate(None).check()
    with pytest.raises(RequestError, match="UndefinedError: 'nobody' is undefined"):
        ChatTemplate("{{ nobody.name }}").render(CHAT)
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}").render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.translate({}) }}",
    ],
)
def test_no_way_out(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template failed"):
        ChatTemplate(source).render(CHAT)


GROW = (
    "{% set ns = namespace(s='aaaaaaaaaaaaaaaa', l=[1, 2]) %}"
    "{% for i in range(99) %}{% set ns.s = STEP %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{{ range(10 ** 9) | list }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{% for i in range(9999) %}" + "a" * 1000 + "{% endfor %}",
        "{% for i in range(9999) %}{{ '" + "a" * 1000 + "' }}{% endfor %}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a' | indent(10 ** 9) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 1 | tojson(indent=10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        GROW.replace("STEP", "ns.s + ns.s"),
        GROW.replace("STEP", "ns.s ~ ns.s"),
        GROW.replace("STEP", "ns.s.replace('a', ns.s)"),
        GROW.replace("STEP", "ns.s | replace('a', ns.s)"),
        GROW.replace("STEP", "ns.s | join(ns.s)"),
        GROW.replace("STEP", "ns.s.join(ns.s)"),
        GROW.replace("STEP", "'%s%s' % (ns.s, ns.s)"),
        GROW.replace("STEP", "('{0}' * 1000).format(ns.s)"),
        GROW.replace("STEP", "[ns.s, ns.s]"),
        GROW.replace("STEP", "{'a': ns.s, 'b': ns.s}"),
        GROW.replace("STEP", "dict(a=ns.s, b=ns.s)"),
        GROW.replace("STEP", "(ns.l * 2) | batch(2) | list").replace("ns.s", "ns.l"),
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    ],
    ids=lambda source: source[:60],
)
def test_nothing_runs_away(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_ROUNDS", 20_000)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 2**18)
    monkeypatch.setattr(template_sandbox, "MAX_ITEMS", 2**14)
    monkeypatch.setattr(template_sandbox, "MAX_WRITTEN", 2**19)
    begin = time.thread_time()
    with pytest.raises(RequestError, match="the chat template failed"):
        ChatTemplate(source).render(CHAT)
    assert time.thread_time() - begin < 2


def test_the_clock_ends_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(RequestError, match="seconds"):
        ChatTemplate("{% for i in range(99999) %}{% set x = range(9999) | list %}{% endfor %}").render(CHAT)


def test_each_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_ROUNDS", 100)
    template = ChatTemplate("{% for i in range(90) %}{% endfor %}ok")
    assert [template.render(CHAT) for _ in range(3)] == ["ok"] * 3


def test_long_conversations_fit_the_budget(smollm2_path: Path) -> None:
    template = of_folder(smollm2_path)
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y"}] * 2000
    assert len(template.render(messages)) > 2_000_000
