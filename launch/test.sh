#!/usr/bin/env bash
# Sets up, then runs the tests but for the slow ones, a file on each of up to four cores at a time. Arguments go to
# pytest: `bash launch/test.sh -m slow`. Files are not sorted by their numbers of tests: those with few have the longest,
# and would come last, each on its own.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$repo/launch/setup.sh"
# PyTorch would put its libraries of CUDA 13 in the place of those of CUDA 12, which JAX has where the driver is older:
# the tests run on the CPU there, in an environment beside the one of runs.
if [[ $(accelerator) == cuda ]] || has_plugin cuda12; then
    export JAX_PLATFORMS=cpu
    [[ $QSHARP_VENV != "$repo/.venv" ]] || QSHARP_VENV=$repo/.venv-test
fi
set_up test

cd "$repo"
exec "$QSHARP_VENV/bin/python" -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
