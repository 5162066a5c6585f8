#!/usr/bin/env bash
# Measure one engine. Everything is set by environment variables: the value of whoever calls wins over the
# preset, which wins over the default written here; or edit a line. Flags of `octavo bench run` may follow and
# win over all:
#
#     bash run_benchmark.sh
#     INFERENCE_METHOD=prompt_lookup NUM_PROMPTS=20 AUTO_RATE=inf bash run_benchmark.sh
#     PRESET=quick bash run_benchmark.sh --force
#
# docs/benchmark.md explains the variables. No GPU is needed for the default model.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -x "$here/.venv/bin/octavo" ]; then
  octavo=("$here/.venv/bin/octavo")
elif command -v octavo > /dev/null; then
  octavo=(octavo)
else
  export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
  octavo=("${PYTHON:-python3}" -m octavo)
fi

# ---------------------------------------------------------------------- preset
export PRESET="${PRESET:-}"                                                    # quick, throughput, latency, long_text, stress, acceptance
if [ -n "$PRESET" ]; then
  preset_lines="$("${octavo[@]}" bench preset "$PRESET")"
  eval "$preset_lines"
fi

# ---------------------------------------------------------------------- engine and models
export INFERENCE_ENGINE="${INFERENCE_ENGINE:-octavo}"                          # octavo, transformers, vllm, url=http://HOST:PORT
export INFERENCE_METHOD="${INFERENCE_METHOD:-}"                                # target_ar, speculative, drafter_ar, prompt_lookup
export TARGET_MODEL="${TARGET_MODEL:-smollm2}"                                 # folder, .gguf file, hub id, alias, or served name
export DRAFTER_MODEL="${DRAFTER_MODEL:-}"                                      # the draft model of speculative and drafter_ar

# ---------------------------------------------------------------------- speculative decoding
export VLLM_ENABLE_SPECULATIVE="${VLLM_ENABLE_SPECULATIVE:-}"                  # false runs target_ar whatever the method says
export VLLM_NUM_SPECULATIVE_TOKENS="${VLLM_NUM_SPECULATIVE_TOKENS:-}"          # drafts a step: 1-16, auto
export GAMMA_VALUE="${GAMMA_VALUE:-}"                                          # the same, older name

# ---------------------------------------------------------------------- engine options (each also as OCTAVO_..., which wins)
export VLLM_TENSOR_PARALLEL_SIZE="${VLLM_TENSOR_PARALLEL_SIZE:-1}"             # GPUs of one model
export VLLM_PIPELINE_PARALLEL_SIZE="${VLLM_PIPELINE_PARALLEL_SIZE:-1}"         # only 1
export VLLM_GPU_MEMORY_UTILIZATION="${VLLM_GPU_MEMORY_UTILIZATION:-0.9}"       # share of a GPU's memory
export VLLM_MAX_MODEL_LEN="${VLLM_MAX_MODEL_LEN:-4096}"                        # longest prompt + output
export VLLM_MAX_NUM_SEQS="${VLLM_MAX_NUM_SEQS:-128}"                           # requests that run together
export VLLM_MAX_NUM_BATCHED_TOKENS="${VLLM_MAX_NUM_BATCHED_TOKENS:-8192}"      # token rows of a step
export VLLM_DTYPE="${VLLM_DTYPE:-auto}"                                        # auto, half, float16, bfloat16, float32
export VLLM_QUANTIZATION="${VLLM_QUANTIZATION:-}"                              # weight format
export VLLM_DISABLE_LOG_STATS="${VLLM_DISABLE_LOG_STATS:-true}"                # no lines of statistics
export VLLM_USE_V2_BLOCK_MANAGER="${VLLM_USE_V2_BLOCK_MANAGER:-}"              # accepted: there is only one block manager

# ---------------------------------------------------------------------- GPUs (placement of target and drafter: transformers engine)
export GPU_STRATEGY="${GPU_STRATEGY:-shared_all}"                              # shared_all, single, separate, ratio
export TARGET_GPU="${TARGET_GPU:-0}"                                           # of single and separate
export DRAFTER_GPU="${DRAFTER_GPU:-0}"                                         # of separate
export TARGET_GPU_RATIO="${TARGET_GPU_RATIO:-0.8}"                             # of ratio: share of each card
export DRAFTER_GPU_RATIO="${DRAFTER_GPU_RATIO:-0.2}"                           # of ratio
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then export CUDA_VISIBLE_DEVICES; fi  # which GPUs; unset: all

# ---------------------------------------------------------------------- load
export NUM_PROMPTS="${NUM_PROMPTS:-0}"                                         # requests in all; 0: as many as AUTO_DURATION brings
export AUTO_RATE="${AUTO_RATE:-1.0}"                                           # requests a second; inf: all at once
export AUTO_DURATION="${AUTO_DURATION:-300}"                                   # seconds in which requests are sent
export ARRIVAL="${ARRIVAL:-poisson}"                                           # poisson, constant, gamma, closed, or a trace file
export BURSTINESS="${BURSTINESS:-1.0}"                                         # of gamma: below 1 clumps, above 1 is regular
export CONCURRENCY="${CONCURRENCY:-1}"                                         # of closed: requests open at a time

# ---------------------------------------------------------------------- generation
export GENERATION_LENGTH="${GENERATION_LENGTH:-100}"                           # the most tokens a request may generate
export IGNORE_EOS="${IGNORE_EOS:-false}"                                       # true: exactly that many
export SEED="${SEED:-42}"                                                      # decides prompts, arrivals and draws
export TEMPERATURE="${TEMPERATURE:-0}"                                         # 0 is greedy
export TOP_P="${TOP_P:-1}"                                                     # 1 is off
export TOP_K="${TOP_K:-0}"                                                     # 0 is off

# ---------------------------------------------------------------------- static batching (transformers engine)
export ENABLE_BATCH="${ENABLE_BATCH:-true}"                                    # static batches of the transformers engine
export BATCH_SIZE="${BATCH_SIZE:-8}"                                           # of such a batch
export MAX_BATCH_LENGTH="${MAX_BATCH_LENGTH:-512}"                             # a longer prompt runs alone

# ---------------------------------------------------------------------- prompts
export PROMPTS="${PROMPTS:-bundled}"                                           # bundled, bundled:KIND,…, a file, synthetic:512, …
export SHAREGPT_DIR="${SHAREGPT_DIR:-}"                                        # folder of ShareGPT files; the same as PROMPTS=FOLDER
export PROMPT_MIN_LENGTH="${PROMPT_MIN_LENGTH:-}"                              # tokens; shorter prompts are left out
export PROMPT_MAX_LENGTH="${PROMPT_MAX_LENGTH:-}"                              # tokens; longer prompts are left out
export MAX_LOAD_LINES="${MAX_LOAD_LINES:-}"                                    # lines that are read of a file

# ---------------------------------------------------------------------- monitor and output
export ENABLE_GPU_MONITOR="${ENABLE_GPU_MONITOR:-true}"                        # power, energy, utilisation, temperature
export GPU_MONITOR_INTERVAL="${GPU_MONITOR_INTERVAL:-0.5}"                     # seconds between two looks
export OUTPUT_FILE="${OUTPUT_FILE:-benchmark_results.json}"                    # its name gets method and engine

exec "${octavo[@]}" bench run "$@"
