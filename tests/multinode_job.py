"""A training of all optimizers, as a script for `deepspeed --hostfile` and as a function for the pool.

    deepspeed --hostfile FILE tests/multinode_job.py --output FILE [--first-stage N] [--optimizers NAME ...]

A real Llama, real gradients, different text on every rank. The result is a hash of every parameter after the last step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.deepspeed.names import json_names

OPTIMIZERS = tuple(json_names())
STEPS = 3
VOCABULARY = 61


def stage_of(optimizer: str, first: int) -> int:
    """ZeRO 1, 2 and 3 in turn over the optimizers, beginning with ``first``."""
    return 1 + (OPTIMIZERS.index(optimizer) + first - 1) % 3


def trained(optimizer: str, stage: int, seed: int = 0) -> dict[str, str]:
    """Train a small Llama on this process group; SHA-256 of every parameter's bytes, the same on every rank."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": optimizer, "params": {"lr": 1e-3, "weight_decay": 0.1}},
        },
    )
    text = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (2, 32), generator=text)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        found = {name: _hashed(parameter.detach()) for name, parameter in model.named_parameters()}
    engine.destroy()
    return found


def trained_all(first_stage: int, optimizers: Sequence[str] = OPTIMIZERS, seed: int = 0) -> dict[str, dict[str, str]]:
    """`trained` for each optimizer, by name."""
    return {name: trained(name, stage_of(name, first_stage), seed) for name in optimizers}


def _hashed(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    import deepspeed

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first-stage", type=int, default=1)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--local_rank", type=int)
    given = parser.parse_args()
    # DeepSpeed builds an operator with the path's `ninja`; another than last time would build it anew, for a minute.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    deepspeed.init_distributed(dist_backend="gloo")
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, os.uname().nodename)
    result = {"hosts": hosts, "parameters": trained_all(given.first_stage, given.optimizers)}
    if dist.get_rank() == 0:
        given.output.write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
