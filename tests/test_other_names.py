"""Names of other engines are answered with ours, or with what to do; and what is said is true."""

from __future__ import annotations

from dataclasses import fields

import pytest

import octavo
from octavo import SamplingParams, other_names
from octavo.cli.serve import command as serve
from octavo.config import EngineArgs, SpeculativeConfig
from octavo.errors import ConfigError, NotInThisVersionError, RequestError
from octavo.server.answer.tool_formats import FORMATS, format_named
from octavo.server.settings import TOOL_PARSERS

OURS = {field.name for field in fields(EngineArgs)}
SAMPLING = {field.name for field in fields(SamplingParams) if field.init}


def test_the_tables_lead_to_names_that_exist_and_hide_none() -> None:
    assert set(other_names.OPTIONS.values()) <= OURS
    assert not (set(other_names.OPTIONS) | set(other_names.OPTIONS_ADVICE)) & OURS
    assert not (set(other_names.SAMPLING) | set(other_names.SAMPLING_ADVICE)) & SAMPLING
    assert not any(hasattr(octavo.LLM, name) for name in other_names.METHODS_ADVICE)
    flags = {flag.lstrip("-").replace("-", "_") for option in serve.params for flag in option.opts}
    assert not set(other_names.SERVER_ADVICE) & flags
    assert other_names.TO_COME <= OURS


@pytest.mark.parametrize("name", sorted(other_names.TO_COME))
def test_what_is_to_come_is_refused_with_one_line(name: str) -> None:
    value = {"quantization": "awq", "enable_lora": True, "lora_configs": [{"lora_name": "a"}]}.get(name, 2)
    with pytest.raises(NotInThisVersionError, match=r"^[^\n]*is not in this version of Octavo$"):
        EngineArgs.from_kwargs(**{name: value})


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tp", "here it is called tensor_parallel_size; other than its default it is not in this version"),
        ("max_seq_len", r"here it is called max_model_len$"),
        ("lora_modules", "LoRA is not in this version of Octavo"),
        ("load_in_4bit", "quantized weights are not in this version of Octavo"),
        ("runner", "embeddings, scores and reranking are not in this version"),
        ("enable_expert_parallel", "one model on several GPUs is not in this version"),
    ],
)
def test_an_option_of_another_engine(name: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        EngineArgs.from_kwargs(**{name: 2})


@pytest.mark.parametrize("method", ["eagle", "EAGLE3", "medusa", "mtp"])
def test_a_drafter_of_another_engine(method: str) -> None:
    with pytest.raises(
        NotInThisVersionError, match=f"{method}.* is not in this version of Octavo; there are"
    ):
        SpeculativeConfig.from_dict({"method": method, "model": "x"})


def test_a_sampling_parameter_of_another_engine() -> None:
    with pytest.raises(RequestError, match=r"'length_penalty': there is no beam search"):
        SamplingParams(length_penalty=1.0)  # type: ignore[call-arg]


def test_a_method_of_another_engine() -> None:
    llm = object.__new__(octavo.LLM)
    with pytest.raises(AttributeError, match=r"'get_tokenizer': say transformers\.AutoTokenizer"):
        llm.get_tokenizer  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        llm.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_every_tool_parser_that_may_be_named_exists() -> None:
    assert {"auto", *(found.name for found in FORMATS)} <= set(TOOL_PARSERS)
    for name in TOOL_PARSERS[1:]:
        assert format_named(name) in FORMATS
