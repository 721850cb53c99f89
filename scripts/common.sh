# Shared by scripts/demo and scripts/test: a virtual environment in which the package is installed once.
# Source it in bash after `set -euo pipefail`. Defines $root (the checkout), $venv, say, fail,
# prepare_environment and install_chromium.
#
# AUDIOLDM2_VENV  folder of the environment (default: .venv in the checkout)
# PYTHON          Python that creates it (default: python3)

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${AUDIOLDM2_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
name=$(basename -- "$0")

say() { printf '%s: %s\n' "$name" "$*"; }
fail() {
    printf '%s: error: %s\n' "$name" "$*" >&2
    exit 1
}

# Identifies what an installation depends on; if it changes, the package is installed again.
_fingerprint() {
    { printf '%s\n' "$root" && cat -- "$root/pyproject.toml" "$root/scripts/constraints.txt"; } | cksum
}

_check_python() {
    command -v -- "$python" >/dev/null || fail "$python was not found; install Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is required; $python is $("$python" --version 2>&1) (set PYTHON=...)"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
}

# prepare_environment EXTRA: installs this checkout in $venv, editable and with an extra of pyproject.toml,
# unless that has been done before.
prepare_environment() {
    local extra=$1 python=${PYTHON:-python3} stamp fingerprint
    fingerprint=$(_fingerprint)
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        _check_python
        # A broken virtual environment is replaced; any other folder is left alone.
        [[ -f $venv/pyvenv.cfg || ! -e $venv || -z $(ls -A -- "$venv" 2>/dev/null) ]] ||
            fail "$venv is not a virtual environment; remove it, or try another folder: AUDIOLDM2_VENV=..."
        say "creating a virtual environment in $venv"
        "$python" -m venv --clear -- "$venv" ||
            fail "cannot create $venv; try another folder: AUDIOLDM2_VENV=..."
    fi
    for stamp in "$venv/.audioldm2-$extra" "$venv/.audioldm2-test"; do # test includes every other extra
        if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
            say "using the virtual environment in $venv"
            return
        fi
    done
    say "installing audioldm2 and its dependencies in $venv (takes minutes, and some GB for PyTorch)"
    # Compiling all of PyTorch to bytecode takes half a minute; Python compiles what it imports.
    (cd -- "$root" && "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
        -c scripts/constraints.txt -e ".[$extra]") ||
        fail "the installation failed (see above); it needs access to the Python package index"
    printf '%s\n' "$fingerprint" >"$venv/.audioldm2-$extra"
}

# install_chromium: installs Debian's Chromium for the tests of the web page, where that is possible without
# asking. Without it they are skipped.
install_chromium() {
    command -v chromium >/dev/null && return
    if [[ $(id -u) != 0 || ! -f /etc/debian_version ]] || ! command -v apt-get >/dev/null; then
        say "chromium is not installed; the tests of the web page in a browser are skipped"
        return
    fi
    say "installing chromium for the tests of the web page"
    (
        export DEBIAN_FRONTEND=noninteractive
        install=(apt-get install -y -qq --no-install-recommends chromium)
        timeout 600 "${install[@]}" || { timeout 300 apt-get update -qq && timeout 600 "${install[@]}"; }
    ) >/dev/null 2>&1 </dev/null ||
        say "chromium cannot be installed; the tests of the web page in a browser are skipped"
}
