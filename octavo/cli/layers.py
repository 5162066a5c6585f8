"""One value for each option of a command, from four places: flag > environment > file > default.

The command's own click options say which there are, so that nothing can be set in one place and not
in another: `--max-model-len 4096` is `OCTAVO_MAX_MODEL_LEN=4096` in the environment (lists with commas)
and `max_model_len: 4096` in the file (YAML; dashes for underscores do as well). A name that the file
gets wrong is an error that suggests the nearest one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from octavo.errors import ConfigError

PREFIX = "OCTAVO_"


@dataclass(frozen=True)
class Setting:
    """A value and where it was given."""

    value: Any
    source: str  # "flag", the variable's name, or the file's


class Layers:
    """The options of `command`, but those in `leave_out`. `either` names options of which a higher place
    that sets one side does away with the other side's from lower places."""

    def __init__(
        self,
        command: click.Command,
        leave_out: Iterable[str] = (),
        either: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset()),
    ) -> None:
        skipped = {"debug", "help", *leave_out}
        self._options = {
            name: parameter
            for parameter in command.params
            if isinstance(parameter, click.Option) and (name := parameter.name) and name not in skipped
        }
        self._by_key = {key_of(option): name for name, option in self._options.items()}
        self._either = either

    def names(self) -> dict[str, str]:
        """Parameter name -> key in the file, in the order of the flags."""
        return {name: key_of(option) for name, option in self._options.items()}

    def merge(
        self, flags: Mapping[str, Any], environment: Mapping[str, str], file: str | None
    ) -> dict[str, Setting]:
        """What is set anywhere. Raises ConfigError or click.UsageError naming the culprit."""
        merged: dict[str, Setting] = {}
        for layer in (
            self._from_file(file) if file is not None else {},
            self._from_environment(environment),
            self._from_flags(flags),
        ):
            for side, other in (self._either, self._either[::-1]):
                if any(name in side for name in layer):
                    for name in other:
                        merged.pop(name, None)
            merged.update(layer)
        return merged

    def unknown_variables(self, environment: Mapping[str, str], known: Iterable[str]) -> list[str]:
        """Warnings about variables that look like one of ours and are not."""
        ours = {variable_of(option) for option in self._options.values()}
        found = []
        for name in sorted(environment):
            if name.startswith(PREFIX) and name not in ours and name not in known:
                near = difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
                if near:
                    found.append(f"the variable {name} is not known; did you mean {near[0]}?")
        return found

    def _from_flags(self, flags: Mapping[str, Any]) -> dict[str, Setting]:
        return {
            name: Setting(value, "flag")
            for name, value in flags.items()
            if name in self._options and value is not None and value != ()
        }

    def _from_environment(self, environment: Mapping[str, str]) -> dict[str, Setting]:
        found = {}
        for name, option in self._options.items():
            variable = variable_of(option)
            text = environment.get(variable)
            if text:  # an empty one is as good as none
                try:
                    found[name] = Setting(_convert(option, text), variable)
                except click.BadParameter as error:
                    raise ConfigError(f"the variable {variable}: {error.message}") from None
        return found

    def _from_file(self, file: str) -> dict[str, Setting]:
        found = {}
        for given, value in _read_yaml(file).items():
            key = str(given).replace("-", "_")
            name = self._by_key.get(key)
            if name is None:
                near = difflib.get_close_matches(key, self._by_key, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else "; its keys are named as the flags are"
                raise ConfigError(f"{file} has an unknown key {given!r}{hint}")
            if value is None:
                continue
            option = self._options[name]
            try:
                found[name] = Setting(_convert(option, value) if isinstance(value, str) else value, file)
            except click.BadParameter as error:
                raise ConfigError(f"{file}: {key}: {error.message}") from None
        return found


def key_of(option: click.Option) -> str:
    """The option's key in a file: its flag, with underscores."""
    return option.opts[0].removeprefix("--").replace("-", "_")


def variable_of(option: click.Option) -> str:
    """The option's variable in the environment."""
    return PREFIX + key_of(option).upper()


def _convert(option: click.Option, text: str) -> Any:
    if option.multiple:
        return tuple(
            option.type.convert(part.strip(), option, None) for part in text.split(",") if part.strip()
        )
    if option.is_flag:
        return click.BOOL.convert(text, option, None)
    return option.type.convert(text, option, None)


def _read_yaml(file: str) -> dict[Any, Any]:
    """The mapping a YAML file holds. Raises ConfigError."""
    try:
        import yaml
    except ImportError:
        raise ConfigError("--config needs the package pyyaml: pip install 'octavo[server]'") from None

    class Loader(yaml.SafeLoader):
        """Without keys given twice, of which YAML would take the last in silence."""

    def mapping(loader: Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"{file} gives the key {twice!r} twice")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"the configuration file {file} must hold `key: value` lines, not a {type(content).__name__}"
        )
    return content


def current_environment() -> Mapping[str, str]:
    """The process's environment; read here and nowhere else in the command line."""
    return os.environ
