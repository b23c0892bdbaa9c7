"""Runs another example on ranks without accelerators, as it would run with them.

    deepspeed --num_gpus 2 examples/on_cpu.py examples/trainer_deepspeed.py --deepspeed examples/adan_auto.json
    torchrun --nproc_per_node 2 examples/on_cpu.py examples/trainer_torch.py --fsdp

Without accelerators Accelerate 1.15 takes each rank for a job of its own under DeepSpeed, and leaves FSDP out. While
the example runs, it is told to count the ranks, which then talk through gloo. Where there are accelerators, this adds
nothing.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


@contextmanager
def counting_ranks() -> Iterator[None]:
    """Inside, Accelerate sees ranks on CPUs."""
    prepare_backend, start = PartialState._prepare_backend, AcceleratorState.__init__
    settle = FullyShardedDataParallelPlugin.__post_init__

    @wraps(prepare_backend)
    def with_gloo(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        backend, kind = prepare_backend(self, *args, **kwargs)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return ("gloo", DistributedType.MULTI_CPU) if backend is None and several else (backend, kind)

    @wraps(start)
    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        state = PartialState(**{key: value for key, value in kwargs.items() if key in ("cpu", "backend")})
        if fsdp_plugin is not None and state.distributed_type is DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # the kinds of ranks for which it heeds the plugin
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    @wraps(settle)
    def without_a_device(self: Any) -> None:
        # The first is FSDP1's and asks for a device; transformers 4 leaves the second to `accelerate launch`.
        with patch.dict(os.environ, FSDP_SYNC_MODULE_STATES="false", FSDP_VERSION="2"):
            settle(self)

    with (
        patch.object(FullyShardedDataParallelPlugin, "__post_init__", without_a_device),
        patch.object(PartialState, "_prepare_backend", with_gloo),
        patch.object(AcceleratorState, "__init__", with_fsdp),
    ):
        yield


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with nullcontext() if torch.accelerator.is_available() else counting_ranks():
        runpy.run_path(sys.argv[0], run_name="__main__")
