# shellcheck shell=bash
# Shared part of the job scripts in this folder, which source it from the folder that holds slurm/. It sets the
# environment's `python` and the variables with which ranks started by srun find each other, and defines `train`, which
# survives preemption.
#
# INTERFACE=ib0 names the network interface for the ranks, if it is not the one that their host names lead to.
# MAX_REQUEUES (100) and MAX_FAILURES (2) limit how often a job puts itself back into the queue.
# SWEEP=FOLDER is set by `atr-scale sweep --slurm`: each task of the array takes its run from this sweep folder, and
# evaluates it after training.
set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH" # without .venv the environment that was active at submission is used
if ! python -c 'import atr_scale' 2>/dev/null; then
    echo "error: no environment in $PWD, and none with atr-scale is active: run launch/environment.sh there before sbatch" >&2
    exit 2
fi

# srun sets the number of each rank. RANK and the like, left over in the shell that submitted the job, would override it.
# The address of rank 0 is set here. Jobs that share a node need different ports.
unset RANK WORLD_SIZE LOCAL_RANK
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun does not inherit this from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# The name of this job alone: a task of an array may have the number of the whole array as its job number.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# srun runs in the background, for a shell that waits for a foreground command handles no signal. The ranks get USR2:
# parts of NCCL use USR1 themselves, and on TERM srun would kill the ranks.
srun_pid=
signalled=
forward() {
    interrupted=yes signalled=yes
    echo "$(date '+%F %T') job $job received $1: telling the ranks to save and stop"
    [[ -z $srun_pid ]] || kill -USR2 "$srun_pid" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

# requeue REASON COUNT CAP: put the job back into the queue, unless the cap is reached or the job is not RUNNING any more:
# scancel is meant to end it, and SLURM itself requeues a job that it preempts or that has lost a node.
requeue() {
    if [[ $(squeue --noheader --jobs "$job" --format %T 2>/dev/null) != RUNNING ]]; then
        echo "$1: SLURM is taking the job away itself, so it is not requeued here"
    elif (($2 >= $3)); then
        echo "$1, and the job was requeued $2 times already: sbatch again to go on" >&2
    else
        echo "$1: requeued ($(($2 + 1)) of at most $3)"
        scontrol requeue "$job"
    fi
}

# ranks COMMAND ...: a command on all ranks; its exit code.
ranks() {
    local status
    srun --kill-on-bad-exit=1 "$@" &
    srun_pid=$!
    while true; do
        interrupted=
        status=0
        wait "$srun_pid" || status=$?
        [[ -n $interrupted ]] || break # otherwise it was the signal that ended the wait
    done
    srun_pid=
    return "$status"
}

# of_sweep train|evaluate|dir: the arguments of the verb for this task of a sweep, or its run folder, in the array
# `arguments`.
of_sweep() {
    local lines
    lines=$(python -m atr_scale.experiments.task "$1" "$SWEEP" "$SLURM_ARRAY_TASK_ID") || exit 2
    arguments=()
    [[ -z $lines ]] || mapfile -t arguments <<<"$lines"
}

# train CONFIG [key.sub=value ...]: one rank for each task. If a signal has stopped the ranks, they have saved, and the job
# goes back into the queue. It also does so after a failure, a few times, but not after the user's mistake (exit code 2).
train() {
    local run_dir status failures arguments
    if [[ -n ${SWEEP:-} ]]; then
        of_sweep dir
        run_dir=${arguments[0]}
        of_sweep train
        set -- "${arguments[@]}"
    else
        run_dir=$(python -c '
import sys
from atr_scale.config import load_config
from atr_scale.errors import UserError
try:
    print(load_config(sys.argv[1], sys.argv[2:]).run.dir)
except UserError as error:
    sys.exit(f"error: {error}")' "$@") || exit 2
    fi
    mkdir -p "$run_dir"
    rm -f "$run_dir/preempted" # of an earlier job

    status=0
    ranks python -m atr_scale.train "$@" || status=$?
    if [[ -n ${SWEEP:-} && $status == 0 && ! -e $run_dir/preempted ]]; then
        of_sweep evaluate
        ((${#arguments[@]} == 0)) || ranks python -m atr_scale.cli evaluate "${arguments[@]}" || status=$?
        if ((status)) && [[ -n $signalled ]]; then
            echo "the evaluation" >"$run_dir/preempted" # it has nothing to save, and starts again
        fi
    fi

    failures=$run_dir/failures-$SLURM_JOB_ID
    if [[ -e $run_dir/preempted ]]; then
        requeue "saved in $run_dir" "${SLURM_RESTART_COUNT:-0}" "${MAX_REQUEUES:-100}"
    elif ((status != 0 && status != 2)); then
        echo "$(date '+%F %T') exit code $status" >>"$failures"
        requeue "training failed with exit code $status" "$(($(wc -l <"$failures") - 1))" "${MAX_FAILURES:-2}"
    fi
    return "$status"
}
