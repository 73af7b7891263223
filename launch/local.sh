#!/usr/bin/env bash
# Sets up, then runs the main job on this machine's CPU or GPU: word problems with a language model made on the spot.
# Arguments go to `qsharp run` and win over the ones here: `bash launch/local.sh --config.seed=1 --workdir runs/seed1`.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$repo/launch/setup.sh"
set_up

device=$("$QSHARP_VENV/bin/python" -c 'import jax; print(f"{jax.default_backend()} ({jax.devices()[0].device_kind})")')
echo "local.sh: running on $device"
exec "$QSHARP_VENV/bin/qsharp" run --config "$repo/configs/arithmetic.py" --workdir "$repo/runs/arithmetic" "$@"
