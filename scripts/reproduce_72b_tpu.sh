#!/usr/bin/env bash
# The paper's run on the JAX engine, stage by stage the same as reproduce_72b_a100.sh.
#
#   MODEL=Qwen2.5-72B CORPUS=texts/ PROBLEMS=jmle_until_2017.jsonl SHOTS=shots.jsonl EXAM=igakuqa/ \
#     bash scripts/reproduce_72b_tpu.sh [cpt|merge|curate|rpo|evaluate ...]
#
# Over many devices: CPT_ARGS="--mesh fsdp=-1", and so for the other stages; over several hosts run it on each, with
# JAX_NUM_PROCESSES=auto on a TPU pod (docs/sharding.md).
#
# Without arguments all stages run, one after the other; each is one command and leaves one folder under OUT.
# A small MODEL runs the same stages on a CPU. Overrides for a stage go into CPT_ARGS, CURATE_ARGS, RPO_ARGS, EVALUATE_ARGS.
set -euo pipefail
ENGINE=jax
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

launch() {
  shift # the accelerate configuration: JAX needs no launcher
  medllm "$@"
}

source "$scripts/reproduce_stages.sh"
run_stages "$@"
