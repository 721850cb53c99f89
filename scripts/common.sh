# What scripts/demo and scripts/test share: one virtual environment, installed into only when that is needed.
# Sourced, with bash, after `set -euo pipefail`. Gives $root (the checkout), $venv, say, fail and
# prepare_environment.
#
# AUDIOLDM2_VENV  where the environment lies (.venv in the checkout where not set)
# PYTHON          the Python that makes it (python3 where not set)

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${AUDIOLDM2_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
name=$(basename -- "$0")

say() { printf '%s: %s\n' "$name" "$*"; }
fail() {
    printf '%s: error: %s\n' "$name" "$*" >&2
    exit 1
}

# What an installation depends on: a change of any of it installs anew.
_fingerprint() {
    { printf '%s\n' "$root" && cat -- "$root/pyproject.toml" "$root/scripts/constraints.txt"; } | cksum
}

_check_python() {
    command -v -- "$python" >/dev/null || fail "$python is not found; install Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed and $python is $("$python" --version 2>&1); PYTHON=... names another"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv; install it (on Debian and Ubuntu: apt install python3-venv)"
}

# prepare_environment EXTRA: $venv holds this checkout, editable, with the extra of pyproject.toml and what it
# needs. Where it does so already, nothing is done.
prepare_environment() {
    local extra=$1 python=${PYTHON:-python3} stamp fingerprint
    fingerprint=$(_fingerprint)
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        _check_python
        # What is broken is made anew; what is no virtual environment is not for this to clear.
        [[ -f $venv/pyvenv.cfg || ! -e $venv || -z $(ls -A -- "$venv" 2>/dev/null) ]] ||
            fail "$venv is there and is no virtual environment; remove it or name another: AUDIOLDM2_VENV=..."
        say "making a virtual environment in $venv"
        "$python" -m venv --clear -- "$venv" || fail "$venv cannot be made; AUDIOLDM2_VENV=... names another place"
    fi
    for stamp in "$venv/.audioldm2-$extra" "$venv/.audioldm2-test"; do # test holds every other extra
        if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
            say "using the virtual environment in $venv"
            return
        fi
    done
    say "installing audioldm2 and what it needs into $venv (the first time: minutes, and some GB for PyTorch)"
    (cd -- "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -e ".[$extra]") ||
        fail "the installation failed, see above; it needs the Python package index"
    printf '%s\n' "$fingerprint" >"$venv/.audioldm2-$extra"
}
