#!/usr/bin/env bash
# Make .venv from a bare Python 3.11 or 3.12 with pip: pinned packages with hashes, and this package, editable.
# Usage: envs/install.sh STAMP    (the Makefile calls it; the stamp's name holds a hash of the pins)
# PYTHON=/some/python chooses the interpreter. Run again at any time: what stands is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=${1:?usage: envs/install.sh STAMP}
check='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
export PIP_DISABLE_PIP_VERSION_CHECK=1

suits() { "$1" -c "$check" >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
        if command -v "$candidate" >/dev/null && suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3.12 python3.11 python3 python})." >&2
    echo "       Install one, or name it: make env PYTHON=/path/to/python3.12" >&2
    exit 1
}

make_venv() {
    local python
    python=$(find_python)
    echo "environment: .venv from $("$python" --version)"
    # Where the venv module brings no pip (Debian's python3 without python3-venv), that Python's own pip fills it
    if ! "$python" -m venv --clear .venv >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    fi
}

suits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
.venv/bin/python -m pip install --quiet --require-hashes -r envs/bootstrap.txt
uv=(.venv/bin/uv pip install --python .venv/bin/python)
# --no-deps: the pins are complete, and leave out one package on purpose (docs/install.md)
"${uv[@]}" --no-deps --require-hashes -r envs/requirements.txt
"${uv[@]}" --no-deps --no-build-isolation --quiet -e .
# Each job imports these; compiled here, not by the first two jobs at once
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c 'import accelerate, pyiqa, dp2osr.models.sd' >/dev/null
rm -f .venv/.installed-*
touch "$stamp"
echo "environment: ready in .venv after $SECONDS s"
