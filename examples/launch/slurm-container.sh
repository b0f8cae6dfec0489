#!/usr/bin/env bash
#SBATCH --job-name=mpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
#
# Layout: 32 ranks on 4 machines of 8: tensor 8 × pipeline 1 × context 1 × data 4.
#
# Slurm sends SIGUSR1 300 s before the time limit, and SIGTERM when the job is preempted. The ranks then finish their step,
# save, and exit with 75; this script queues the job again, and it resumes. Submit it from the
# folder that paths are relative to; logs/ must exist there.
set -euo pipefail
trap : TERM USR1 # these are for the ranks; where they come here, too, this script goes on

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# Below the ephemeral ports, from 32768 on, which any connection may be given.
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12768))}"
if [[ -z "${SLURM_JOB_END_TIME:-}" ]]; then # older Slurms do not set it; the run saves in time by it
    SLURM_JOB_END_TIME="$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s)" || unset SLURM_JOB_END_TIME
fi
export SLURM_JOB_END_TIME
restarts="${SLURM_RESTART_COUNT:-0}"
echo "$(date -Is) $SLURM_JOB_NAME on $SLURM_JOB_NODELIST, restart $restarts"

# One process a rank: it gets Slurm's signals itself. When one fails, srun ends the others, which may wait for it in a collective.
# Ranks that stop in good order do not fail: they leave their exit code in this file.
export MPO_EXIT_FILE="$PWD/.mpo-$SLURM_JOB_ID.exit"
rm -f "$MPO_EXIT_FILE"
# shellcheck disable=SC2016 # each rank expands it
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m mpo_megatron.train --config "$0"'
srun_options=(
    --kill-on-bad-exit=1
    --wait=300
    --distribution=block
    --output=logs/%x-%j-rank%t.log
    --open-mode=append
    --container-image=/images/mpo.sqsh
    --container-workdir="$PWD"
    --container-mounts="$PWD:$PWD,/runs:/runs,/data:/data,/checkpoints:/checkpoints"
)
code=0
srun "${srun_options[@]}" bash -c "$rank" train.yaml || code=$?
if [[ -f "$MPO_EXIT_FILE" ]]; then
    code="$(cat "$MPO_EXIT_FILE")"
    rm "$MPO_EXIT_FILE"
fi

if [[ "$code" -eq 75 ]]; then
    if [[ "$restarts" -lt 20 ]]; then
        echo "$(date -Is) stopped in good order; queued again"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # Slurm ends this script
    else
        echo "$(date -Is) stopped in good order, after 20 restarts: submit it again to go on" >&2
    fi
fi
exit "$code"
