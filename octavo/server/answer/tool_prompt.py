"""Tools for models whose chat template knows none: described in the system message, Hermes' way.

Small instruct models were often trained on this very form, and the others can follow it. Calls and
results of earlier turns are written out as text in the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = """\
# Tools

You may call one or more functions to assist with the user query. You are provided with function \
signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a JSON object with the function's name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages as a template without tools can write them.

    messages: as templates expect them; tools: likewise, None if nothing may be called.
    """
    told = [_as_text(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        introduction = _INTRODUCTION.format(tools=listed)
        if told and told[0]["role"] == "system":
            own = _text_of(told[0].get("content"))
            told[0] = {**told[0], "content": f"{own}\n\n{introduction}" if own else introduction}
        else:
            told.insert(0, {"role": "system", "content": introduction})
    return told


def uses_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """True if a message holds calls or the result of one."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = _text_of(message.get("content"))
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    texts = [_text_of(message.get("content"))]
    for call in calls:
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        texts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    kept = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    return {**kept, "content": "\n".join(filter(None, texts))}


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""
