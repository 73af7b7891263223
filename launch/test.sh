#!/usr/bin/env bash
# Sets up, then runs the tests but for the slow ones, a file on each of up to four cores at a time. Arguments go to
# pytest: `bash launch/test.sh -m slow`.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$repo/launch/setup.sh"
set_up test

cd "$repo"
exec "$QSHARP_VENV/bin/python" -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile "$@"
