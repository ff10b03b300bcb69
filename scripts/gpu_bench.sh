#!/usr/bin/env bash
# Speed and parity of both engines on one NVIDIA GPU, in under nine minutes: a pre-flight, what is worth most first, a table.
#
#   bash scripts/gpu_bench.sh --out gpu.json                     # 7B and 72B; gpu.json.log holds what the processes said
#   bash scripts/gpu_bench.sh --sizes 7b --parts cpt rpo decode  # a part of it
#   bash scripts/gpu_bench.sh --engines jax                      # without the reference and its packages
#   bash scripts/gpu_bench.sh --smoke                            # tiny shapes on the CPU
#
# MEDLLM_PYTHON names a Python that has the packages (jax with its CUDA plugin, flax, optax, orbax-checkpoint, torch, bitsandbytes,
# transformers, peft, trl, datasets, pytest): nothing is installed then. Without it they go into .venv.
set -euo pipefail
if [ -n "${MEDLLM_PYTHON:-}" ]; then
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  python="$MEDLLM_PYTHON"
else
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  prepare_environment test,cuda
  python="$venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m medllm.bench.device "$@"
