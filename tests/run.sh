#!/usr/bin/env bash
# The whole test suite from a fresh clone: bash tests/run.sh [pytest arguments]
# Installs what is missing into .venv (or uses the active virtual environment if that has everything), then runs pytest.
#
#     bash tests/run.sh                              everything
#     bash tests/run.sh tests/test_pool.py -k grace  a part
#     bash tests/run.sh --seed 17                    with other random data
#     bash tests/run.sh -n 0                         in one process, as a debugger wants it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DS_OPTIM_EXTRAS=test source launcher/install.sh || { echo "tests/run.sh: the installation failed" >&2; exit 1; }
# Ranks are processes; threads of theirs would only fight over the cores, and sums would depend on their number.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" TOKENIZERS_PARALLELISM=false
# Tests build their models from configs; nothing may be fetched.
export HF_HUB_OFFLINE=1
# A minute, once: a test that is cut off while DeepSpeed builds an operator would leave its lock behind for all others.
python tests/operators.py > /dev/null
# Two at a time: a test of several ranks waits for the slowest of them, and one of a launcher for imports.
exec python -m pytest --numprocesses 2 --dist worksteal "$@"
