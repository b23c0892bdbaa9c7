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
  --env-file FILE      NAME=VALUE a line, for every process (.deepspeed_env, if it is there)
  --shared DIR         every host must see this directory (the script's --save, if it has one)
  --logs DIR           one file per rank, on the rank's host; kept when ssh breaks (runs/logs)
  --timeout S          seconds until ssh takes a silent host for dead (15)
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

hostfile=${HOSTFILE:-hostfile} port=29500 interface="" env_file="" shared="" logs=runs/logs silence=15 ssh_port=""
skip=no no_ssh=no node_rank=-1 master_addr="" elastic="" restarts=3 preflight=yes start=yes
while [ $# -gt 0 ]; do
    case $1 in
        --hostfile) hostfile=$2; shift 2 ;;
        --port) port=$2; shift 2 ;;
        --interface) interface=$2; shift 2 ;;
        --env-file) env_file=$2; shift 2 ;;
        --shared) shared=$2; shift 2 ;;
        --logs) logs=$2; shift 2 ;;
        --timeout) silence=$2; shift 2 ;;
        --ssh-port) ssh_port=$2; shift 2 ;;
        --skip-unreachable) skip=yes; shift ;;
        --no-ssh) no_ssh=yes; shift ;;
        --node-rank) node_rank=$2; shift 2 ;;
        --master-addr) master_addr=$2; shift 2 ;;
        --elastic) elastic=$2; shift 2 ;;
        --restarts) restarts=$2; shift 2 ;;
        --preflight-only) start=no; shift ;;
        --no-preflight) preflight=no; shift ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "multinode: unknown option $1 (--help lists them)" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2; echo "multinode: which training script?" >&2; exit 2; }
[ -n "$env_file" ] || { [ ! -f .deepspeed_env ] || env_file=.deepspeed_env; }
if [ -z "$shared" ]; then  # a checkpoint that only one host sees is none
    previous=""
    for argument; do
        case $previous in --save) shared=$argument ;; esac
        case $argument in --save=*) shared=${argument#--save=} ;; esac
        previous=$argument
    done
fi
PYTHON=$(command -v python3 || command -v python)
PATH=$(dirname "$PYTHON"):$PATH

# ------------------------------------------------------------------------------------------------ what every process gets
environment=$(mktemp -t multinode-env.XXXXXX)
trap 'rm -f "$environment"' EXIT
{
    if [ -n "$env_file" ]; then sed -e 's/^[[:space:]]*//' -e '/^#/d' -e '/^$/d' "$env_file"; fi
    if [ -n "$interface" ]; then printf '%s\n' "GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME=$interface"; fi
    # What was set here for this command counts on all hosts; pdsh would start them without it.
    for name in PYTHONPATH DS_ACCELERATOR OMP_NUM_THREADS HF_HUB_OFFLINE TOKENIZERS_PARALLELISM; do
        if [ -n "${!name:-}" ]; then echo "$name=${!name}"; fi
    done
} > "$environment"

# ------------------------------------------------------------------------------------------------------------ the preflight
ask=(--hostfile "$hostfile" --port "$port" --env-file "$environment")
[ -z "$interface" ] || ask+=(--interface "$interface")
[ -z "$shared" ] || ask+=(--shared "$shared")
[ -z "$ssh_port" ] || ask+=(--ssh-port "$ssh_port")
[ $skip = no ] || ask+=(--skip-unreachable)
[ -z "$elastic" ] || ask+=(--equal-slots)
[ $no_ssh = no ] || ask+=(--no-ssh --node-rank "$node_rank")
[ -z "$master_addr" ] || ask+=(--master-addr "$master_addr")
[ $preflight = yes ] || ask+=(--hostfile-only)
found=$("$PYTHON" "$HERE/preflight.py" "${ask[@]}" "$@")
eval "$found"  # HOSTS, SLOTS, MASTER_ADDR
[ $start = yes ] || exit 0

# ------------------------------------------------------------------------------------------------------------- the launchers
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
export DS_ENV_FILE=$environment
# A host without power says nothing: ssh must ask, or pdsh waits for it for ever.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=$((silence / 3 > 0 ? silence / 3 : 1)) -o ServerAliveCountMax=3"
while IFS='=' read -r name value; do export "$name=$value"; done < "$environment"

mark=$(mktemp -p "$logs" .started.XXXXXX)  # logs of earlier jobs are older
said=$(mktemp -t multinode-said.XXXXXX)
trap 'rm -f "$environment" "$mark" "$said"' EXIT
status=0
if [ -n "$elastic" ]; then
    count=$(tr ',' '\n' <<< "$HOSTS" | wc -l)
    agent=("$PYTHON" -m torch.distributed.run --nnodes "$elastic:$count" --nproc-per-node "$SLOTS" --max-restarts "$restarts"
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "$(basename "$logs")"
        --rdzv-conf "join_timeout=300,last_call_timeout=5,timeout=300"
        --log-dir "$logs" --redirects 3 --tee 3)
    if [ $no_ssh = yes ]; then
        "${agent[@]}" "$@" || status=$?
    else
        assignments=$(while IFS= read -r line; do printf '%q ' "$line"; done < "$environment")
        command="cd $(printf '%q' "$PWD") && exec env $assignments $(printf '%q ' "${agent[@]}" "$@")"
        export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND ${ssh_port:+-p $ssh_port}"
        set +e
        { pdsh -S -f 1024 -w "$HOSTS" "$command" 2>&1 >&3 | tee "$said" >&2; status=${PIPESTATUS[0]}; } 3>&1
        set -e
        # A host that was lost (ssh ends with 255) has not failed the job if all the others finished it.
        failed=$(grep -c '^pdsh@.*exited with exit code' "$said" || true)
        lost=$(grep -c '^pdsh@.*exited with exit code 255' "$said" || true)
        if [ $status -eq 255 ] && [ "$lost" -eq "$failed" ] && [ $((count - lost)) -ge "$elastic" ]; then
            echo "multinode: finished by $((count - lost)) of $count hosts; $lost lost on the way" >&2
            status=0
        fi
    fi
else
    launch=(deepspeed --quiet --hostfile "$hostfile" --master_addr "$MASTER_ADDR" --master_port "$port"
        --no_ssh_check --enable_each_rank_log "$logs")
    if [ $no_ssh = yes ]; then
        launch+=(--no_ssh --node_rank "$node_rank")
    else
        launch+=(--include "${HOSTS//,/@}" --force_multi ${ssh_port:+--ssh_port "$ssh_port"})
    fi
    # DeepSpeed writes each rank's output to its file only; the first rank's is shown as it grows.
    "${launch[@]}" "$@" &
    launcher=$!
    "$PYTHON" "$HERE/rank_logs.py" follow "$logs" --newer "$mark" --pid "$launcher" &
    follower=$!
    trap 'kill $launcher 2> /dev/null' INT TERM
    wait $launcher || status=$?
    wait $follower || true
fi
if [ $status -ne 0 ]; then
    echo "multinode: the job failed with status $status; every rank's log is in $logs on its host" >&2
    "$PYTHON" "$HERE/rank_logs.py" reasons "$logs" --newer "$mark" >&2 || true
fi
exit $status
