#!/usr/bin/env bash
# One training on several hosts, by DeepSpeed's own launcher (or torchrun's restarts), after a preflight of all of them:
#
#     bash launcher/multinode.sh --hostfile hosts launcher/train.py --optimizer adan --save runs/x
#     bash launcher/multinode.sh --hostfile hosts --preflight-only launcher/train.py --optimizer adan
#     bash launcher/multinode.sh --hostfile hosts --no-ssh --node-rank 0 --master-addr 10.0.0.1 launcher/train.py ...
#     bash launcher/multinode.sh --hostfile hosts --elastic 2 launcher/train.py --save runs/x --save-every 100 --autoresume
#
# With ssh it is started once, on any host that reaches the others; without, once on every host. Run it from the same path
# on all hosts: the checkout, or a directory with the script. docs/multinode.md explains all of it.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'
    cat << 'OPTIONS'

options, before the script; everything after it is the script's:
  --hostfile FILE      NAME slots=N a line ($HOSTFILE, or hostfile)
  --port N             for the rendezvous, on the first host (29500)
  --interface NAME     network interface for gloo and NCCL on every host (theirs to choose)
  --env-file FILE      NAME=VALUE a line, for every process (.deepspeed_env here and in your home)
  --shared DIR         every host must see this directory (the script's --save, if it has one)
  --logs DIR           one file per rank, on the rank's host; kept when ssh breaks (runs/logs)
  --silence S          seconds until ssh takes a silent host for dead (15)
  --ssh-port N         of the ssh servers
  --skip-unreachable   start without the hosts that do not answer
  --no-ssh             this command is run on every host, with --node-rank I and --master-addr IP
  --elastic MIN        torchrun in DeepSpeed's place: after a failure it starts again with the hosts that are left, MIN or
                       more; needs --autoresume (or a script that resumes by itself)
  --restarts N         of torchrun (3)
  --preflight-only     ask the hosts, start nothing
  --no-preflight       start without asking
OPTIONS
}

refuse() { echo "multinode: $1" >&2; exit 2; }

hostfile=${HOSTFILE:-hostfile} port=29500 logs=runs/logs silence=15 restarts=3 elastic="" master_addr=""
ask=() interface="" shared="" ssh_port="" no_ssh=no node_rank=-1 preflight=yes start=yes
while [ $# -gt 0 ]; do
    case $1 in
        --hostfile | --port | --interface | --env-file | --shared | --logs | --silence | --ssh-port | --node-rank | \
            --master-addr | --elastic | --restarts) [ $# -gt 1 ] || refuse "$1 needs a value" ;;
    esac
    case $1 in
        --port | --silence | --ssh-port | --node-rank | --elastic | --restarts)
            [[ $2 =~ ^[0-9]+$ ]] || refuse "$1 is $2; it must be a whole number" ;;
    esac
    case $1 in
        --hostfile) hostfile=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        --interface) interface=$2; shift 2 ;;
        --env-file) ask+=(--env-file "$2"); shift 2 ;;
        --shared) shared=$2; shift 2 ;;
        --logs) logs=$2; shift 2 ;;
        --silence) silence=$2; shift 2 ;;
        --ssh-port) ssh_port=$2; shift 2 ;;
        --skip-unreachable) ask+=(--skip-unreachable); shift ;;
        --no-ssh) no_ssh=yes; shift ;;
        --node-rank) node_rank=$2; shift 2 ;;
        --master-addr) master_addr=$2; shift 2 ;;
        --elastic) elastic=$2; shift 2 ;;
        --restarts) restarts=$2; shift 2 ;;
        --preflight-only) start=no; shift ;;
        --no-preflight) preflight=no; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        -*) refuse "unknown option $1 (--help lists them)" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2; refuse "which training script?"; }
[ $start$preflight != nono ] || refuse "--preflight-only and --no-preflight leave nothing to do"
if [ -z "$shared" ]; then  # a checkpoint that only one host sees is none
    previous=""
    for argument; do
        case $previous:$argument in
            --save:[!-]*) shared=$argument ;;
            *:--save=?*) shared=${argument#--save=} ;;
        esac
        previous=$argument
    done
fi
PYTHON=$(command -v python3 || command -v python)
PATH=$(dirname "$PYTHON"):$PATH
scratch=$(mktemp -d -t multinode.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

# ------------------------------------------------------------------------------------------------------------ the preflight
environment=$scratch/environment
ask+=(--hostfile "$hostfile" --port "$port" --logs "$logs" --write-environment "$environment")
[ -z "$interface" ] || ask+=(--interface "$interface")
[ -z "$shared" ] || ask+=(--shared "$shared")
[ -z "$ssh_port" ] || ask+=(--ssh-port "$ssh_port")
[ -z "$elastic" ] || ask+=(--torchrun)
[ $no_ssh = no ] || ask+=(--no-ssh --node-rank "$node_rank")
[ -z "$master_addr" ] || ask+=(--master-addr "$master_addr")
[ $preflight = yes ] || ask+=(--hostfile-only)
found=$("$PYTHON" "$HERE/preflight.py" "${ask[@]}" "$@")
eval "$found"  # HOSTS, SLOTS, MASTER_ADDR
[ $start = yes ] || exit 0

# ------------------------------------------------------------------------------------------------------------- the launchers
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
touch "$scratch/start"  # logs of earlier jobs are older
# torchrun's ranks would meet in the agents' store under the number of restarts, which agents count differently when one
# fails and the others only follow: with a store of its own, every attempt begins clean.
[ -z "$elastic" ] || echo TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 >> "$environment"
while IFS= read -r line; do export "${line?}"; done < "$environment"
export DS_ENV_FILE=$environment PDSH_RCMD_TYPE=ssh
# A host without power says nothing: ssh must ask, or pdsh waits for it for ever.
PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=$((silence / 3 > 0 ? silence / 3 : 1)) -o ServerAliveCountMax=3"
export PDSH_SSH_ARGS_APPEND

# In the background, so that a signal is heard at once. However this script is ended, the ranks on all hosts are too.
stop() { :; }
run() {
    "$@" &
    launcher=$!
    trap 'trap "" INT TERM HUP; stop' INT TERM HUP
    status=0
    wait $launcher || status=$?
    while kill -0 $launcher 2> /dev/null; do wait $launcher || status=$?; done
}

if [ -z "$elastic" ]; then
    # DeepSpeed writes each rank's output to its file only; the first rank's is shown as it grows.
    launch=(deepspeed --quiet --hostfile "$hostfile" --master_addr "$MASTER_ADDR" --master_port "$port"
        --no_ssh_check --enable_each_rank_log "$logs")
    if [ $no_ssh = yes ]; then
        launch+=(--no_ssh --node_rank "$node_rank")
        stop() { pkill -TERM -P $launcher; }  # its per-host launcher ends the ranks; the runner itself hears nothing
    else
        launch+=(--include "${HOSTS//,/@}" --force_multi ${ssh_port:+--ssh_port "$ssh_port"})
        stop() { kill -TERM $launcher; }  # the runner ends all of them, over ssh
    fi
    "$PYTHON" "$HERE/rank_logs.py" follow "$logs" --newer "$scratch/start" --until "$scratch/end" &
    follower=$!
    run "${launch[@]}" "$@"
    touch "$scratch/end"
    wait $follower || true
else
    count=$(tr ',' '\n' <<< "$HOSTS" | wc -l)
    id=multinode-$port
    agent=("$PYTHON" -m torch.distributed.run --nnodes "$elastic:$count" --nproc-per-node "$SLOTS" --max-restarts "$restarts"
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "$id"
        --rdzv-conf "join_timeout=300,last_call_timeout=5,timeout=300"
        --log-dir "$logs" --redirects 3 --tee 3)
    if [ $no_ssh = yes ]; then
        stop() { kill -TERM $launcher; }
        run "${agent[@]}" "$@"
    else
        [ -z "$ssh_port" ] || PDSH_SSH_ARGS_APPEND+=" -p $ssh_port"
        assignments=$(while IFS= read -r line; do printf '%q ' "$line"; done < "$environment")
        command="cd $(printf '%q' "$PWD") && exec env $assignments $(printf '%q ' "${agent[@]}" "$@")"
        stop() {
            pdsh -f 1024 -w "$HOSTS" "pkill -TERM -f 'rdzv-id[ ]$id'"
            kill -TERM $launcher
        }
        mkfifo "$scratch/errors"
        tee "$scratch/said" < "$scratch/errors" >&2 &
        teller=$!
        run pdsh -S -f 1024 -w "$HOSTS" "$command" 2> "$scratch/errors"
        wait $teller || true
        # A host that was lost (ssh ends with 255) has not failed the job if all the others finished it.
        failed=$(grep -c '^pdsh@.*exited with exit code' "$scratch/said" || true)
        lost=$(grep -c '^pdsh@.*exited with exit code 255' "$scratch/said" || true)
        if [ $status -eq 255 ] && [ "$lost" -eq "$failed" ] && [ $((count - lost)) -ge "$elastic" ]; then
            echo "multinode: finished by $((count - lost)) of $count hosts; $lost lost on the way" >&2
            status=0
        fi
    fi
fi
if [ $status -ne 0 ]; then
    echo "multinode: the job failed with status $status; every rank's log is in $logs on its host" >&2
    "$PYTHON" "$HERE/rank_logs.py" reasons "$logs" --newer "$scratch/start" >&2 || true
fi
exit $status
