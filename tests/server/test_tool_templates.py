"""What a chat template writes for an assistant's calls is what we read out of a model's answer.

A model learns to call from its own template: the text of a call in a conversation is the text that it
writes itself. The turns below are written as the named models' published templates write them (the
order of the keys, the blanks and line ends are theirs), rendered by our sandbox, and read back. For
Hermes 2 Pro and Llama 3.1 the golden texts were compared with what the turns of the published templates
render; those of Qwen and Mistral could not be had here and are from their documentation.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.engine.chat_template import ChatTemplate
from octavo.server.answer.tool_formats import format_of_template
from tests.server.serving import tokenizer
from tests.server.test_answer import read

Call = tuple[str, dict[str, Any]]

ODD = {"city": "Zürich <b> \"'", "n": [1, 2.5, None, True, {"}]": '"}{'}], "text": "a\nb\\n\t</tool_call"}
TWO: list[Call] = [("get_weather", ODD), ("add", {})]
STOPS = ["<|im_end|>", "<|eot_id|>", "</s>"]

# name -> (the template's turns, the format it is taken for, calls a turn may hold, golden text of one call)
TEMPLATES: dict[str, tuple[str, str, int, str]] = {
    "Hermes 2 Pro": (
        "{% for c in m.tool_calls %}{{ '\\n' }}<tool_call>\n"
        "{ \"arguments\": {{ c.function.arguments | tojson }}, "
        "\"name\": \"{{ c.function.name }}\"}\n</tool_call> {% endfor %}<|im_end|>\n",
        "hermes",
        2,
        '\n<tool_call>\n{ "arguments": {"a": 1}, "name": "add"}\n</tool_call> <|im_end|>\n',
    ),
    "Qwen 2.5, Qwen 3": (
        "{{ m.content }}{% for c in m.tool_calls %}{{ '\\n' }}<tool_call>\n"
        "{\"name\": \"{{ c.function.name }}\", "
        "\"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n",
        "hermes",
        2,
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n',
    ),
    "Llama 3.1": (
        "{% if false %}ipython{% endif %}{% set f = m.tool_calls[0].function %}"
        "{\"name\": \"{{ f.name }}\", \"parameters\": {{ f.arguments | tojson }}}<|eot_id|>",
        "llama3_json",
        1,
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
    ),
    "Mistral 7B v0.3, Nemo": (
        "[TOOL_CALLS] [{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", "
        "\"arguments\": {{ c.function.arguments | tojson }}, \"id\": \"{{ c.id }}\"}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]</s>",
        "mistral",
        2,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefgh0"}]</s>',
    ),
    "Mistral Small 3.1 and later": (
        "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}</s>",
        "mistral",
        2,
        '[TOOL_CALLS]add[ARGS]{"a": 1}</s>',
    ),
}  # fmt: skip


def rendered(turn: str, calls: list[Call]) -> str:
    """The assistant's turn, as the template writes it behind the generation prompt."""
    source = (
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{% if m.tool_calls %}" + turn + "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    template = ChatTemplate.for_tokenizer(tokenizer(source), source)
    asked = [{"role": "user", "content": "What is it like in Zürich?"}]
    made = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": made}
    before = template.render(asked, add_generation_prompt=True)
    whole = template.render([*asked, answer], add_generation_prompt=False)
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("model", list(TEMPLATES))
def test_the_golden_text(model: str) -> None:
    turn, _, _, golden = TEMPLATES[model]
    assert rendered(turn, [("add", {"a": 1})]) == golden


@pytest.mark.parametrize("calls", [TWO, TWO[:1], TWO[1:]], ids=["two", "one", "empty"])
@pytest.mark.parametrize("model", list(TEMPLATES))
def test_calls_are_read_back_however_the_text_is_cut(model: str, calls: list[Call]) -> None:
    turn, name, most, _ = TEMPLATES[model]
    calls = calls[:most]
    text = rendered(turn, calls)
    found = format_of_template(turn)
    assert found is not None
    assert found.name == name
    for size in (len(text), 1, 2, 3, 7, 20):
        parser = found.make(frozenset(known for known, _ in TWO), STOPS)
        chunks = [text[at : at + size] for at in range(0, len(text), size)]
        _, content, read_calls = read(parser, chunks)
        assert [(called, json.loads(arguments)) for called, arguments in read_calls] == calls
        assert content.strip() == ""
