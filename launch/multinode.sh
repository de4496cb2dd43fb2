#!/usr/bin/env bash
# Run the same line on every node; a lost process restarts the job from its newest complete checkpoint.
#   NODES=4 HEAD=node0:29400 JOB=llama launch/multinode.sh experiment=llama3_8b run.dir=/shared/runs/llama
# run.dir must be a folder that all nodes see.
set -euo pipefail
: "${NODES:?number of nodes}" "${HEAD:?host:port of the first node}" "${JOB:?a name that is new for every job}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${NPROC:-gpu}" --max-restarts "${RESTARTS:-20}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$JOB" -m megalite train "$@"
