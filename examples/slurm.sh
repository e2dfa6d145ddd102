#!/bin/bash
# Train on one machine of 8 GPUs, or on two:
#
#     sbatch examples/slurm.sh rl video-r1-7b-tgrpo --output_dir /shared/runs/7b
#     sbatch --nodes 2 examples/slurm.sh rl video-r1-7b-tgrpo --output_dir /shared/runs/7b
#
# Run folder and media need paths that all machines share. The same command resumes the run.
#SBATCH --job-name video-r1
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --signal TERM@300
#SBATCH --output %x-%j.log
# TERM@300: five minutes before the end the step is finished and a checkpoint saved.
set -euo pipefail

export RECIPES=${RECIPES:-$(python -c 'from importlib.resources import files; print(files("video_r1") / "recipes")')}
export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher on each machine starts a process for each GPU. SLURM_NODEID differs: only srun's shell expands it.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$RECIPES/accelerate/fsdp2.yaml" \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD_NODE" --main_process_port 29500 \
        -m video_r1 "$@"' video-r1 "$@"
