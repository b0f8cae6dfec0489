#!/usr/bin/env bash
# mpo: start this on each of the 4 machines.
#
# Layout: 32 ranks on 4 machines of 8: tensor 8 × pipeline 1 × context 1 × data 4.
#
#   MASTER_ADDR=first-machine bash torchrun-c10d.sh
set -euo pipefail

: "${MASTER_ADDR:?the address of the first machine, as the others reach it}"
MASTER_PORT="${MASTER_PORT:-29500}"
# A rank that is asked to stop finishes its step and saves: give it the time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# Otherwise ranks that are started again may read addresses of those before them (PyTorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun_options=(
    --nproc-per-node=8
    --max-restarts=3
    --nnodes=4
    --rdzv-backend=c10d
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
    --rdzv-id=mpo
)
exec python -m torch.distributed.run "${torchrun_options[@]}" -m mpo_megatron.train --config train.yaml "$@"
