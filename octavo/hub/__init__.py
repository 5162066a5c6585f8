"""A name becomes a model folder: config.json, weights, tokenizer.

    octavo.hub.resolve("smollm2")                  the default model
    octavo.hub.resolve("Qwen/Qwen3-0.6B@main")     a hub id, with a revision if wanted
    octavo.hub.resolve("models/my-llama")          a local folder
    octavo.hub.resolve("llama.Q4_K_M.gguf")        a GGUF file, converted once and cached

A model that is in a cache already is used without any network call. Importing this package
imports nothing heavy.
"""

from __future__ import annotations

from octavo.hub.cache import cache_root
from octavo.hub.resolver import ALIASES, resolve, resolve_tokenizer, source_of

__all__ = ["ALIASES", "cache_root", "resolve", "resolve_tokenizer", "source_of"]
