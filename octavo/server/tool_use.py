"""What a request may call, must call, and how that is brought about.

Whether the model calls anything is its own decision with tool_choice "auto": its template shows it the
tools and its text is parsed. "required" and a named function are enforced: structured output holds the
answer to a list of calls, or to the arguments of the one function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from octavo.errors import RequestError
from octavo.server.protocol.chat import Tool, ToolChoice
from octavo.server.protocol.generation import check_form
from octavo.server.settings import ServeSettings

MAX_REQUIRED_CALLS = 32  # of one answer, so that a list of calls ends


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request, checked."""

    functions: tuple[dict[str, Any], ...] = ()  # {"name", "description"?, "parameters"?}
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str | None = None  # of the function that must be called
    parallel: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions that may be called."""
        return frozenset(function["name"] for function in self.functions)

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them; None if nothing may be called."""
        if self.mode == "none":
            return None
        return [{"type": "function", "function": function} for function in self.functions]

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that enforces the call; None with mode auto and none."""
        if self.mode == "named":
            return next(_parameters(f) for f in self.functions if f["name"] == self.name)
        if self.mode != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "parameters": _parameters(function)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for function in self.functions
        ]
        # Definitions that a function's schema refers to ("#/$defs/X") must stand at the root.
        definitions: dict[str, Any] = {}
        for function in self.functions:
            for key in ("$defs", "definitions"):
                for name, schema in (_parameters(function).get(key) or {}).items():
                    if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                        raise RequestError(
                            f"tools: two functions define {key}/{name} differently, which tool_choice "
                            "required cannot enforce; rename one",
                            "tools",
                        )
        return {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_REQUIRED_CALLS if self.parallel else 1,
            "items": {"anyOf": calls},
            **definitions,
        }


def read_tools(
    tools: list[Tool] | None,
    choice: Literal["none", "auto", "required"] | ToolChoice | None,
    parallel: bool | None,
    settings: ServeSettings,
) -> ToolUse:
    """Check tools and tool_choice against one another and the bounds. Raises RequestError."""
    if len(tools or ()) > settings.max_tools:
        raise RequestError(
            f"{len(tools or ())} tools are more than the {settings.max_tools} allowed", "tools"
        )
    functions = [_function(tool, f"tools[{index}]", settings) for index, tool in enumerate(tools or ())]
    names = [function["name"] for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"tools name the function {json.dumps(twice)} twice", "tools")
    strict = any(tool.function is not None and tool.function.strict for tool in tools or ())
    mode: Literal["none", "auto", "required", "named"] = "auto"
    name = None
    if isinstance(choice, str):
        mode = choice
    elif choice is not None:
        if choice.type == "function" and choice.function is not None:
            mode, name = "named", choice.function.name
        elif choice.type == "allowed_tools" and choice.allowed_tools is not None:
            mode = choice.allowed_tools.mode
            allowed = [_allowed_name(tool) for tool in choice.allowed_tools.tools]
            _check_known(allowed, names)
            functions = [function for function in functions if function["name"] in allowed]
        else:
            raise RequestError(
                'tool_choice must be "none", "auto", "required", a function or allowed_tools', "tool_choice"
            )
    if name is not None:
        _check_known([name], names)
    if not functions:
        if mode in ("required", "named"):
            raise RequestError(f"tool_choice {mode!r} needs tools", "tool_choice")
        return ToolUse()
    warnings: tuple[str, ...] = ()
    if strict and mode == "auto":
        warnings = ("tools.function.strict: enforced with tool_choice required or a named function only",)
    return ToolUse(tuple(functions), mode, name, parallel is not False, warnings)


def _function(tool: Tool, where: str, settings: ServeSettings) -> dict[str, Any]:
    if tool.type != "function" or tool.function is None:
        raise RequestError(f'{where}: only tools of type "function" can be called here', where)
    if tool.function.parameters is not None:
        check_form({"json": tool.function.parameters}, settings, f"{where}.function.parameters")
    return tool.function.model_dump(exclude_none=True, exclude={"strict"})


def _allowed_name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    if not isinstance(name, str):
        raise RequestError("tool_choice.allowed_tools names a tool that is no function", "tool_choice")
    return name


def _check_known(wanted: list[str], names: list[str]) -> None:
    for name in wanted:
        if name not in names:
            raise RequestError(
                f"tool_choice names {json.dumps(name)}, which is not among tools", "tool_choice"
            )


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    # A function without parameters takes an empty object, as with OpenAI.
    return function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
