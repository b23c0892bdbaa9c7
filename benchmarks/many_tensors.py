"""The step over the hundreds of small tensors that FSDP2 hands over, against torch's fused AdamW on the same ones.

    python benchmarks/many_tensors.py [--rounds N] [--markdown docs/results/many_tensors.md]
    torchrun --nproc-per-node 2 benchmarks/many_tensors.py        # shards of two ranks, a thread each

A Llama of 24 layers is sharded by `fully_shard`; every contender updates the same DTensor parameters from the same
gradients, one step each in turn (who begins, changes), in one process. Reported are medians over the rounds and their
ratio to the unit, torch's fused AdamW on the DTensors. DTensor's dispatch is most of what the unit does, so its time on
the bare local tensors is shown beside. Python's share of a step is what it costs with hardly any elements per tensor.
Exit status 1 if AdamMini or Lion cost more than the unit, or Adan more than 1.7 of it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ds_optim
from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix

UNIT = "torch AdamW fused"
LIMITS = {"AdamMini": 1.0, "Lion": 1.0, "Adan": 1.7}
OURS = {name: cls.rule.streams for name, cls in optimizers().items() if not isinstance(cls.rule, WholeMatrix)}


def sharded_llama(hidden: int, vocabulary: int) -> nn.Module:
    """24 layers under FSDP2, with a gradient for every parameter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        grad = 0.01 * torch.randn(parameter.to_local().shape)
        parameter.grad = DTensor.from_local(
            grad, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return model


def contenders(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """A step of every contender on the model's parameters."""
    steps: dict[str, Callable[[], Any]] = {}
    steps[UNIT] = torch.optim.AdamW(model.parameters(), fused=True).step
    local = [nn.Parameter(parameter.to_local()) for parameter in model.parameters()]
    for mine, parameter in zip(local, model.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor)
        mine.grad = parameter.grad.to_local()
    steps["torch AdamW fused, local tensors"] = torch.optim.AdamW(local, fused=True).step
    steps["torch AdamW foreach"] = torch.optim.AdamW(model.parameters(), foreach=True).step
    for name in OURS:
        steps[f"ds_optim {name}"] = getattr(ds_optim, name)(model.named_parameters(), roles=model).step
    for step in steps.values():
        step()  # state is allocated, layouts are compared, kernels are built
        step()
    return steps


def medians(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each, one step each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    for _ in range(rounds):
        order.append(order.pop(0))
        for name, step in order:
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    """Run the benchmark; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    load = os.getloadavg()[0]
    model = sharded_llama(320, 5000)
    numel = sum(parameter.numel() for parameter in model.parameters())
    count = len([*model.parameters()])
    whole = medians(contenders(model), arguments.rounds)
    del model
    tiny = medians(contenders(sharded_llama(8, 64)), arguments.rounds)
    missed = [name for name, limit in LIMITS.items() if whole[f"ds_optim {name}"] > limit * whole[UNIT]]
    lines = [
        "# Many small tensors",
        "",
        f"`python benchmarks/many_tensors.py`: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {dist.get_world_size()} rank(s), torch {torch.__version__}; load average "
        f"before the run {load:.1f}.",
        "",
        f"A Llama of 24 layers under FSDP2: {count} DTensor parameters, {numel / 1e6:.1f} M elements in all, fp32. "
        f"Median over {arguments.rounds} rounds, one step of every contender per round in turn. `Python` is the same "
        "step on a model of the same 219 tensors with hardly any elements.",
        "",
        "| optimizer | ms | ratio | traffic | Python, ms | held to |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, seconds in whole.items():
        rule = name.removeprefix("ds_optim ") if name.startswith("ds_optim") else "AdamW"
        limit = LIMITS.get(rule)
        held = "" if limit is None else f"<= {limit:.1f}{'  MISSED' if rule in missed else ''}"
        lines.append(
            f"| {name} | {1e3 * seconds:.1f} | {seconds / whole[UNIT]:.2f} | {OURS[rule] / OURS['AdamW']:.2f} | "
            f"{1e3 * tiny[name]:.1f} | {held} |"
        )
    if dist.get_rank() == 0:
        print("\n".join(lines))
        if arguments.markdown:
            pages.write(arguments.markdown, "\n".join(lines) + "\n")
    dist.destroy_process_group()
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
