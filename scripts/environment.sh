# Sourced by the other scripts: `prepare_environment EXTRA` makes .venv beside the README and installs medllm[EXTRA] into it.
# A second call with nothing changed installs nothing and needs no network.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MEDLLM_VENV:-$root/.venv}"

find_python() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "Python 3.11, 3.12 or 3.13 with venv is needed; none was found on PATH" >&2
  return 2
}

prepare_environment() {
  local extra="$1" python stamp wanted
  stamp="$venv/.installed-$extra"
  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python="$(find_python)" || return
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  echo "installing medllm[$extra] into $venv (once) ..." >&2
  # torch goes first and pinned: a looser request can take a build with several GB of CUDA packages.
  if [ "$extra" != jax ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/constraints.txt")" 2>&1 | quiet_pip || return
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$extra]" 2>&1 | quiet_pip || return
  echo "$wanted" > "$stamp"
}

# Drops pip's remarks about unused download locations; everything else is shown. Fails when pip did (pipefail).
quiet_pip() {
  grep -v -e '^WARNING: Location' -e '^$' >&2 || true
}

# The tests of the report look at its page in Chromium, and are skipped where there is none. On a bare Debian or Ubuntu machine
# (root, apt) it is installed; anywhere else, or where that fails, nothing happens.
prepare_chromium() {
  local candidate
  for candidate in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$candidate" >/dev/null; then
      return
    fi
  done
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    return
  fi
  echo "installing chromium (once) ..." >&2
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
    || echo "chromium could not be installed: the tests that open the report in it are skipped" >&2
}
