#!/usr/bin/env bash
# Train on this machine: one process a GPU, or two on a machine without one.
#   launch/local.sh experiment=quickstart optim.lr=1e-3        NPROC=4 launch/local.sh ...
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec torchrun --standalone --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 2))}" -m megalite train "$@"
