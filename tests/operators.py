"""Builds what DeepSpeed builds on first use, before any test: one that is cut off in it would leave its lock behind.

python tests/operators.py
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

if __name__ == "__main__":
    from ds_optim import extension_builds

    extension_builds.use_own_folder()

    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
