# shellcheck shell=bash
# Shared part of the scripts in this folder, which source it from the folder that holds slurm/.
#
# Outside of a job it submits the script with the options of slurm/site.sh. In a job it sets the environment's `python` and
# the variables with which ranks started by srun find each other, checks the nodes, and defines `train` and `work`. Both
# survive preemption, the time limit and failures: the job puts itself back into the queue. The last line of the log says
# what happened.
#
# RUN/preempted is how a run says that it was told to stop and has saved. The exit code alone does not say it: a rank that has
# saved exits with 0, as one that is done, and launchers return 1 whatever their ranks return. srun, like a single process,
# returns the ranks' own code: 0, 1 a failure, 2 the user's mistake.
#
# SWEEP=FOLDER is set by `atr-scale sweep --slurm`: each task of the array takes its run from this sweep folder, and
# evaluates it after training.
set -euo pipefail
# shellcheck source=slurm/site.sh
source slurm/site.sh
for name in MAX_REQUEUES MAX_FAILURES HEALTH_SECONDS; do
    if ! [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]]; then
        echo "error: $name=${!name}: give a number, in the environment or in slurm/site.sh" >&2
        exit 2
    fi
done

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    if ! command -v sbatch >/dev/null; then
        echo "error: no sbatch on this machine: call this on a login node of the cluster" >&2
        exit 2
    fi
    while [[ ${1:-} == -* ]]; do
        if [[ $1 =~ ^(--[^=]+|-.)$ && ${2:-} =~ ^[^-=/~+][^=/]*$ && ! -e $2 ]]; then
            case $1 in
            --parsable | --hold | -H | --exclusive | --wait | -W | --test-only | --quiet | -Q | --verbose | -v | --no-requeue) ;;
            *)
                with="$1$([[ $1 != --* ]] || printf '=')$2"
                echo "error: sbatch would take $2 for an argument of the job: write $with instead of $1 $2" >&2
                exit 2
                ;;
            esac
        fi
        options+=("$1")
        shift
    done
    exec sbatch "${options[@]}" "slurm/${0##*/}" "$@"
fi

# The name of this job alone: a task of an array may have the number of the whole array as its job number.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
failures=$PWD/.failures-$job # a line for each
outcome="ended by SLURM" told=""
say() { printf '%(%F %T)T job %s: %s\n' -1 "$job" "$1"; }
tell() {
    [[ -n $told ]] || say "$outcome"
    told=yes
}
trap tell EXIT
refuse() { # MESSAGE: the user's mistake
    echo "error: $1" >&2
    outcome="refused, see the error above; it is not tried again"
    exit 2
}
((restarts == 0)) || say "start $((restarts + 1)), on $SLURM_JOB_NODELIST"

load_modules
inside=() step=(--kill-on-bad-exit=1) # words before each command, options of each srun
if [[ -n $CONTAINER ]]; then
    case $CONTAINER_RUNTIME in
    apptainer) inside=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "$CONTAINER") ;;
    pyxis) step+=(--container-image="$CONTAINER" --container-workdir="$PWD" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}") ;;
    *) refuse "CONTAINER_RUNTIME=$CONTAINER_RUNTIME in slurm/site.sh: give apptainer or pyxis" ;;
    esac
fi
export PATH="$PWD/.venv/bin:$PATH" # without .venv the environment that was active at submission is used

# srun sets the number of each rank. RANK and the like, left over in the shell that submitted the job, would override it.
# The address of rank 0 is set here. Jobs that share a node need different ports.
unset RANK WORLD_SIZE LOCAL_RANK
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(head -n 1 <<<"$nodes")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
if [[ -n $INTERFACE ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A job that waits may be given fewer nodes (scontrol update). Its environment still has the tasks of its submission.
tasks=$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}}))
if ((${SLURM_NTASKS:-1} > tasks)); then
    export SLURM_NTASKS=$tasks SLURM_NPROCS=$tasks
fi
# srun would give the ranks none of the GPUs of --gres, for it reads --gpus-per-node=0 here.
[[ ${SLURM_GPUS_PER_NODE:-} != 0 ]] || unset SLURM_GPUS_PER_NODE
# Without a number of tasks there is a rank for each GPU of a node, or one. To SLURM the job then is one task, so that each
# start is on as many nodes of a range as are free; tasks of an earlier start would bind it to the nodes of that start.
cpus=${SLURM_CPUS_PER_TASK:-} elastic=
if [[ -z ${SLURM_NTASKS:-} ]]; then
    gpus=${SLURM_GPUS_ON_NODE:-0} elastic=yes
    SLURM_NTASKS_PER_NODE=$((gpus ? gpus : 1))
    SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
    export SLURM_NTASKS SLURM_NTASKS_PER_NODE
    if [[ -n $cpus ]]; then
        ((cpus >= SLURM_NTASKS_PER_NODE)) || refuse "$cpus CPUs for $gpus GPUs of each node: give --cpus-per-task=$gpus or more"
        cpus=$((cpus / SLURM_NTASKS_PER_NODE))
    fi
fi
# srun does not inherit this from sbatch.
[[ -z $cpus ]] || export SRUN_CPUS_PER_TASK=$cpus

# srun runs in the background, for a shell that waits for a foreground command handles no signal. The ranks get USR2:
# parts of NCCL use USR1 themselves, and on TERM srun would kill the ranks.
srun_pid="" signalled=""
forward() {
    interrupted=yes signalled=$1
    say "received $1, telling the ranks to stop" >&2 # the output may be a command's
    [[ -z $srun_pid ]] || kill -USR2 "$srun_pid" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

# ranks COMMAND ...: a command on all ranks; its exit code.
ranks() { in_step "${inside[@]}" "$@"; }

# in_step [OPTION ...] COMMAND ...: a command with options of srun; its exit code. None is started after a signal.
in_step() {
    local status
    [[ -z $signalled ]] || return 143
    srun "${step[@]}" "$@" &
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

# single COMMAND ...: a command on this node, or with pyxis on one of the nodes.
single() {
    if [[ -n $CONTAINER && $CONTAINER_RUNTIME == pyxis ]]; then
        srun "${step[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "$@"
    else
        "${inside[@]}" "$@"
    fi
}

# requeue REASON COUNT CAP [NODES]: put the job back into the queue, without NODES, and exit; not if the cap is reached or
# the job is not RUNNING any more: scancel is meant to end it, and SLURM itself requeues a job that it preempts or that
# has lost a node.
requeue() {
    local state="" tries
    for tries in {1..6}; do # the controller may be busy, or just be starting
        ! state=$(squeue --noheader --jobs "$job" --format %T) || break
        sleep 10
    done
    if [[ $state != RUNNING ]]; then
        outcome="$1; SLURM takes the job away itself, so it is not requeued here"
        exit 1
    elif (($2 >= $3)); then
        outcome="$1, and was requeued $2 times already: submit it again to go on"
        exit 1 # also after a preemption: a job that waits for this one must not take the run for done
    fi
    outcome="$1: requeued ($(($2 + 1)) of at most $3)"
    trap '' USR1 TERM # SLURM now ends this script
    tell
    tries=0
    until scontrol requeue "$job"; do
        if ((++tries == 6)); then
            say "$1, but SLURM does not requeue it, see the error above: submit it again to go on"
            exit 1
        fi
        sleep 10
    done
    # It is taken for a pending job from now on; a running one's nodes cannot be changed.
    [[ -z ${4:-} ]] || scontrol update "JobId=$job" "ExcNodeList=$4" || true
    exit 1
}

# failed REASON [NODES]: requeue after a failure.
failed() {
    outcome=$1
    say "$1" >>"$failures"
    requeue "$1" "$(($(wc -l <"$failures") - 1))" "$MAX_FAILURES" "${2:-}"
}

# check_nodes: that there is an environment, and that all nodes work, see slurm/site.sh.
check_nodes() {
    local said node bad=() status=0 others
    single timeout "$HEALTH_SECONDS" python -c 'import atr_scale' 2>/dev/null || status=$?
    ((status == 0 || status == 124)) || # 124: this node hangs
        refuse "no environment in $PWD, and none with atr-scale is active: run launch/environment.sh there before sbatch"
    ((HEALTH_SECONDS)) || return 0
    said=$(timeout --kill-after=10 "$HEALTH_SECONDS" srun "${step[@]}" --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 "${inside[@]}" python -m atr_scale.node_health "$PWD") || true
    for node in $nodes; do
        grep -qx "$node is healthy" <<<"$said" || bad+=("$node")
    done
    ((${#bad[@]})) && [[ -z $signalled ]] || return 0
    # With too few nodes left the job would wait for ever: it may be the disk of the job's folder, which all nodes share.
    others=$(sinfo --noheader --responding --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort --unique |
        grep --count --invert-match --line-regexp --fixed-strings --file=<(printf '%s\n' "${bad[@]}")) || true
    if ((others < (${#elastic} ? 1 : SLURM_JOB_NUM_NODES))); then
        failed "the health check failed on ${bad[*]}, and too few other nodes are there"
    fi
    failed "the health check failed on ${bad[*]}" "$(IFS=,; echo "${bad[*]}")"
}

# of_sweep train|evaluate|dir: the arguments of the verb for this task of a sweep, or its run folder, in the array
# `arguments`.
of_sweep() {
    local lines
    lines=$(single python -m atr_scale.experiments.task "$1" "$SWEEP" "$SLURM_ARRAY_TASK_ID") || refuse "no task for this job"
    arguments=()
    [[ -z $lines ]] || mapfile -t arguments <<<"$lines"
}

# leave_out_nodes CONFIG [key.sub=value ...]: until the next start, as many as the batch does not divide among.
leave_out_nodes() {
    local used
    used=$(single python -m atr_scale.job_inputs nodes "$SLURM_JOB_NUM_NODES" "$SLURM_NTASKS_PER_NODE" "$@")
    ((used < SLURM_JOB_NUM_NODES)) || return 0
    say "$used of $SLURM_JOB_NUM_NODES nodes have ranks: train.global_batch_size does not divide among $SLURM_NTASKS ranks"
    nodes=$(head -n "$used" <<<"$nodes")
    step+=(--nodes="$used" --nodelist="${nodes//$'\n'/,}")
    SLURM_JOB_NUM_NODES=$used SLURM_NTASKS=$((used * SLURM_NTASKS_PER_NODE))
}

# train CONFIG [key.sub=value ...]: one rank for each task. If a signal has stopped the ranks, they have saved, and the job
# goes back into the queue. It also does so after a failure, a few times, but not after the user's mistake (exit code 2).
train() {
    local run status=0 arguments staged early="told to stop, and nothing was saved"
    check_nodes
    if [[ -n ${SWEEP:-} ]]; then
        of_sweep dir
        run=${arguments[0]}
        of_sweep train
        set -- "${arguments[@]}"
    else
        run=$(single python -m atr_scale.job_inputs dir "$@") || settle $? "reading of the configuration"
        [[ -z $elastic ]] || ((SLURM_JOB_NUM_NODES == 1)) || leave_out_nodes "$@"
    fi
    mkdir -p "$run"
    rm -f "$run/preempted" # of an earlier job
    if [[ -n $STAGE ]]; then
        staged=$(mktemp)
        in_step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${inside[@]}" \
            python -m atr_scale.job_inputs stage "$STAGE" "$@" >"$staged" || status=$?
        mapfile -t arguments < <(sort -u "$staged")
        rm "$staged"
        [[ -z $signalled ]] || requeue "$early" "$restarts" "$MAX_REQUEUES"
        ((status == 0)) || settle "$status" "copying of shards to $STAGE"
        set -- "$@" "${arguments[@]}"
    fi

    ranks python -m atr_scale.train "$@" || status=$?
    if [[ -n ${SWEEP:-} && $status == 0 && ! -e $run/preempted ]]; then
        of_sweep evaluate
        ((${#arguments[@]} == 0)) || ranks python -m atr_scale.cli evaluate "${arguments[@]}" || status=$?
        if ((status)) && [[ -n $signalled ]]; then
            echo "the evaluation" >"$run/preempted" # it has nothing to save, and starts again
        fi
    fi
    [[ ! -e $run/preempted ]] || requeue "told to stop, $run goes on from its last checkpoint" "$restarts" "$MAX_REQUEUES"
    # A rank that has no run yet hears no signal, and is ended by it.
    ((status < 128)) || [[ -z $signalled ]] || requeue "$early" "$restarts" "$MAX_REQUEUES"
    settle "$status" training " in $run"
}

# work NAME COMMAND ...: a command on all ranks that starts anew after a signal or a failure.
work() {
    local name=$1 status=0
    shift
    check_nodes
    ranks "$@" || status=$?
    if ((status)) && [[ -n $signalled ]]; then
        requeue "the $name was interrupted by $signalled" "$restarts" "$MAX_REQUEUES"
    fi
    settle "$status" "$name"
}

# settle STATUS NAME [PLACE]: the end of a job that nothing has interrupted.
settle() {
    case $1 in
    0)
        outcome="done: $2${3:-}"
        rm -f "$failures"
        ;;
    2) outcome="refused, see the error above; it is not tried again" ;;
    *) failed "the $2 failed with exit code $1" ;;
    esac
    return "$1"
}
