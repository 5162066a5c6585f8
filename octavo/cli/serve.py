"""`octavo serve`: the OpenAI-compatible server.

What can be known to be wrong is said before anything is loaded: options, a missing package, a port in
use. Then the engine's process is started, and while it loads the front end gets its own imports done.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from octavo import other_names
from octavo.cli.layers import Layers, Setting, current_environment, variable_of
from octavo.cli.options import SectionCommand, SectionOption, engine_kwargs, engine_options
from octavo.config import EngineArgs
from octavo.errors import ConfigError, OctavoError
from octavo.server.settings import ServeSettings, secret_names

if TYPE_CHECKING:
    from fastapi import FastAPI

    from octavo.engine.tokenizer import Tokenizer
    from octavo.server.engine_client import EngineClient
    from octavo.server.metrics import ServerMetrics

Function = TypeVar("Function", bound=Callable[..., Any])

NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "msgspec")
# Variables that mean something to other parts of Octavo.
OTHER_VARIABLES = ("OCTAVO_BYTECODE", "OCTAVO_CACHE", "OCTAVO_TEST_MODEL", "OCTAVO_TEST_THREADS")
_TYPES: dict[str, Any] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | str": str,
    "float": float,
    "tuple[str, ...]": str,
}
# --speculative-config and the flags it is made of
_EITHER = (
    frozenset({"engine_speculative"}),
    frozenset({"speculative_method", "speculative_model", "speculative_num_speculative_tokens"}),
)


class _ServeOption(SectionOption):
    section = "Server"


class _ServeCommand(SectionCommand):
    more_advice = other_names.SERVER_ADVICE


def serve_options(function: Function) -> Function:
    """Give a command one flag for each field of ServeSettings."""
    for field in reversed(fields(ServeSettings)):
        function = _serve_option(field)(function)
    return function


def _serve_option(field: Field[Any]) -> Callable[[Function], Function]:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
    if field.default not in (None, (), ""):
        shown = ("on" if field.default else "off") if field.type == "bool" else field.default
        text = f"{text} [{shown}]"
    parameter = f"serve_{field.name}"
    if field.type == "bool":
        return click.option(f"{flag}/--no-{flag[2:]}", parameter, default=None, help=text, cls=_ServeOption)
    choices = field.metadata["choices"]
    return click.option(
        flag,
        parameter,
        type=click.Choice(choices) if choices else _TYPES[str(field.type)],
        multiple=field.type == "tuple[str, ...]",
        default=None,
        help=text,
        cls=_ServeOption,
    )


@click.command(cls=_ServeCommand)
@click.argument("model", required=False)
@click.option("--model", "model_option", help="The same as the argument.")
@click.option("--config", "config_file", help="YAML file of options, named as the flags are.")
@click.option("--dry-run", is_flag=True, help="Show the configuration and the memory plan, and end.")
@serve_options
@engine_options
def command(
    model: str | None, model_option: str | None, config_file: str | None, dry_run: bool, **given: Any
) -> int:
    """Serve MODEL (default: smollm2), a folder, a .gguf file, a hub id, or an alias.

    Every flag can also be set in the environment (--max-model-len as OCTAVO_MAX_MODEL_LEN) and in the
    file of --config (max_model_len: ...). A flag wins over the environment, that over the file.
    """
    if model is not None and model_option is not None and model != model_option:
        raise click.UsageError(f"two models are given, {model} and --model {model_option}; name one.")
    environment = current_environment()
    layers = Layers(command, leave_out=("config_file", "dry_run"), either=_EITHER)
    merged = layers.merge(
        {"model_option": model or model_option, **given},
        environment,
        config_file or environment.get("OCTAVO_CONFIG") or None,
    )
    values = {name: setting.value for name, setting in merged.items()}
    settings = ServeSettings.from_kwargs(
        **{name.removeprefix("serve_"): value for name, value in values.items() if name.startswith("serve_")}
    )
    engine = _engine_args(values)
    args = EngineArgs.from_kwargs(**engine)  # refused here, before anything is started
    hidden = [
        setting.value for name, setting in merged.items() if _is_secret(name) and setting.source == "flag"
    ]
    warnings = [*_hide(hidden), *layers.unknown_variables(environment, OTHER_VARIABLES)]
    if dry_run:
        _show(layers, merged, settings, args)
        return 0
    return _serve(settings, args, engine, warnings, _secret_variables())


def _engine_args(values: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(values)
    count = given.get("speculative_num_speculative_tokens")
    if count is not None:
        given["speculative_num_speculative_tokens"] = str(count)  # YAML makes a number of it
    model = given.get("model_option")
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"model must be a text, not {model!r}")
    return engine_kwargs(model, given)


def _serve(
    settings: ServeSettings, args: EngineArgs, engine: dict[str, Any], warnings: list[str], hidden: list[str]
) -> int:
    _require_packages()
    import logging

    from octavo.cli.console import show_log

    show_log(getattr(logging, settings.log_level.upper()))
    logger = logging.getLogger("octavo")
    from octavo.server.listener import allow_many_files, bind
    from octavo.server.security import load_keys

    keys, more = load_keys(settings)
    for warning in [*warnings, *more, *_warn_if_open(settings, keys)]:
        logger.warning("%s", warning)
    allow_many_files()
    sock = bind(settings)
    child = None
    try:
        if not settings.in_process:
            from octavo.server.engine_child import EngineChild

            child = EngineChild.start(
                engine,
                log_level=settings.log_level,
                grammar_timeout=settings.grammar_timeout,
                hidden_variables=hidden,
            )
        from octavo.server.base_client import Limits
        from octavo.server.launch import serve

        limits = Limits(settings.max_queue, settings.request_timeout)

        async def make_client(metrics: ServerMetrics) -> EngineClient:
            names = settings.served_model_name or (args.model,)
            if child is None:
                from octavo.server.in_process_client import InProcessEngineClient

                inside = InProcessEngineClient(limits, metrics, served_model_names=names)
                inside.begin(engine)
                return inside
            from octavo.server.process_client import ProcessEngineClient

            outside = ProcessEngineClient(
                child, limits, metrics, served_model_names=names, engine_timeout=settings.engine_timeout
            )
            await outside.connect()
            return outside

        return serve(make_client, _make_app, sock, settings, keys)
    finally:
        sock.close()
        if child is not None:
            child.kill()


async def _make_app(client: EngineClient, settings: ServeSettings) -> FastAPI:
    """Imports and the tokenizer are got ready while the engine loads."""
    import asyncio

    def read_tokenizer(path: str | None) -> Tokenizer | None:
        import octavo.server.app  # noqa: F401 - slow the first time
        from octavo.engine.tokenizer import Tokenizer

        # A tokenizer with code of its own is read when it is known that it may run.
        return None if path is None else Tokenizer.from_folder(path)

    reading = asyncio.gather(
        asyncio.to_thread(read_tokenizer, await client.wait_found()), return_exceptions=True
    )
    info = await client.wait_ready()
    (tokenizer,) = await reading
    from octavo.server.app import create_app
    from octavo.server.state import ServedModel, ServerState

    if tokenizer is None or isinstance(tokenizer, BaseException) or info.tokenizer_path is None:
        served = await asyncio.to_thread(ServedModel.load, info, settings)
    else:
        served = await asyncio.to_thread(ServedModel.of, info, settings, tokenizer)
    return create_app(ServerState(client, settings, served))


def _require_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OctavoError(f"octavo serve needs {', '.join(missing)}: pip install 'octavo[server]'")


def _warn_if_open(settings: ServeSettings, keys: list[str]) -> list[str]:
    if settings.is_local or keys:
        return []
    return [
        f"ANYONE who reaches port {settings.port} on {settings.host} may use this server: it has no API key. "
        "Give one with --api-key-file, or listen on 127.0.0.1"
    ]


# ---------------------------------------------------------------------- secrets


def _is_secret(parameter: str) -> bool:
    return parameter.removeprefix("serve_") in secret_names()


def _secret_variables() -> list[str]:
    return [
        variable_of(o) for o in command.params if isinstance(o, click.Option) and _is_secret(o.name or "")
    ]


def _hide(values: list[Any]) -> list[str]:
    """Take secrets out of what `ps` shows; a warning where that cannot be done."""
    secrets = [text for value in values for text in ((value,) if isinstance(value, str) else value)]
    if not secrets:
        return []
    from octavo.platform.process import hide_arguments

    if hide_arguments(secrets):
        return []
    return ["the key stands in the arguments of this process, where others can read it; use --api-key-file"]


# ---------------------------------------------------------------------- --dry-run


def _show(layers: Layers, merged: Mapping[str, Setting], settings: ServeSettings, args: EngineArgs) -> None:
    """The configuration as a file that --config would read, each line with where it comes from."""
    for name, key in layers.names().items():
        setting = merged.get(name)
        if name.startswith("serve_"):
            value = getattr(settings, name.removeprefix("serve_"))
        elif name.startswith("engine_"):
            value = getattr(args, name.removeprefix("engine_"))
        elif name == "model_option":
            value = args.model
        elif setting is None:
            continue  # the parts of speculative_config that nobody gave
        else:
            value = setting.value
        if name == "engine_speculative" and setting is None and value is not None:
            continue  # shown by its parts
        source = "default" if setting is None else setting.source
        if _is_secret(name) and value:
            click.echo(f"# {key}: {_count(value)}, hidden (from {source})")
        else:
            click.echo(f"{key}: {json.dumps(value, ensure_ascii=False)}  # {source}")
    from octavo.engine.setup import plan  # loads torch: after the options are known to be right

    click.echo()
    for line in plan(args).splitlines():
        click.echo(f"# {line}")


def _count(value: Any) -> str:
    number = 1 if isinstance(value, str) else len(value)
    return "1 value" if number == 1 else f"{number} values"
