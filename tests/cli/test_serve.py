"""`octavo serve` up to the moment it would load a model: where options come from, and what is refused."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import serve
from octavo.cli.layers import Layers, variable_of
from octavo.config import EngineArgs
from octavo.errors import ConfigError
from octavo.server.settings import ServeSettings
from tests.cli.conftest import Cli

pytest.importorskip("yaml")


class Started(Exception):
    """Raised where the server would start, with what it would start with."""

    def __init__(self, settings: ServeSettings, args: EngineArgs, warnings: list[str]) -> None:
        super().__init__("started")
        self.settings, self.engine, self.warnings = settings, args, warnings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OCTAVO_") and not name.startswith("OCTAVO_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the verb and catch what it would start."""

    def stop(
        settings: ServeSettings,
        args: EngineArgs,
        engine: dict[str, Any],
        warnings: list[str],
        hidden: list[str],
    ) -> int:
        assert EngineArgs.from_kwargs(**engine) == args
        raise Started(settings, args, warnings)

    monkeypatch.setattr(serve, "_serve", stop)
    monkeypatch.setattr(serve, "_hide", lambda values: [f"hidden {values}"] if values else [])

    def call(*arguments: str) -> Started:
        with pytest.raises(Started) as caught:
            serve.command.main(list(arguments), prog_name="serve", standalone_mode=False)
        return caught.value

    return call


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("model: from-file\nport: 1111\nmax-num-seqs: 11\nmax_model_len: 1024\nhost: 0.0.0.0\n")
    monkeypatch.setenv("OCTAVO_PORT", "2222")
    monkeypatch.setenv("OCTAVO_MAX_NUM_SEQS", "22")
    found = start("--config", str(file), "--port", "3333")
    assert found.settings.port == 3333
    assert found.engine.max_num_seqs == 22
    assert found.engine.max_model_len == 1024
    assert found.settings.host == "0.0.0.0"
    assert found.settings.max_queue == ServeSettings().max_queue
    assert found.engine.model == "from-file"
    assert start("given", "--config", str(file)).engine.model == "given"
    assert start("--model", "given", "--config", str(file)).engine.model == "given"
    monkeypatch.setenv("OCTAVO_MODEL", "from-env")
    assert start("--config", str(file)).engine.model == "from-env"
    monkeypatch.setenv("OCTAVO_CONFIG", str(file))
    assert start().engine.max_model_len == 1024
    assert start().settings.port == 2222


def test_every_flag_is_a_variable_and_a_key() -> None:
    layers = Layers(serve.command, leave_out=("config_file", "dry_run"))
    keys = set(layers.names().values())
    assert {f.name for f in fields(ServeSettings)} <= keys
    ours = {"seed": "engine_seed", "speculative": "speculative_config"}
    assert {ours.get(f.name, f.name) for f in fields(EngineArgs)} <= keys
    assert {"speculative_method", "draft", "num_speculative_tokens"} <= keys


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("OCTAVO_ENABLE_PREFIX_CACHING", "false", "enable_prefix_caching", False),
        ("OCTAVO_KV_CACHE_MEMORY", "256MB", "kv_cache_memory", "256MB"),
        ("OCTAVO_GPU_MEMORY_UTILIZATION", "0.5", "gpu_memory_utilization", 0.5),
        ("OCTAVO_ENGINE_SEED", "7", "seed", 7),
        ("OCTAVO_SPECULATIVE_CONFIG", '{"method": "ngram"}', "speculative", {"method": "ngram"}),
        ("OCTAVO_MAX_NUM_SEQS", "", "max_num_seqs", 128),
    ],
)
def test_variables_of_every_kind(
    start: Any, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(start("m").engine, name) == value


def test_lists(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_SERVED_MODEL_NAME", "a, b")
    assert start("m").settings.served_model_name == ("a", "b")
    assert start("m", "--served-model-name", "c").settings.served_model_name == ("c",)
    file = tmp_path / "f.yaml"
    file.write_text("cors_origin: [https://a.example, https://b.example]\n")
    assert start("--config", str(file)).settings.cors_origin == ("https://a.example", "https://b.example")


def test_speculation_from_several_places(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("speculative_method: prompt_lookup\nnum_speculative_tokens: 3\n")
    wanted = {"method": "prompt_lookup", "num_speculative_tokens": 3}
    assert start("--config", str(file)).engine.speculative == wanted
    monkeypatch.setenv("OCTAVO_NUM_SPECULATIVE_TOKENS", "5")
    assert start("--config", str(file)).engine.speculative == {**wanted, "num_speculative_tokens": 5}
    # What is said in one piece does away with the parts from lower places, and the other way round.
    whole = '{"method": "predicted"}'
    assert start("--config", str(file), "--speculative-config", whole).engine.speculative == {
        "method": "predicted"
    }
    file.write_text(f"speculative_config: {whole}\n")
    monkeypatch.delenv("OCTAVO_NUM_SPECULATIVE_TOKENS")
    found = start("--config", str(file), "--speculative-method", "ngram").engine.speculative
    assert found == {"method": "ngram"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_model_length: 5", ["unknown key 'max_model_length'", "did you mean max_model_len?"]),
        ("prot: 5", ["unknown key 'prot'", "port"]),
        ("zzzzzz: 5", ["unknown key", "named as the flags are"]),
        ("dry_run: true", ["unknown key"]),
        ("port: many", ["port", "many"]),
        ("port: [1]", ["port must be a whole number"]),
        ("max_num_seqs: 1.5", ["max_num_seqs"]),
        ("served_model_name: {a: b}", ["served_model_name"]),
        ("- a\n- b", ["key: value"]),
        ("a: [", ["not YAML"]),
        ("port: 1\nport: 2", ["'port' twice"]),
        ("!!python/object/apply:os.system ['true']", ["not YAML"]),
        ("model: 5", ["model must be a text"]),
    ],
)
def test_a_file_that_is_wrong(cli: Cli, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    result = cli("serve", "--config", str(file))
    assert result.code == 2
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prot", "5"], ["No such option", "--port"]),
        (["--port", "x"], ["--port"]),
        (["--port", "70000"], ["65535"]),
        (["--max-num-seqs", "0"], ["max_num_seqs must be at least 1"]),
        (["--log-level", "loud"], ["loud"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml cannot be read"]),
        (["a", "--model", "b"], ["two models"]),
        (["a", "b"], ["unexpected extra argument"]),
        (["--ssl-certfile", "/nowhere"], ["TLS needs both"]),
        (["--metrics-prefix", "a-b"], ["metrics_prefix"]),
        (["--max-request-bytes", "lots"], ["max_request_bytes"]),
        (["--request-timeout", "-1"], ["request_timeout"]),
        (["--cors-origin", "example.org"], ["cors_origin"]),
        (["--root-path", "api"], ["root_path must begin with /"]),
        (["--tensor-parallel-size", "2"], ["tensor_parallel_size"]),
    ],
)
def test_flags_that_are_wrong(cli: Cli, arguments: list[str], words: list[str]) -> None:
    result = cli("serve", *arguments)
    assert result.code == 2
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err


def test_a_wrong_key_is_not_shown(cli: Cli) -> None:
    result = cli("serve", "--api-key", "sec ret")
    assert result.code == 2
    assert "api_key" in result.err
    assert "sec ret" not in result.err


def test_a_variable_that_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_PORT", "x")
    result = cli("serve", "m")
    assert result.code == 2
    assert "OCTAVO_PORT" in result.err


def test_a_variable_that_is_nearly_right_is_pointed_at(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MAX_MODEL_LENGTH", "5")
    monkeypatch.setenv("OCTAVO_CACHE", "/x")
    (warning,) = start("m").warnings
    assert "OCTAVO_MAX_MODEL_LENGTH" in warning
    assert "OCTAVO_MAX_MODEL_LEN?" in warning


def test_keys_of_the_command_line_are_hidden_those_of_the_environment_need_not_be(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("m", "--api-key", "one", "--api-key", "two").warnings == ["hidden [('one', 'two')]"]
    monkeypatch.setenv("OCTAVO_API_KEY", "three,four")
    found = start("m")
    assert found.settings.api_key == ("three", "four")
    assert found.warnings == []
    assert set(serve._secret_variables()) == {
        "OCTAVO_API_KEY", "OCTAVO_METRICS_KEY", "OCTAVO_SSL_KEYFILE_PASSWORD"
    }  # fmt: skip


def test_a_missing_package_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else find(name, *rest)
    )
    result = cli("serve", "m")
    assert result.code == 1
    assert result.err == "octavo: error: octavo serve needs fastapi: pip install 'octavo[server]'\n"


def test_dry_run_shows_all_values_where_they_come_from_and_no_secret(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import yaml

    from octavo.engine import setup

    monkeypatch.setattr(setup, "plan", lambda args: f"memory plan of {args.model}")
    file = tmp_path / "f.yaml"
    file.write_text("max_model_len: 512\nspeculative_method: ngram\n")
    monkeypatch.setenv("OCTAVO_PORT", "1234")
    result = cli("serve", "some-model", "--dry-run", "--config", str(file), "--api-key", "s3cret")
    assert result.code == 0
    lines = result.out.splitlines()
    assert 'model: "some-model"  # flag' in lines
    assert "port: 1234  # OCTAVO_PORT" in lines
    assert f"max_model_len: 512  # {file}" in lines
    assert "max_num_seqs: 128  # default" in lines
    assert "# memory plan of some-model" in lines
    assert "s3cret" not in result.out + result.err
    assert "# api_key: 1 value, hidden (from flag)" in lines
    # What it prints is itself a configuration: the same one.
    again = tmp_path / "again.yaml"
    again.write_text(result.out)
    monkeypatch.delenv("OCTAVO_PORT")
    second = cli("serve", "--dry-run", "--config", str(again))
    assert second.code == 0, second.err
    first_values, second_values = yaml.safe_load(result.out), yaml.safe_load(second.out)
    assert {**first_values, "api_key": []} == {"api_key": [], **second_values}


def test_settings_are_checked_when_they_are_made() -> None:
    assert ServeSettings(max_request_bytes="1KB").max_request_bytes == 1024
    assert "secret" not in repr(ServeSettings(api_key=("secret",)))
    with pytest.raises(ConfigError, match="did you mean port"):
        ServeSettings.from_kwargs(ports=1)
    with pytest.raises(ConfigError, match="max_queue must be a whole number"):
        ServeSettings(max_queue=-1)
    assert ServeSettings(host="0.0.0.0").is_local is False
    assert variable_of(serve.command.params[-1]).startswith("OCTAVO_")  # type: ignore[arg-type]
