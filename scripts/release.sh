#!/usr/bin/env bash
# What is handed out, into a folder: the wheel, built twice and the same to the byte, and the bill of materials of what it is
# tested with (CycloneDX). Says what is known against any of that, where PyPI can be asked.
#
#   bash scripts/release.sh dist
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out="$(mkdir -p "${1:?name a folder for what is made}" && cd "$1" && pwd)"
prepare_environment test

tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$(find_python)" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check hatchling cyclonedx-bom pip-audit 2>&1 | quiet_pip

cd "$root"
for build in one two; do
  "$tools/venv/bin/hatchling" build --target wheel --directory "$tools/$build" > /dev/null
done
cmp "$tools"/one/*.whl "$tools"/two/*.whl
cp "$tools"/one/*.whl "$out"
"$tools/venv/bin/cyclonedx-py" environment "$venv/bin/python" --pyproject pyproject.toml --output-reproducible --output-file "$out/sbom.json"
(cd "$out" && sha256sum ./*.whl sbom.json | tee SHA256SUMS)

"$tools/venv/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip 2>&1 | tee "$out/audit.txt"
if grep -q 'could not be audited' "$out/audit.txt"; then
  echo "not all packages could be asked about: $out/audit.txt" >&2
  exit 1
fi
