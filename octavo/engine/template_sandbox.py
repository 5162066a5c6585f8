"""The jinja environment that chat templates run in: no way out, and no way to run on for ever.

Jinja's immutable sandbox keeps a template away from Python's insides and from changing what it is given.
It does not bound what a template may spend, and a template comes with a download. So each rendering
has a budget, and an operation that would spend more raises `SecurityError`:

- every round of a loop and every call of a macro or block is counted, and looks at the clock,
- every text that is written out is counted, and so is every value made by + * ** % ~ or a call,
- numbers that say how wide, how many or how deep are bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_format, do_join
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_ROUNDS = 1_000_000  # of loops, macros and blocks
MAX_SECONDS = 5.0
MAX_CHARACTERS = 16 * 2**20  # of a value
MAX_ITEMS = 2**20  # of a value, those inside its items included
MAX_WRITTEN = 128 * 2**20  # characters written out, those of macros and set blocks included
MAX_NUMBER = 10_000  # given to a filter or method of a string: a width, a depth, a count
MAX_BITS = 4096  # of an integer

# No chat template uses these, and what they make cannot be bounded from outside.
_WITHOUT_FILTERS = ("urlize", "wordwrap", "xmlattr")
_NUMERIC_FILTERS = ("batch", "center", "indent", "round", "slice", "truncate")


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just written out."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """One rendering at a time: the owner holds a lock around `render`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=self._count_written,
        )
        self._rounds = 0
        self._written = 0
        self._deadline = 0.0
        del self.globals["lipsum"]
        for name in _WITHOUT_FILTERS:
            del self.filters[name]
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["namespace"] = TemplateNamespace
        self.filters["tojson"] = tojson
        self.filters["replace"] = _replace
        self.filters["join"] = _join
        self.filters["format"] = _format
        for name in _NUMERIC_FILTERS:
            self.filters[name] = _with_small_numbers(self.filters[name])

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render with a fresh budget."""
        self._rounds = 0
        self._written = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        return template.render(variables)

    # What a template is made into: each body begins with a call of `count_round`; each ~ is a call of
    # `concatenate`, and each list, tuple or dict goes through `weigh`. All three are attributes of the
    # environment, so that no variable of the template can take their place.

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        kinds: tuple[type[Any], ...] = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
        for kind in kinds:
            for repeated in source.find_all(kind):
                written: list[nodes.Expr] = [nodes.Const(_literal_characters(repeated))]
                call = nodes.Call(nodes.EnvironmentAttribute("count_round"), written, [], None, None)
                repeated.body.insert(0, nodes.ExprStmt(call, lineno=repeated.lineno))
        source.set_environment(self)
        _rewrite_children(source)
        return super()._generate(source, *args, **kwargs)

    def count_round(self, literal_characters: int) -> None:
        self._rounds += 1
        self._count_characters(literal_characters)
        if self._rounds > MAX_ROUNDS:
            raise SecurityError(f"it goes through more than {MAX_ROUNDS} rounds of loops and macros")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def concatenate(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        _check_characters(sum(map(len, texts)))
        return "".join(texts)

    def weigh(self, value: Any) -> Any:
        """A list of a list of a list that are all the same object is small, and its text endless."""
        items = characters = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            items += 1
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, (list, tuple)):
                waiting.extend(item)
            elif isinstance(item, dict):
                waiting.extend(item)
                waiting.extend(item.values())
            if items + len(waiting) > MAX_ITEMS:
                raise SecurityError(f"it makes a value of more than {MAX_ITEMS} items")
        _check_characters(characters)
        return value

    def _count_written(self, value: Any) -> Any:
        self._count_characters(len(value) if isinstance(value, str) else 16)
        return value

    def _count_characters(self, number: int) -> None:
        self._written += number
        if self._written > MAX_WRITTEN:
            raise SecurityError(f"it writes more than {MAX_WRITTEN} characters")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and operator == "%":
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, str) and isinstance(right, str) and operator == "+":
            _check_characters(len(left) + len(right))
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    _check_characters(len(value) * count)
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")
        result = super().call_binop(context, operator, left, right)
        return self.weigh(result) if isinstance(result, (list, tuple)) else result

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            _check_string_method(owner, function.__name__, (*args, *kwargs.values()))
        result = super().call(context, function, *args, **kwargs)
        return self.weigh(result) if function is dict else result


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's namespace, whose text does not grow with what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


def _literal_characters(body: nodes.Node) -> int:
    """Characters of the template's own text that one round of a body can write, besides its values."""
    total = 0
    for output in body.find_all(nodes.Output):
        for part in output.nodes:
            text = getattr(part, "data", None) or getattr(part, "value", None)
            total += len(text) if isinstance(text, str) else 0
    return total


def _rewrite_children(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    value[i] = _rewritten(item)
        elif isinstance(value, nodes.Node):
            setattr(node, name, _rewritten(value))


def _rewritten(node: nodes.Node) -> nodes.Node:
    _rewrite_children(node)
    if isinstance(node, nodes.Concat):
        name, arguments = "concatenate", node.nodes
    elif isinstance(node, (nodes.List, nodes.Dict, nodes.Tuple)) and getattr(node, "ctx", "load") == "load":
        name, arguments = "weigh", [node]
    else:
        return node
    at: dict[str, Any] = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Call(nodes.EnvironmentAttribute(name, **at), arguments, [], None, None, **at)


def _check_characters(number: int) -> None:
    if number > MAX_CHARACTERS:
        raise SecurityError(f"it makes a value of more than {MAX_CHARACTERS} characters")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"it asks for a width, depth or count of more than {MAX_NUMBER}")


def _check_format(pattern: str, values: Sequence[Any]) -> None:
    digits = 0
    for character in pattern:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 4:
            raise SecurityError(f"it asks for a width, depth or count of more than {MAX_NUMBER}")
    fields = pattern.count("%") + pattern.count("{")
    if "*" in pattern or "{" in pattern:  # a width can be taken from the values
        _check_numbers(values)
    longest = max((len(value) for value in values if isinstance(value, str)), default=0)
    _check_characters(len(pattern) + fields * max(longest, MAX_NUMBER if digits else 0))


def _check_string_method(owner: str, name: str, values: Sequence[Any]) -> None:
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_numbers(values)
        tab = max([8, *(value for value in values if isinstance(value, int))])
        _check_characters(owner.count("\t") * tab if name == "expandtabs" else 0)
    elif name in ("format", "format_map"):
        _check_format(owner, values)
    elif name == "replace" and len(values) >= 2:
        _check_replace(owner, values[0], values[1])
    elif name == "join" and values and isinstance(values[0], (str, list, tuple)):
        _check_characters(len(owner) * len(values[0]))
    elif name == "translate":
        raise SecurityError("it calls translate")


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_characters(len(text) + text.count(old) * len(new))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(value)
    _check_replace(text, old, new)
    return text.replace(str(old), str(new), -1 if count is None else count)


@jinja2.pass_eval_context
def _join(eval_ctx: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    values = value if isinstance(value, (str, list, tuple)) else list(value)
    _check_characters(len(d) * len(values))
    text: str = do_join(eval_ctx, values, d, attribute)
    return text


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value, (*args, *kwargs.values()))
    text: str = do_format(value, *args, **kwargs)
    return text


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are bounded, and that fills gaps with single values only."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        settings = (*args[1:], *kwargs.values())
        _check_numbers(settings)
        if any(isinstance(value, (list, tuple, dict)) for value in settings):
            raise SecurityError("it gives a list to a filter that takes numbers and texts")
        if function.__name__ == "do_indent":
            lines = str(args[0]).count("\n") + 1
            _check_characters(lines * max([1, *(len(v) if isinstance(v, str) else int(v) for v in settings)]))
        return function(*args, **kwargs)

    # jinja reads from the function whether it wants the environment as its first argument
    if hasattr(function, "jinja_pass_arg"):
        bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


def raise_exception(message: str) -> NoReturn:
    """Lets a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The time of day, for templates that tell the model the date."""
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on: unlike jinja's own filter it does not escape HTML."""
    _check_numbers((indent,))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
