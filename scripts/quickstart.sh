#!/usr/bin/env bash
# The embedded study from nothing: a virtual environment, the installation, `medllm mini`.
# Arguments go to `medllm mini`, e.g. `bash scripts/quickstart.sh --engine torch`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extra=jax
case " $* " in *" --engine torch "* | *" --engine=torch "*) extra=torch ;; esac
prepare_environment "$extra"

out="$PWD/runs/mini-$(date +%Y%m%d-%H%M%S)"
case " $* " in *" --out"*) exec "$venv/bin/medllm" mini "$@" ;; esac
exec "$venv/bin/medllm" mini --out "$out" "$@"
