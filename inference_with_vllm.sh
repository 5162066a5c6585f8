#!/usr/bin/env bash
# Persona inference by recipe:
#
#   bash inference_with_vllm.sh [quick | production | quality] [more flags of inference_vllm.py]
#
# The values below may be edited here, or given from outside: CHECKPOINT_DIR=… bash inference_with_vllm.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export CHECKPOINT_DIR="${CHECKPOINT_DIR:-smollm2}"
export DATASET="${DATASET:-Chameleons}"
export OCTAVO_DATA_ROOT="${OCTAVO_DATA_ROOT:-examples/persona}"
export OUTPUT_ROOT="${OUTPUT_ROOT:-outputs/leaderboards}"
export TENSOR_PARALLEL_SIZE="${TENSOR_PARALLEL_SIZE:-1}"
export GPU_MEMORY_UTILIZATION="${GPU_MEMORY_UTILIZATION:-0.9}"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

# run_vllm_inference CHECKPOINT DATASET ABLATION OUTPUT_DIR [flags …]
run_vllm_inference() {
    local checkpoint_dir=$1 dataset=$2 ablation_config=$3 output_dir=$4
    shift 4
    echo "persona: $dataset, $ablation_config, $checkpoint_dir -> $output_dir" >&2
    "$PYTHON" inference_vllm.py \
        --checkpoint_dir "$checkpoint_dir" \
        --dataset "$dataset" \
        --ablation_config "$ablation_config" \
        --output_dir "$output_dir" \
        --tensor_parallel_size "$TENSOR_PARALLEL_SIZE" \
        --gpu_memory_utilization "$GPU_MEMORY_UTILIZATION" \
        "$@"
}

recipe=quick
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    recipe=$1
    shift
fi

case "$recipe" in
    quick) # a look at a checkpoint: one sample an item
        run_vllm_inference "$CHECKPOINT_DIR" "$DATASET" context_only "$OUTPUT_ROOT/${DATASET}_quick" \
            --num_samples 1 "$@"
        ;;
    production) # what goes on a leaderboard
        run_vllm_inference "$CHECKPOINT_DIR" "$DATASET" profile_and_context "$OUTPUT_ROOT/${DATASET}_production" \
            --num_samples 5 "$@"
        ;;
    quality) # cooler, and the same again with the same seed
        run_vllm_inference "$CHECKPOINT_DIR" "$DATASET" profile_and_history "$OUTPUT_ROOT/${DATASET}_quality" \
            --temperature 0.8 --top_p 0.95 --top_k 50 --seed 42 "$@"
        ;;
    *)
        echo "inference_with_vllm.sh: no recipe '$recipe'; there are quick, production, quality" >&2
        exit 2
        ;;
esac
