#!/bin/bash
# One process per node, all of its GPUs each:
#     sbatch --nodes 4 train/slurm.sh configs/sd15.py --data.source /data/photos --out /data/runs/sd15
# Slurm ends a job with SIGTERM: the run saves, and the same command goes on from there.
#SBATCH --job-name jaxgen
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 32
#SBATCH --signal TERM@300
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail

# Since 22.05 srun does not take --cpus-per-task from the job.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  .venv/bin/python train/main.py "$@"
