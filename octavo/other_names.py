"""What users of other engines call things, so that an unknown name is answered with ours.

Names come from vLLM, SGLang, transformers and llama.cpp. Nothing here is accepted in place of our own
name: one spelling, and an error that teaches it.
"""

from __future__ import annotations

# An option of the engine under another name.
OPTIONS = {
    "attn_implementation": "attention_backend",
    "chunked_prefill_size": "max_chunk_tokens",
    "context_length": "max_model_len",
    "device_map": "device",
    "dp_size": "data_parallel_size",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "lora_modules": "lora_configs",
    "lora_paths": "lora_configs",
    "max_running_requests": "max_num_seqs",
    "max_seq_len": "max_model_len",
    "max_sequence_length": "max_model_len",
    "mem_fraction_static": "gpu_memory_utilization",
    "model_name_or_path": "model",
    "model_path": "model",
    "n_batch": "max_num_batched_tokens",
    "n_ctx": "max_model_len",
    "page_size": "block_size",
    "pp_size": "pipeline_parallel_size",
    "random_seed": "seed",
    "speculative_config": "speculative",
    "tokenizer_path": "tokenizer",
    "torch_dtype": "dtype",
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
}

# Options that have no counterpart, and what to do without them.
_POOLING = "Octavo generates text only; embeddings, scores and reranking are not in this version"
_ONE_BACKEND = "there is only one way to do this here; leave it out"
OPTIONS_ADVICE = {
    "convert": _POOLING,
    "pooler_config": _POOLING,
    "override_pooler_config": _POOLING,
    "runner": _POOLING,
    "task": _POOLING,
    "is_embedding": _POOLING,
    "cpu_offload_gb": "weights are not moved between devices; choose a smaller model or dtype",
    "disable_radix_cache": "say enable_prefix_caching=False",
    "distributed_executor_backend": _ONE_BACKEND,
    "enable_chunked_prefill": "prompts are always computed in chunks; max_chunk_tokens bounds one",
    "guided_decoding_backend": _ONE_BACKEND,
    "hf_overrides": "change the model's config.json instead",
    "hf_token": "set the environment variable HF_TOKEN",
    "kv_cache_dtype": "the KV cache has the dtype of the model",
    "max_loras": "LoRA is not in this version of Octavo",
    "max_lora_rank": "LoRA is not in this version of Octavo",
    "n_gpu_layers": "a model is on one device as a whole; say device='cuda' or device='cpu'",
    "n_threads": "set the environment variable OMP_NUM_THREADS",
    "num_speculative_tokens": "say speculative={'method': …, 'num_speculative_tokens': …}",
    "preemption_mode": "a preempted request is always computed again",
    "revision": "say model='org/name@revision'",
    "rope_scaling": "change the model's config.json instead",
    "speculative_model": "say speculative={'method': 'draft_model', 'model': …}",
    "swap_space": "a preempted request is computed again, nothing is swapped; leave it out",
    "tokenizer_mode": _ONE_BACKEND,
    "token": "set the environment variable HF_TOKEN",
    "use_auth_token": "set the environment variable HF_TOKEN",
}

# Sampling parameters: spelling alone would not lead to ours.
SAMPLING = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "do_sample": "temperature (0 is greedy)",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "suppress_tokens": "logit_bias",
    "bad_words_ids": "bad_words",
    "guided_decoding": "structured_outputs",
    "guided_json": "structured_outputs={'json': …}",
    "guided_regex": "structured_outputs={'regex': …}",
    "guided_grammar": "structured_outputs={'grammar': …}",
    "guided_choice": "structured_outputs={'choice': […]}",
    "response_format": "structured_outputs={'json': …}",
    "use_beam_search": "best_of",
    "num_beams": "best_of",
    "num_draft_tokens": "num_speculative_tokens",
}

# Verbs of the command line.
VERBS = {
    "collect-env": "env",
    "complete": "generate",
    "completion": "generate",
    "run": "generate",
    "run-batch": "batch openai",
}
VERBS_ADVICE = {"embed": _POOLING, "embedding": _POOLING, "rerank": _POOLING, "score": _POOLING}


def option_advice(name: str) -> str | None:
    """What to write instead of an engine option that does not exist; None if nobody calls it so."""
    if name in OPTIONS:
        return f"here it is called {OPTIONS[name]}"
    return OPTIONS_ADVICE.get(name)
