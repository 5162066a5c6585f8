"""Flags made from the fields of `EngineArgs` and `SamplingParams`.

One flag a field, so that no option of the engine is missing here or spelled differently. A flag
that was not given is not passed on: the defaults live in the dataclasses (and, for sampling, in
the model's generation_config), not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from octavo import other_names
from octavo.config import EngineArgs
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams

Function = TypeVar("Function", bound=Callable[..., Any])

# Fields whose flag has another name than the field. `--seed` is the sampling parameter: with it a
# prompt draws the same answer again. The engine's own seed is for requests that bring none.
_FLAG_NAMES = {"speculative": "--speculative-config", "seed": "--engine-seed"}


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None


def _logit_bias(value: str) -> tuple[int, float]:
    token, _, bias = value.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not TOKEN_ID:BIAS, such as 42:-1.5") from None


# How --help shows a value that click has no name for.
_METAVARS: dict[Any, str] = {_json: "JSON", _logit_bias: "ID:BIAS"}

# The texts of annotations in EngineArgs -> how the flag reads its value. A size is left as text
# for EngineArgs itself, which knows what "256MB" means.
_TYPES: dict[str, Any] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "int | str | None": str,
    "float": float,
    "dict[str, Any] | None": _json,
    "list[dict[str, Any]] | None": _json,
}


class SectionOption(click.Option):
    """An option that `--help` shows under a heading of its own."""

    section = ""


class SectionCommand(click.Command):
    """A command whose help groups SectionOptions under their headings, after its own options."""

    more_advice: Mapping[str, str] = {}  # on flags that only other engines' commands of this kind have

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; a flag of another engine is answered with ours."""
        given = list(args)  # click takes them off one by one
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flag = _as_written(error.option_name, given)
            advice = self.more_advice.get(_name_of(flag)) or _flag_advice(flag)
            if advice is None:
                raise
            raise click.UsageError(f"No such option: {flag}: {advice}", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = parameter.section if isinstance(parameter, SectionOption) else "Options"
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class _EngineOption(SectionOption):
    section = "Engine"


class _OptionToCome(SectionOption):
    """Read, and refused by EngineArgs unless it has its default."""

    section = "Not in this version"


class _SamplingOption(SectionOption):
    section = "Sampling"


# Shorter ways to say --speculative-config: key of `speculative` -> (flag, type, help).
_SPECULATIVE: dict[str, tuple[str, Any, str]] = {
    "method": (
        "--speculative-method",
        str,
        "prompt_lookup, suffix, predicted, draft_model, hybrid, or package.module:Class",
    ),
    "model": ("--draft", str, "draft model: a folder, a .gguf file, a hub id, or an alias"),
    "num_speculative_tokens": ("--num-speculative-tokens", str, 'drafts a step: "auto", or 0 to 16 [auto]'),
}


def engine_options(function: Function) -> Function:
    """Give a command one flag for each field of EngineArgs but the model; see `engine_kwargs`."""
    return _add_engine_options(function, other_names.TO_COME)


def batch_engine_options(function: Function) -> Function:
    """As `engine_options`, for a command that runs several replicas."""
    return _add_engine_options(function, other_names.TO_COME - {"data_parallel_size"})


def _add_engine_options(function: Function, to_come: frozenset[str]) -> Function:
    for key, (flag, kind, text) in reversed(_SPECULATIVE.items()):
        option = click.option(
            flag, f"speculative_{key}", type=kind, default=None, help=text, cls=_EngineOption
        )
        function = option(function)
    for field in reversed(fields(EngineArgs)):
        if field.name != "model":
            kind = _OptionToCome if field.name in to_come else _EngineOption
            function = _engine_option(field, kind)(function)
    return function


def _engine_option(field: Field[Any], option_class: type[SectionOption]) -> Callable[[Function], Function]:
    metadata: Mapping[str, Any] = field.metadata
    flag = metadata.get("flag") or _flag_of(field.name)
    text = metadata["help"]
    if field.default is not None:
        shown = ("on" if field.default else "off") if field.type == "bool" else field.default
        text = f"{text} [{shown}]"
    parameter = f"engine_{field.name}"
    if field.type == "bool":
        return click.option(
            f"{flag}/--no-{flag.removeprefix('--')}", parameter, default=None, help=text, cls=option_class
        )
    choices = metadata.get("choices")
    kind = click.Choice(choices) if choices else _TYPES[str(field.type)]
    return click.option(
        flag,
        parameter,
        type=kind,
        metavar=None if choices else _METAVARS.get(kind),
        default=None,
        help=text,
        cls=option_class,
    )


def _flag_of(field_name: str) -> str:
    return _FLAG_NAMES.get(field_name) or f"--{field_name.replace('_', '-')}"


def _as_written(flag: str, given: list[str]) -> str:
    """`-tp` for the `-t` that click makes of it."""
    if flag.startswith("--"):
        return flag
    return next((word for word in given if word.startswith(flag)), flag)


def _name_of(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0].replace("-", "_")


def _flag_advice(flag: str) -> str | None:
    """What to write instead of a flag that only other engines have; None if we know of none."""
    name = _name_of(flag)
    ours = other_names.OPTIONS.get(name, name)
    if ours == "model":
        return "the model is the first argument, as in octavo generate MODEL"
    if ours != name:
        return other_names.renamed(ours, _flag_of(ours))
    if name in other_names.SAMPLING:
        parameter, rest = re.split(r"(?!\w)", other_names.SAMPLING[name], maxsplit=1)
        return f"here it is called --{parameter.replace('_', '-')}{rest}"
    if name.startswith("no_"):
        name = name.removeprefix("no_")
    return other_names.OPTIONS_ADVICE.get(name) or other_names.SAMPLING_ADVICE.get(name)


def engine_kwargs(model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for LLM or EngineArgs from a command's parameters, unset ones left out."""
    kwargs = {
        name.removeprefix("engine_"): value
        for name, value in given.items()
        if name.startswith("engine_") and value is not None
    }
    speculative = {
        key: given[f"speculative_{key}"] for key in _SPECULATIVE if given.get(f"speculative_{key}")
    }
    if speculative:
        if "speculative" in kwargs:
            raise click.UsageError("give either --speculative-config or the flags it is made of")
        count = speculative.get("num_speculative_tokens", "auto")
        if count.isdigit():
            speculative["num_speculative_tokens"] = int(count)
        if "model" in speculative:
            speculative.setdefault("method", "draft_model")
        kwargs["speculative"] = speculative
    return kwargs if model is None else {"model": model, **kwargs}


# field of SamplingParams -> (type, help); a list type is a flag that may be repeated
_SAMPLING: dict[str, tuple[Any, str]] = {
    "temperature": (float, "0 is greedy; smaller is more predictable"),
    "top_p": (float, "keep the most probable tokens up to this share"),
    "top_k": (int, "keep this many tokens; 0 is off"),
    "min_p": (float, "drop tokens below this share of the best one's probability"),
    "max_tokens": (int, "longest answer, in tokens"),
    "min_tokens": (int, "shortest answer, in tokens"),
    "seed": (int, "the same seed draws the same answer"),
    "stop": ([str], "end before this text; may be repeated"),
    "stop_token_ids": ([int], "end at this token; may be repeated"),
    "include_stop_str_in_output": (bool, "keep the stop text in the answer"),
    "ignore_eos": (bool, "go on after the model's end token"),
    "n": (int, "answers for each prompt"),
    "best_of": (int, "make this many answers and show the n most probable"),
    "presence_penalty": (float, "make tokens that occurred less likely, once"),
    "frequency_penalty": (float, "make tokens less likely for each time they occurred"),
    "repetition_penalty": (float, "divide the scores of tokens that occurred"),
    "bad_words": ([str], "never write this; may be repeated"),
    "allowed_token_ids": ([int], "write nothing but these tokens; may be repeated"),
    "logit_bias": ([_logit_bias], "TOKEN_ID:BIAS added to a score; may be repeated"),
    "logprobs": (int, "show the log-probabilities of this many tokens (with --json)"),
    "prompt_logprobs": (int, "the same for the prompt (with --json)"),
    "skip_special_tokens": (bool, "leave special tokens out of the text"),
    "structured_outputs": (_json, 'such as {"regex": "[0-9]+"}; also json, grammar, choice'),
}


def sampling_options(*, only: frozenset[str] | None = None) -> Callable[[Function], Function]:
    """Give a command the sampling flags (all, or `only` these); see `sampling_params`."""

    def decorate(function: Function) -> Function:
        for name, (kind, text) in reversed(_SAMPLING.items()):
            if only is None or name in only:
                function = _sampling_option(name, kind, text)(function)
        return function

    return decorate


def _sampling_option(name: str, kind: Any, text: str) -> Callable[[Function], Function]:
    flag, parameter = f"--{name.replace('_', '-')}", f"sampling_{name}"
    if kind is bool:
        return click.option(
            f"{flag}/--no-{flag[2:]}", parameter, default=None, help=text, cls=_SamplingOption
        )
    repeated = isinstance(kind, list)
    one = kind[0] if repeated else kind
    return click.option(
        flag,
        parameter,
        type=one,
        metavar=_METAVARS.get(one),
        multiple=repeated,
        default=None,
        help=text,
        cls=_SamplingOption,
    )


def sampling_params(given: Mapping[str, Any]) -> SamplingParams | None:
    """The SamplingParams a command's parameters ask for; None if none was given.

    Raises click.UsageError for an illegal value.
    """
    values = {
        name.removeprefix("sampling_"): value
        for name, value in given.items()
        if name.startswith("sampling_") and value is not None and value != ()
    }
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    try:
        return SamplingParams(**values) if values else None
    except RequestError as error:
        raise click.UsageError(str(error)) from None
