#!/usr/bin/env bash
#SBATCH --job-name=mpo-generate
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --partition=gpu
#SBATCH --output=logs/%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#
# Each task writes one of 16 shards and goes on behind what it wrote before. At the time limit it queues itself again.
set -euo pipefail

restarts="${SLURM_RESTART_COUNT:-0}"

requeue() {
    kill "$task" 2>/dev/null || true
    [[ "$restarts" -lt 20 ]] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    exit 75
}
trap requeue USR1

mpo generate --config generate.yaml --shard "$SLURM_ARRAY_TASK_ID/16" &
task=$!
wait "$task"
