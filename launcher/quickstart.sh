#!/usr/bin/env bash
# Installs everything and trains a small Llama on two processes, with ZeRO-2, bf16 and Adam-mini:
#
#     bash launcher/quickstart.sh                                       about five minutes on two cores, after installation
#     bash launcher/quickstart.sh --optimizer lion                      or adamw, adan, adam_mini, shampoo, swan, muon, normuon, soap
#     bash launcher/quickstart.sh --text my_notes/ --steps 500          anything else goes to launcher/train.py (see --help)
#
# It ends with a page about where the memory went (runs/quickstart/report.html; --memory-report DIR puts it elsewhere).
# Needs python3, pip and g++. NUM_PROCESSES, MASTER_PORT, OMP_NUM_THREADS and DS_ACCELERATOR may be set from outside.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v g++ > /dev/null || { echo "quickstart: g++ is missing (Debian: apt-get install g++)" >&2; exit 1; }
source "$ROOT/launcher/install.sh" || { echo "quickstart: the installation failed" >&2; exit 1; }

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" -gt 0 ]; then
    NUM_PROCESSES=${NUM_PROCESSES:-$((GPUS < 2 ? GPUS : 2))}
else
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    NUM_PROCESSES=${NUM_PROCESSES:-2}
fi
# The processes share the cores; more threads than cores would only slow them down.
THREADS=$(($(nproc) / NUM_PROCESSES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}
# Two jobs on one machine must not meet on DeepSpeed's fixed default port.
MASTER_PORT=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

echo "Starting $NUM_PROCESSES processes. The first start builds a small DeepSpeed extension and the optimizer's kernels, which takes about a minute."
# --quiet: the launcher's own log; the training script's lines are not affected.
exec deepspeed --quiet --num_gpus "$NUM_PROCESSES" --master_port "$MASTER_PORT" "$ROOT/launcher/train.py" \
    --memory-report "$ROOT/runs/quickstart" "$@"
