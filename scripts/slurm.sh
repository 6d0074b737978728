#!/usr/bin/env bash
# A training on whole nodes under Slurm, one task a GPU; all arguments are train_dali.py's:
#
#     sbatch --nodes 2 scripts/slurm.sh --data /imagenet --arch parallel_resnet50 --batch-size 16
#
# Seven minutes before its time is over, and when it is preempted, Slurm signals the tasks, which save and
# exit; the job then queues again and goes on. No torchrun in between, so that the signal reaches them.
#SBATCH --job-name=rsnet
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@420
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below 32768, from where on Linux gives ports to whoever asks for any.
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Unbound: a trainer takes its share of all cores that it sees, which are then those of its node's tasks.
srun --cpu-bind=none --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec .venv/bin/python train_dali.py "$@"' task "$@"
code=$?

# 138: SIGUSR1, 143: SIGTERM: stopped with all saved. Anything else is an end.
if [[ $code == 138 || $code == 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
