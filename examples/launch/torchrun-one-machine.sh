#!/usr/bin/env bash
# mpo: start this on the machine.
#
# Layout: 8 ranks on 1 machine of 8: tensor 8 × pipeline 1 × context 1 × data 1.
set -euo pipefail

# A rank that is asked to stop finishes its step and saves: give it the time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# Otherwise ranks that are started again may read addresses of those before them (PyTorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun_options=(
    --nproc-per-node=8
    --max-restarts=3
    --standalone
)
exec python -m torch.distributed.run "${torchrun_options[@]}" -m mpo_megatron.train --config train.yaml "$@"
