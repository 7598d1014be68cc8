#!/usr/bin/env bash
# Resolve pyproject.toml again and write the three pinned files. Pins that stand are kept; UPGRADE=1 takes the newest.
#
# opencv-python is left out on purpose: it and opencv-python-headless write the same cv2 folder, and the former
# needs libGL and X11, which a bare server lacks. The files are complete, so they are installed with --no-deps.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=.venv/bin/uv
flags=(--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet)
[[ -n "${UPGRADE:-}" ]] && flags+=(--upgrade)

"$uv" pip compile "${flags[@]}" --all-extras --no-emit-package opencv-python pyproject.toml \
    --output-file envs/requirements.txt >/dev/null
"$uv" pip compile "${flags[@]}" envs/bootstrap.in --output-file envs/bootstrap.txt >/dev/null
.venv/bin/python envs/make_conda.py
