#!/usr/bin/env bash
# A SLURM cluster on one machine, to try what is in slurm/ without a cluster. Needs root, Linux and Debian's packages
#   slurmctld slurmd slurm-client munge iproute2 util-linux
# (no services: the lab starts its own daemons; a /usr/sbin/policy-rc.d that exits 101 keeps apt from starting others).
#
#   tools/slurm_lab.sh FOLDER start [NODES]   the controller here, 2 nodes by default; FOLDER: new, outside of the repo
#   SLURM_CONF=FOLDER/slurm.conf sbatch ...   what users do; also srun, squeue, scontrol, scancel
#   tools/slurm_lab.sh FOLDER kill I          power loss of node I
#   tools/slurm_lab.sh FOLDER boot I          and power on again
#   tools/slurm_lab.sh FOLDER cut I           the cable of node I is pulled
#   tools/slurm_lab.sh FOLDER heal I          and put back
#   tools/slurm_lab.sh FOLDER stop            everything ends; FOLDER keeps the logs and jobs.txt
#
# Each node is a network, host name, process and mount namespace with an address of its own on a bridge, 8 cores and
# 8 GPUs as far as SLURM knows (the GPUs are /dev/null). A lost node is noticed after half a minute; its jobs are
# requeued, on a spare node if there is one. `nsenter --target $(cat FOLDER/node1.pid) --net` looks into a node.
set -euo pipefail

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

(($# >= 2)) || usage
lab=$(realpath -m "$1") action=$2 argument=${3:-}
# Labs of several folders live beside each other.
number=$(($(cksum <<<"$lab" | cut -d ' ' -f 1) % 200))
net=10.77.$number bridge=lab$number-br
export SLURM_CONF=$lab/slurm.conf

namespace() { echo "lab$number-$1"; }
cable() { echo "lab$number-v$1"; }

write_configuration() {
    local nodes=$1 head i
    head=$(hostname -s)
    {
        echo "127.0.0.1 localhost"
        echo "$net.254 $head"
        # The mapped form as well: without it every connection waits for a reverse look-up.
        for i in $(seq "$nodes"); do printf '%s node%d\n' "$net.$i" "$i" "::ffff:$net.$i" "$i"; done
    } >"$lab/hosts"
    # cred_expire: a requeued job waits until its old credentials have expired, two minutes otherwise.
    cat >"$SLURM_CONF" <<END
ClusterName=lab$number
SlurmctldHost=$head($net.254)
SlurmctldPort=$((20000 + number))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmdLogFile=$lab/log/%n.log
SlurmdSpoolDir=$lab/spool/%n
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$lab/jobs.txt
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
GresTypes=gpu
NodeName=node[1-$nodes] NodeAddr=$net.[1-$nodes] CPUs=8 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    for i in $(seq 0 7); do mknod -m 666 "$lab/gpu$i" c 1 3; done
    echo "NodeName=node[1-$nodes] Name=gpu File=$lab/gpu[0-7]" >"$lab/gres.conf"
}

lay_cables() {
    local i
    ip link add "$bridge" type bridge
    ip address add "$net.254/24" dev "$bridge"
    ip link set "$bridge" up
    for i in $(seq "$1"); do
        ip netns add "$(namespace "$i")"
        ip link add "$(cable "$i")" type veth peer name eth0 netns "$(namespace "$i")"
        ip link set "$(cable "$i")" master "$bridge" up
        ip -n "$(namespace "$i")" link set lo up
        ip -n "$(namespace "$i")" address add "$net.$i/24" dev eth0
        ip -n "$(namespace "$i")" link set eth0 up
    done
}

boot() {
    local i=$1
    mkdir -p "$lab/spool/node$i"
    # The node's first process is bash: when unshare is killed, the kernel ends all that run on the node.
    # shellcheck disable=SC2016 # expanded on the node
    nsenter --net="/run/netns/$(namespace "$i")" \
        unshare --uts --mount --pid --fork --kill-child --mount-proc \
        bash -c 'mount --bind "$1/hosts" /etc/hosts; mount --bind /dev/null /etc/resolv.conf; hostname "$2"
                 slurmd -D -N "$2" & wait' _ "$lab" "node$i" </dev/null >>"$lab/log/node$i.out" 2>&1 &
    echo $! >"$lab/node$i.pid"
}

start() {
    local nodes=$1 _
    [[ ! -e $SLURM_CONF ]] || fail "$lab holds a lab already: stop it and remove the folder, or name another"
    mkdir -p "$lab"/{state,log,spool,munge}
    chmod 755 "$lab" "$lab/munge"
    head -c 128 /dev/urandom >"$lab/munge/key"
    chmod 400 "$lab/munge/key"
    trap 'stop' ERR
    munged --force --key-file="$lab/munge/key" --socket="$lab/munge/socket" --pid-file="$lab/munge/pid" \
        --log-file="$lab/munge/log" --seed-file="$lab/munge/seed"
    write_configuration "$nodes"
    lay_cables "$nodes"
    slurmctld -c
    for i in $(seq "$nodes"); do boot "$i"; done
    for _ in $(seq 300); do
        if [[ $(sinfo -h -t idle --responding -o %D 2>/dev/null) == "$nodes" ]] &&
            timeout 5 srun -N "$nodes" true 2>/dev/null; then
            return
        fi
        sleep 0.1
    done
    stop
    fail "the nodes did not come up: see $lab/log"
}

stop() {
    local file i
    for file in "$lab"/node*.pid; do
        [[ -s $file ]] || continue
        i=${file##*/node} i=${i%.pid}
        kill -9 "$(cat "$file")" 2>/dev/null || true
        ip link delete "$(cable "$i")" 2>/dev/null || true # its other end goes with it
        ip netns delete "$(namespace "$i")" 2>/dev/null || true
        rm -f "$file"
    done
    for file in "$lab/slurmctld.pid" "$lab/munge/pid"; do
        [[ -s $file ]] || continue
        kill "$(cat "$file")" 2>/dev/null || true
    done
    ip link delete "$bridge" 2>/dev/null || true
}

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ $EUID == 0 ]] || fail "namespaces need root"
PATH=$PATH:/usr/sbin:/sbin
case $action in
start)
    for program in slurmctld slurmd sinfo munged nsenter ip; do
        command -v "$program" >/dev/null || fail "no $program on this machine: the packages are named in $0"
    done
    start "${argument:-2}"
    ;;
boot)
    # SLURM tells a reboot by the time since the start of the system, which is that of this machine: without a word it
    # would not learn that the jobs on the node are gone.
    scontrol update "NodeName=node${argument:?number of the node}" State=DOWN Reason="unexpectedly rebooted"
    boot "$argument"
    ;;
kill) kill -9 "$(cat "$lab/node${argument:?number of the node}.pid")" ;;
cut) ip link set "$(cable "${argument:?number of the node}")" down ;;
heal) ip link set "$(cable "${argument:?number of the node}")" up ;;
stop) stop ;;
*) usage ;;
esac
