#!/usr/bin/env bash
# The paper's run on the reference engine: CPT on 4 x A100-80GB, curation, RPO on 2 x A100, evaluation.
#
#   MODEL=Qwen2.5-72B CORPUS=texts/ PROBLEMS=jmle_until_2017.jsonl SHOTS=shots.jsonl EXAM=igakuqa/ \
#     bash scripts/reproduce_72b_a100.sh [cpt|merge|curate|rpo|evaluate ...]
#
# Without arguments all stages run, one after the other; each is one command and leaves one folder under OUT.
#
# In curation and evaluation each GPU holds 72B in NF4 and answers its share of the batches. A server that spreads the model over all four
# and batches by itself is the better choice where one is installed; its weights are then bf16. With vLLM, by its documentation (not tried):
#
#   vllm serve $OUT/cpt/merged --served-model-name cpt --tensor-parallel-size 4
#   OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none CURATE_ARGS="--engine openai --model.path cpt" ... curate
#
# and for the evaluation, served with --enable-lora --lora-modules rpo=$OUT/rpo/adapter (and --max-lora-rank, its rank):
#
#   EVALUATE_ARGS="--engine openai --model.path rpo --model.adapter null" ... evaluate
#
# A small MODEL runs the same stages on a CPU. Overrides for a stage go into CPT_ARGS, CURATE_ARGS, RPO_ARGS, EVALUATE_ARGS.
set -euo pipefail
ENGINE=torch
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# DDP on all GPUs where there are any; one plain process elsewhere.
launch() {
  local config="$1"
  shift
  if command -v nvidia-smi > /dev/null 2>&1; then
    accelerate launch --config_file "$scripts/../torch_ref/accelerate/$config.yaml" -m medllm "$@"
  else
    medllm "$@"
  fi
}

source "$scripts/reproduce_stages.sh"
run_stages "$@"
