"""Flags follow the dataclasses: none missing, none passed on unless it was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import pytest
from click.testing import CliRunner

from octavo.cli import options
from octavo.config import EngineArgs
from octavo.sampling_params import SamplingParams

# Not for one-off use at a terminal: they belong to servers, drafters and traces.
NOT_FLAGS = {"num_speculative_tokens", "prediction", "cache_salt", "priority", "trace", "set_fields"}


def parse(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @options.sampling_options()
    @options.engine_options
    def command(**given: Any) -> None:
        seen.update(given)

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen


def test_every_engine_field_has_a_flag() -> None:
    given = parse()
    assert {name for name in given if name.startswith("engine_")} == {
        f"engine_{field.name}" for field in dataclasses.fields(EngineArgs) if field.name != "model"
    }


def test_every_sampling_field_has_a_flag() -> None:
    given = parse()
    names = {field.name for field in dataclasses.fields(SamplingParams)} - NOT_FLAGS
    assert {name.removeprefix("sampling_") for name in given if name.startswith("sampling_")} == names


def test_nothing_given_is_nothing_passed_on() -> None:
    given = parse()
    assert options.engine_kwargs("m", given) == {"model": "m"}
    assert options.sampling_params(given) is None


def test_engine_values_have_their_types() -> None:
    given = parse(
        "--max-model-len", "512", "--gpu-memory-utilization", "0.5", "--kv-cache-memory", "256MB",
        "--no-enable-prefix-caching", "--deterministic", "--dtype", "float32", "--engine-seed", "3",
        "--speculative-config", '{"method": "ngram"}',
    )  # fmt: skip
    assert options.engine_kwargs("m", given) == {
        "model": "m",
        "max_model_len": 512,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory": "256MB",
        "enable_prefix_caching": False,
        "deterministic": True,
        "dtype": "float32",
        "seed": 3,
        "speculative": {"method": "ngram"},
    }


def test_speculation_has_flags_of_its_own() -> None:
    given = parse("--speculative-method", "prompt_lookup", "--num-speculative-tokens", "4")
    assert options.engine_kwargs(None, given) == {
        "speculative": {"method": "prompt_lookup", "num_speculative_tokens": 4}
    }
    given = parse("--draft", "tiny")
    assert options.engine_kwargs(None, given) == {"speculative": {"model": "tiny", "method": "draft_model"}}
    with pytest.raises(click.UsageError, match="either"):
        options.engine_kwargs(None, parse("--draft", "x", "--speculative-config", "{}"))


def test_engine_kwargs_make_engine_args() -> None:
    given = parse("--max-model-len", "512", "--kv-cache-memory", "1GB")
    args = EngineArgs.from_kwargs(**options.engine_kwargs("m", given))
    assert (args.model, args.max_model_len, args.kv_cache_memory) == ("m", 512, "1GB")


def test_sampling_values_have_their_types() -> None:
    given = parse(
        "--temperature", "0", "--top-k", "5", "--stop", "a", "--stop", "b", "--stop-token-ids", "3",
        "--logit-bias", "4:-1.5", "--logit-bias", "5:2", "--ignore-eos", "--seed", "9",
        "--structured-outputs", '{"regex": "[0-9]+"}',
    )  # fmt: skip
    params = options.sampling_params(given)
    assert params == SamplingParams(
        temperature=0.0,
        top_k=5,
        stop=["a", "b"],
        stop_token_ids=[3],
        logit_bias={4: -1.5, 5: 2.0},
        ignore_eos=True,
        seed=9,
        structured_outputs={"regex": "[0-9]+"},
    )
    # what was not given stays open for the model's generation_config
    assert params is not None
    assert "top_p" not in params.set_fields


def test_an_illegal_value_names_its_field() -> None:
    with pytest.raises(click.UsageError, match="temperature"):
        options.sampling_params(parse("--temperature", "-1"))


@pytest.mark.parametrize(
    "arguments",
    [["--speculative-config", "{"], ["--logit-bias", "x"], ["--dtype", "int3"], ["--top-k", "many"]],
)
def test_a_malformed_value_is_wrong_usage(arguments: list[str]) -> None:
    @click.command()
    @options.sampling_options()
    @options.engine_options
    def command(**given: Any) -> None:
        raise AssertionError("must not be reached")

    assert CliRunner().invoke(command, arguments).exit_code == 2
