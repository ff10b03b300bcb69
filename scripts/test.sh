#!/usr/bin/env bash
# Everything a change must pass: lint, import rules, types, nothing unused, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
prepare_chromium
cd "$root"

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
# Types take most of a minute on one core: beside the other checks and the first tests. Nothing is left running where one fails.
"$venv/bin/mypy" &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/lint-imports"
"$venv/bin/vulture"
# A file of tests stays in one process, which makes its expensive fixtures once. Files come in the order that conftest.py gives
# them, slow ones first: by their number of tests, those with few long ones would all come last, and one process wait for the other.
tests=0
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || tests=$?
wait "$types" || { echo "types are wrong: mypy says where, above" >&2; exit 1; }
exit "$tests"
