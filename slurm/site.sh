# shellcheck shell=bash disable=SC2034 # the variables are read by slurm/prologue.sh
# What this cluster needs. All scripts of this folder read it: before they submit themselves, and inside the job. Values
# that the environment of the submission has count more than those here.
set -euo pipefail

# Options of sbatch for every job that a script of this folder, or `atr-scale sweep --slurm`, submits. `sbatch SCRIPT`
# alone does not read them. One task for each GPU; none are named for jobs of train.sh on a range of nodes, see
# docs/operations.md. For example:
#   options=(--account=sound --partition=gpu --qos=normal --gpus-per-node=4 --ntasks-per-node=4 --mem=200G)
#   options=(--partition=gpu --gpus-per-node=0 --gres=gpu:a100:4 --ntasks-per-node=4)    if the cluster wants gres
options=()

# Called in the job before anything else, for example: module purge; module load cuda/12.8
load_modules() { :; }

# An image that holds the environment, instead of .venv: a file or address, and what runs it, apptainer or pyxis. The
# folder of the job is bound at its own path; MOUNTS are further ones, such as those of shards, of STAGE and of HF_HOME, as
# FROM:TO, separated by commas.
CONTAINER=${CONTAINER:-}
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-apptainer}
MOUNTS=${MOUNTS:-}

# A folder on a disk of each node, to which the shards of data.train are copied before training; empty: they are read from
# where they are. What is there already and has not changed is not copied again. If each job has a folder of its own:
#   STAGE=${SLURM_JOB_ID:+/scratch/$SLURM_JOB_ID}
STAGE=${STAGE:-}

# A folder on a disk of each node in which runs on S3 train (run.dir=s3://bucket/run); empty: ~/.cache/atr-scale.
export ATR_SCALE_SCRATCH=${ATR_SCALE_SCRATCH:-$STAGE}

# Where pretrained models of the Hugging Face hub are, if not in the home folder; compute nodes often have no network:
#   export HF_HOME=/project/huggingface HF_HUB_OFFLINE=1

# Credentials for s3:// are those of the environment, see docs/data.md. A server other than Amazon's, for example:
#   export AWS_ENDPOINT_URL=http://storage:9000 AWS_PROFILE=sound

# The network interface for the ranks, for example ib0, if it is not the one that their host names lead to.
INTERFACE=${INTERFACE:-}

# How often a job puts itself back into the queue: after a preemption, a signal or the time limit; after a failure.
MAX_REQUEUES=${MAX_REQUEUES:-100}
MAX_FAILURES=${MAX_FAILURES:-2}

# At the start each node computes on its GPUs and writes to the folder of the job. Nodes that fail, or do not answer within
# so many seconds, are left out by the next start. 0: no check.
HEALTH_SECONDS=${HEALTH_SECONDS:-300}
