"""A conversation becomes one prompt text, through the jinja template that comes with the model.

The rendering is that of transformers: the same environment (trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, the `generation` tag), the same
variables, the same way to continue a final message. A template is a program that came with a download,
so it runs in `template_sandbox`; whatever goes wrong in it is an error of the one request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from octavo.engine.template_sandbox import TemplateSandbox
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ConfigError, RequestError

Message = Mapping[str, Any]

# Marks where the final message ends, if it is to be continued. The space at its end shows whether the
# template trims what it is given.
_CONTINUE_HERE = "OCTAVO_CONTINUES_THE_FINAL_MESSAGE_HERE "


class ChatTemplate:
    """The chat template of one model; several by name if the model has several (say "tool_use").

    Made from a template's text, from {name: text}, or from None: then `render` says what to pass.
    Safe to use from several threads.
    """

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,  # name -> the file it came from, for errors
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self._special_tokens = dict(special_tokens or {})
        self._files = dict(files or {})
        self._sandbox = TemplateSandbox()
        self._compiled: dict[str, tuple[jinja2.Template, bool]] = {}
        self._lock = threading.Lock()  # the sandbox counts what one rendering spends

    @property
    def sources(self) -> Mapping[str, str]:
        """The texts of the templates, by name."""
        return self._sources

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Tokenizer | None, chat_template: str | Path | None = None
    ) -> ChatTemplate:
        """The template a model is used with.

        `chat_template` is a template's text, the path of a file, or the name of one of the model's own
        templates; None takes the model's. Raises `ConfigError` if it is none of these.
        """
        own = tokenizer.chat_template if tokenizer else None
        special_tokens = tokenizer.special_tokens if tokenizer else {}
        files = tokenizer.template_files if tokenizer else {}
        if chat_template is None:
            return cls(own, special_tokens, files)
        if isinstance(own, Mapping) and chat_template in own:
            file = {"default": files[str(chat_template)]} if chat_template in files else None
            return cls(own[str(chat_template)], special_tokens, file)
        text = str(chat_template)
        if isinstance(chat_template, str) and ("{" in text or "\n" in text):
            return cls(text, special_tokens)
        try:
            return cls(Path(chat_template).read_text(encoding="utf-8"), special_tokens, {"default": text})
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template={text!r} is neither a jinja template nor a file that can be read ({error})"
            ) from error

    def check(self) -> None:
        """Raises the RequestError that every conversation would end in, if there is one.

        A template that is not there or cannot be compiled; what one does when it runs shows only then.
        """
        name = self._choose(None)
        with self._lock:
            self._compile(name)

    def faults(self) -> list[str]:
        """What is wrong with each template that cannot be compiled: what refused requests are told."""
        found = []
        for name in self._sources:
            try:
                with self._lock:
                    self._compile(name)
            except RequestError as error:
                found.append(str(error))
        return found

    @property
    def is_busy(self) -> bool:
        """True while another thread renders: `render` would wait for it."""
        return self._lock.locked()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt text of a conversation. Encode it with `add_special_tokens=False`.

        messages: dicts with "role" and "content"; the content is a string or a list of
            {"type": "text", "text": ...} parts. Other keys go to the template as they are.
        tools: JSON schemas of functions.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end inside the final message, so that the model goes on with it.
        template_kwargs: more variables for the template, such as enable_thinking.

        Raises `RequestError` for a malformed message and for whatever the template refuses.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message=True goes on with the last message and add_generation_prompt=True "
                "begins a new one: set one of them to False",
                "continue_final_message",
            )
        name = self._choose(tools)
        with self._lock:
            template, wants_parts = self._compile(name)
            variables = {
                "documents": None,
                **self._special_tokens,
                **_plain(template_kwargs, "chat_template_kwargs"),
                "messages": _read_messages(messages, wants_parts),
                "tools": _plain(tools, "tools") or None,
                "add_generation_prompt": add_generation_prompt,
            }
            if not continue_final_message:
                return self._run(template, variables)
            last = _mark_end(variables["messages"][-1])
            return _cut_at_mark(self._run(template, variables), last)

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" in self._sources:
            return "default"
        if self._sources:
            raise RequestError(
                f"this model has the chat templates {', '.join(sorted(self._sources))} and no default one: "
                "choose one with chat_template=NAME",
                "chat_template",
            )
        raise RequestError(
            "this model has no chat template, so a conversation cannot become a prompt: pass chat_template= "
            "(the text or the path of a jinja template), or use generate with a plain prompt",
            "messages",
        )

    def _compile(self, name: str) -> tuple[jinja2.Template, bool]:
        if name not in self._compiled:
            source = self._sources[name]
            try:
                template = self._sandbox.from_string(source)
                wants_parts = _iterates_over_content(self._sandbox.parse(source))
            except jinja2.TemplateSyntaxError as error:
                where = f" ({self._files[name]})" if name in self._files else ""
                raise RequestError(
                    f"the chat template{where} has a syntax error in line {error.lineno}: {error.message}",
                    "chat_template",
                ) from error
            except Exception as error:  # a hostile template can break the compiler (recursion, memory)
                raise _failed(error) from error
            self._compiled[name] = (template, wants_parts)
        return self._compiled[name]

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        try:
            return self._sandbox.render(template, variables)
        except Exception as error:  # the template's code may raise anything
            raise _failed(error) from error


def _failed(error: Exception) -> RequestError:
    if type(error) is jinja2.TemplateError:  # raise_exception: the template's own words to the user
        return RequestError(str(error), "messages")
    return RequestError(f"the chat template failed: {type(error).__name__}: {error}", "messages")


def _iterates_over_content(template: nodes.Template) -> bool:
    """True if the template reads a message's content part by part, as templates of later models do."""
    for loop in template.find_all(nodes.For):
        items = loop.iter
        if isinstance(items, nodes.Getattr) and items.attr == "content":
            return True
        if (
            isinstance(items, nodes.Getitem)
            and isinstance(items.arg, nodes.Const)
            and items.arg.value == "content"
        ):
            return True
        if isinstance(items, nodes.Name) and items.name == "content":
            return True
    return False


def _read_messages(messages: Sequence[Message], wants_parts: bool) -> list[dict[str, Any]]:
    """Plain copies of the messages, checked; keys that are None are left out, as transformers does."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages must be a list with at least one message", "messages")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        plain = _plain(message, where)
        if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
            raise RequestError(f'{where} must be a dict with a "role" that is a string', where)
        if plain.keys() <= {"role"}:
            raise RequestError(f"{where} has no content", where + ".content")
        plain = {key: value for key, value in plain.items() if value is not None}
        if "content" in plain:
            plain["content"] = _read_content(plain["content"], where + ".content", wants_parts)
        result.append(plain)
    return result


def _read_content(content: Any, where: str, wants_parts: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", where)
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f'{here}: only parts of type "text" can be used here, not {kind!r}', here)
        if not isinstance(part.get("text"), str):
            raise RequestError(f'{here} must have a "text" that is a string', here)
    return content if wants_parts else "\n".join(part["text"] for part in content)


def _plain(value: Any, where: str) -> Any:
    """A copy out of plain JSON types, so that a template can neither change nor call what it is given."""
    if value is None or isinstance(value, (bool, int, float, str)):
        for kind in (str, bool, int, float):
            if isinstance(value, kind):
                return kind(value)  # a subclass could bring methods along
        return None
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic object, say of the openai client
        return _plain(dump(exclude_none=True), where)
    raise RequestError(f"{where} holds a {type(value).__name__}, which has no place in a conversation", where)


def _mark_end(message: dict[str, Any]) -> str:
    """Put the mark behind the message's text; returns the text before it."""
    content = message.get("content")
    holder, key = (
        (message, "content") if isinstance(content, str) else (content[-1] if content else {}, "text")
    )
    if not isinstance(holder.get(key), str):
        raise RequestError("continue_final_message=True needs a final message that has a text", "messages")
    text: str = holder[key]
    holder[key] = text + _CONTINUE_HERE
    return text


def _cut_at_mark(rendered: str, final_text: str) -> str:
    at = rendered.rfind(_CONTINUE_HERE.strip())
    if at < 0 or final_text.strip() not in rendered:
        raise RequestError(
            "the final message cannot be continued, because the chat template does not write it out whole: "
            "use continue_final_message=False",
            "continue_final_message",
        )
    trimmed = not rendered.startswith(_CONTINUE_HERE, at)
    return rendered[:at].rstrip() if trimmed else rendered[:at]
