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
    "ctx_size": "max_model_len",
    "dp": "data_parallel_size",
    "dp_size": "data_parallel_size",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "long_prefill_token_threshold": "max_chunk_tokens",
    "max_running_requests": "max_num_seqs",
    "max_seq_len": "max_model_len",
    "max_sequence_length": "max_model_len",
    "mem_fraction_static": "gpu_memory_utilization",
    "model_name_or_path": "model",
    "model_path": "model",
    "n_batch": "max_num_batched_tokens",
    "n_ctx": "max_model_len",
    "page_size": "block_size",
    "parallel": "max_num_seqs",
    "pp": "pipeline_parallel_size",
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
_LORA = "LoRA is not in this version of Octavo"
_QUANTIZED = "quantized weights are not in this version of Octavo"
_TEXT_ONLY = "Octavo reads and writes text only; images, audio and video are not in this version"
_GRAPHS = "the CUDA graphs are chosen from max_num_seqs; enforce_eager=True runs without them"
_PARALLEL = "one model on several GPUs is not in this version of Octavo"
_BY_PRIORITY = "the order is by SamplingParams(priority=…), then by arrival; leave it out"
_TRANSFER = "moving KV blocks between engines is not in this version of Octavo"
OPTIONS_ADVICE = {
    "adapters": _LORA,
    "convert": _POOLING,
    "pooler_config": _POOLING,
    "override_pooler_config": _POOLING,
    "runner": _POOLING,
    "task": _POOLING,
    "is_embedding": _POOLING,
    "async_scheduling": "say pipeline_depth=1 (or 0, to read each step before the next starts)",
    "calculate_kv_scales": _QUANTIZED,
    "compilation_config": _GRAPHS,
    "cuda_graph_max_bs": _GRAPHS,
    "cuda_graph_sizes": _GRAPHS,
    "cudagraph_capture_sizes": _GRAPHS,
    "decode_context_parallel_size": _PARALLEL,
    "disable_cuda_graph": "say enforce_eager=True",
    "disable_overlap_schedule": "say pipeline_depth=0",
    "download_dir": "set HF_HOME, the cache of downloads, or OCTAVO_CACHE, where converted files are kept",
    "enable_eplb": _PARALLEL,
    "enable_expert_parallel": _PARALLEL,
    "enable_sleep_mode": "an engine cannot sleep here; end it with shutdown() and start another one",
    "cpu_offload_gb": "weights are not moved between devices; choose a smaller model or dtype",
    "disable_radix_cache": "say enable_prefix_caching=False",
    "distributed_executor_backend": _ONE_BACKEND,
    "enable_chunked_prefill": "prompts are always computed in chunks; max_chunk_tokens bounds one",
    "generation_config": "what a request does not set comes from the model's generation_config.json; edit it",
    "grammar_backend": _ONE_BACKEND,
    "guided_decoding_backend": _ONE_BACKEND,
    "hf_overrides": "change the model's config.json instead",
    "hf_token": "set the environment variable HF_TOKEN",
    "kv_cache_dtype": "the KV cache has the dtype of the model",
    "kv_events_config": _TRANSFER,
    "kv_transfer_config": _TRANSFER,
    "limit_mm_per_prompt": _TEXT_ONLY,
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "lora_dtype": _LORA,
    "lora_modules": _LORA,
    "lora_paths": _LORA,
    "max_cpu_loras": _LORA,
    "max_loras": _LORA,
    "max_lora_rank": _LORA,
    "max_seq_len_to_capture": _GRAPHS,
    "mm_processor_kwargs": _TEXT_ONLY,
    "model_impl": "Octavo runs its own models only; octavo models lists them",
    "n_gpu_layers": "a model is on one device as a whole; say device='cuda' or device='cpu'",
    "n_threads": "set the environment variable OMP_NUM_THREADS",
    "num_gpu_blocks_override": "say kv_cache_memory='4GB'",
    "num_speculative_tokens": "say speculative={'method': …, 'num_speculative_tokens': …}",
    "override_generation_config": "give SamplingParams to the request, or edit generation_config.json",
    "preemption_mode": "a preempted request is always computed again",
    "revision": "say model='org/name@revision'",
    "quantization_param_path": _QUANTIZED,
    "qlora_adapter_name_or_path": _LORA,
    "rope_scaling": "change the model's config.json instead",
    "rope_theta": "change the model's config.json instead",
    "schedule_policy": _BY_PRIORITY,
    "scheduling_policy": _BY_PRIORITY,
    "speculative_model": "say speculative={'method': 'draft_model', 'model': …}",
    "swap_space": "a preempted request is computed again, nothing is swapped; leave it out",
    "structured_outputs_config": _ONE_BACKEND,
    "threads": "set the environment variable OMP_NUM_THREADS",
    "tokenizer_mode": _ONE_BACKEND,
    "tokenizer_revision": "say tokenizer='org/name@revision'",
    "token": "set the environment variable HF_TOKEN",
    "use_auth_token": "set the environment variable HF_TOKEN",
}

# Options of the engine of which this version has the default only.
TO_COME = frozenset(
    {
        "quantization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_lora",
        "lora_configs",
    }
)  # fmt: skip

# Flags of other servers, and what to do at `octavo serve`.
_NO_REQUEST_LOG = "say --access-log off, or --access-log FILE; prompts and answers are never logged"
SERVER_ADVICE = {
    "allowed_origins": "here it is called --cors-origin",
    "api_server_count": "one front end serves; start more servers behind a proxy",
    "disable_fastapi_docs": "/docs wants a key like every other route, once there is one",
    "disable_log_requests": _NO_REQUEST_LOG,
    "disable_uvicorn_access_log": _NO_REQUEST_LOG,
    "enable_auto_tool_choice": "tools need no switch; leave it out",
    "enable_log_requests": _NO_REQUEST_LOG,
    "enable_metrics": "/metrics is always there; leave it out",
    "enable_prompt_tokens_details": "usage always has prompt_tokens_details; leave it out",
    "enable_reasoning": "reasoning needs no switch; leave it out, or say --reasoning-parser think",
    "enable_request_id_headers": "answers always have X-Request-Id; leave it out",
    "enable_server_load_tracking": "/metrics has octavo:num_requests_open; leave it out",
    "headless": "one model on several machines is not in this version of Octavo",
    "max_log_len": _NO_REQUEST_LOG,
    "response_role": "an answer's role is always assistant; leave it out",
    "seed": "here it is called --engine-seed; a request brings its own seed",
    "tool_call_parser": "here it is called --tool-parser, and auto finds it from the chat template",
    "tool_parser_plugin": "parsers of your own are not in this version of Octavo; see --tool-parser",
    "uvicorn_log_level": "here it is called --log-level",
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
    "num_draft_tokens": "num_speculative_tokens",
}

# Sampling parameters that have no counterpart.
_NO_BEAMS = "there is no beam search; best_of makes several answers and keeps the most probable"
_NO_PROCESSORS = "there are none of your own; see logit_bias, bad_words and structured_outputs"
SAMPLING_ADVICE = {
    "detokenize": "say LLM(skip_tokenizer_init=True) to work on token ids only",
    "diversity_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "extra_args": "every parameter has a name of its own here",
    "flat_logprobs": "log-probabilities come in one form only; leave it out",
    "length_penalty": _NO_BEAMS,
    "logits_processor": _NO_PROCESSORS,
    "logits_processors": _NO_PROCESSORS,
    "no_repeat_ngram_size": "see repetition_penalty, frequency_penalty and presence_penalty",
    "num_beams": _NO_BEAMS,
    "output_kind": "say stream=True, or kind= of AsyncLLM.generate",
    "spaces_between_special_tokens": "special tokens stand in the text as the tokenizer writes them",
    "truncate_prompt_tokens": "cut the prompt's token ids before they are given",
    "typical_p": "see min_p, which serves the same end",
    "use_beam_search": _NO_BEAMS,
}

# Values of attention_backend, lower case and with underscores; what the second ones name is not here.
OUR_ATTENTION_BACKENDS = {
    "eager": "torch",
    "torch_native": "sdpa",
    "torch_sdpa": "sdpa",
    "torch_sdpa_vllm_v1": "sdpa",
    "triton_attn": "triton",
    "triton_attn_vllm_v1": "triton",
}
ATTENTION_BACKENDS_ELSEWHERE = {
    "fa2": "FlashAttention",
    "fa3": "FlashAttention",
    "fa4": "FlashAttention",
    "flash_attn": "FlashAttention",
    "flash_attn_vllm_v1": "FlashAttention",
    "flash_attention": "FlashAttention",
    "flash_attention_2": "FlashAttention",
    "flash_attention_3": "FlashAttention",
    "flashattention": "FlashAttention",
    "flashinfer": "FlashInfer",
    "flashinfer_vllm_v1": "FlashInfer",
}

# Methods of LLM that vLLM's has.
METHODS_ADVICE = {
    "apply_model": "the model lives in the engine's own classes and is not handed out",
    "beam_search": _NO_BEAMS,
    "classify": _POOLING,
    "collective_rpc": _PARALLEL,
    "encode": _POOLING,
    "get_default_sampling_params": "say SamplingParams().with_defaults(llm.generation_defaults)",
    "get_metrics": "RequestOutput.metrics has a request's figures; octavo serve has /metrics",
    "get_tokenizer": "say transformers.AutoTokenizer.from_pretrained(llm.model_path)",
    "reset_prefix_cache": "give SamplingParams a cache_salt to share nothing with what was before",
    "reward": _POOLING,
    "sleep": OPTIONS_ADVICE["enable_sleep_mode"],
    "start_profile": "torch.profiler around llm.generate sees the engine, which runs in this process",
    "wake_up": OPTIONS_ADVICE["enable_sleep_mode"],
}

# Verbs of the command line.
VERBS = {
    "collect-env": "env",
    "complete": "generate",
    "completion": "generate",
    "run": "generate",
    "run-batch": "batch openai",
}
VERBS_ADVICE = {
    "embed": _POOLING,
    "embedding": _POOLING,
    "help": "Say octavo --help, or octavo VERB --help.",
    "launch": "Say octavo serve MODEL.",
    "rerank": _POOLING,
    "score": _POOLING,
}


def option_advice(name: str) -> str | None:
    """What to write instead of an engine option that does not exist; None if nobody calls it so."""
    if name in OPTIONS:
        return renamed(OPTIONS[name], OPTIONS[name])
    return OPTIONS_ADVICE.get(name)


def renamed(ours: str, spelling: str) -> str:
    """That an option is called `ours` here; `spelling` is how it is written where that is said."""
    later = "; other than its default it is not in this version of Octavo" if ours in TO_COME else ""
    return f"here it is called {spelling}{later}"
