"""The default context length, where a model has a shorter one."""

from __future__ import annotations

from dataclasses import replace

from octavo.bench.options import BenchOptions
from octavo.bench.spec import parse_engine

DEFAULT_LENGTH = 4096  # of VLLM_MAX_MODEL_LEN


def fit_context(options: BenchOptions) -> BenchOptions:
    """The default of VLLM_MAX_MODEL_LEN cut to what the model has, with a notice.

    A length that somebody chose is left alone: where it is too long the engine says so.
    """
    chosen = options.engine_options.get("max_model_len")
    if chosen != DEFAULT_LENGTH or parse_engine(options.engine)["engine"] == "url":
        return options
    from octavo import hub
    from octavo.models.config import ModelConfig

    has = ModelConfig.from_folder(hub.resolve(options.model)).max_position_embeddings
    if has >= DEFAULT_LENGTH:
        return options
    notice = (
        f"VLLM_MAX_MODEL_LEN: {options.model} has a context of {has} tokens, not {DEFAULT_LENGTH}; "
        f"{has} was used"
    )
    return replace(
        options,
        engine_options={**options.engine_options, "max_model_len": has},
        notices=(*options.notices, notice),
    )
