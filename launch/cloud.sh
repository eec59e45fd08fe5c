#!/usr/bin/env bash
# Trains on several machines without a scheduler. Start the same command on every machine, within ten minutes:
#   launch/cloud.sh MACHINES FIRST_MACHINE CONFIG.yaml [key.sub=value ...]
#     MACHINES        number of machines, or LEAST:MOST to go on with fewer if some are lost
#     FIRST_MACHINE   address of one of them that all others reach on port 29500 (or MASTER_PORT)
#   for example: launch/cloud.sh 4 10.0.0.11 configs/pretrain_wavcaps.yaml data.train[0].shards=s3://bucket/audiocaps/train
# One process for each GPU (PROCESSES sets another number; 1 without GPUs). The run folder must be a folder that all
# machines share, or be on S3 (run.dir=s3://bucket/run). docs/operations.md tells more, also of spot machines.
#
# If a rank or a machine fails, all ranks end and start again from the last checkpoint, at most MAX_RESTARTS (3) times, as
# soon as enough machines have met again: start the same command on a machine that was lost, or on another one. There is
# no further start after the user's mistake (exit code 2). On TERM, USR1 or Ctrl-C to one machine the ranks save and end, on all
# machines, with exit code 0; the same command goes on from there, and RUN/preempted says that it was so. With LEAST:MOST only
# the machine that was told to stop ends, and the others go on without it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { # MESSAGE: the user's mistake
    echo "error: $1" >&2
    exit 2
}

if (($# < 3)) || ! [[ $1 =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]]; then
    refuse "usage: launch/cloud.sh MACHINES FIRST_MACHINE CONFIG.yaml [key.sub=value ...]"
fi
((${1%:*} <= ${1#*:})) || refuse "MACHINES is $1: give LEAST:MOST, the smaller number first"
[[ -n $2 && $2 != *:* ]] || refuse "FIRST_MACHINE is '$2': give a name or an address alone, and the port as MASTER_PORT"
for name in MASTER_PORT MAX_RESTARTS PROCESSES; do
    [[ ${!name:-1} =~ ^(0|[1-9][0-9]{0,4})$ && ($name == MAX_RESTARTS || ${!name:-1} != 0) ]] ||
        refuse "$name=${!name}: give a number"
done
machines=$1 place=$2:${MASTER_PORT:-29500}
shift 2
cd "$root"
launch/environment.sh
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
most=${MAX_RESTARTS:-3}
meet_seconds=600

say() { printf '%(%F %T)T machine %s: %s\n' -1 "$HOSTNAME" "$1"; }

# The ranks run in the background, for a shell that waits for a foreground command handles no signal.
pid="" told=""
forward() {
    interrupted=yes told=$1
    say "received $1, telling the ranks to stop"
    [[ -z $pid ]] || kill "-${2:-$1}" "$pid" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM
trap 'forward INT TERM' INT # Ctrl-C; the ranks ignore it, as all that a shell runs in the background does

# once: the ranks of this machine, until they end; their exit code.
once() {
    local status
    python -m atr_scale.machine_ranks "$machines" "$place" "$processes" "$@" &
    pid=$!
    while true; do
        interrupted=
        status=0
        wait "$pid" || status=$?
        [[ -n $interrupted ]] || break # otherwise it was the signal that ended the wait
    done
    pid=
    return "$status"
}

run=$(python -m atr_scale.job_inputs dir "$@")
rm -f "$run/preempted" # of an earlier start
processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
restarts=0 since=$SECONDS # since when this machine tries to meet the others
while true; do
    status=75 began=$SECONDS
    [[ -n $told ]] || { status=0 && once "$@"; } || status=$?
    if [[ -n $told || (-e $run/preempted && $machines != *:*) ]]; then
        if ((status == 1)); then # also if it has saved: on S3 the upload may have failed
            say "told to stop, and failed with exit code 1, see the error above; the same command goes on from the last checkpoint"
            exit 1
        elif [[ -e $run/preempted ]]; then
            say "told to stop, $run goes on from its last checkpoint with the same command"
            exit 0
        elif ((status == 75 || status > 128)); then # before training
            say "told to stop, and nothing was saved; the same command starts again"
            exit 0
        fi
    elif [[ -e $run/preempted && $status == 0 ]]; then # it is removed by the ranks: other machines look at it now
        since=$SECONDS
        say "another machine was told to stop: going on without it"
        continue
    fi
    case $status in
    0)
        say "done: training in $run"
        exit 0
        ;;
    2)
        say "refused, see the error above; it is not tried again"
        exit 2
        ;;
    69) exit 1 ;; # fewer machines came than are needed, which is said
    75)
        ((SECONDS - began < 120)) || since=$SECONDS # they had met
        if ((SECONDS - since > meet_seconds)); then
            echo "error: nobody answers at $place for $meet_seconds s: is launch/cloud.sh running on the first machine?" >&2
            exit 1
        fi
        sleep 1
        continue
        ;;
    esac
    if ((restarts == most)); then
        say "failed with exit code $status, and was started again $restarts times already: call this again to go on"
        exit 1
    fi
    restarts=$((restarts + 1)) since=$SECONDS
    say "failed with exit code $status: starting again ($restarts of at most $most)"
done
