"""Our Muon beside DeepSpeed's own: what each adds to a step on the wire, in products and in memory, and what it makes.

    python benchmarks/deepspeeds_muon.py [--ranks 2 4] [--markdown docs/results/deepspeeds_muon.md]

Real engines over gloo train two layers of a Llama of the 60M shape for three steps, at ZeRO 1, 2 and 3, in fp32, all
ranks on the same tokens, so that averaged gradients are those of one rank, with DeepSpeed's clipping at 1.0. Counted in
the third step, backward and all: bytes that a rank must send for the collectives that torch sees (of a ring), and
floating-point operations of matrix products, means over ranks. What AdamW takes in the same engine is subtracted: the
model's own, and ZeRO's. *Memory*: bytes of all tensors that live after the last step, AdamW's subtracted, on the
fullest rank. *Off*: how far the weights of matrices are from those of plain torch on one process that clips the
gradient and then takes Muon's step as it is published (fp32 products), in distances moved: 1 is not to move at all.
*Unclipped*: the same where nobody clips, which tells clipping too late from other products.

Both take the published step length (``adjust_lr="original"``), momentum 0.95, five quintic steps and a learning rate of
0.02. DeepSpeed's multiplies in bf16 or fp16, as its method wants, ours in fp32: some of *off* is that.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from processor import processor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pool import Pools

ROOT = Path(__file__).parents[1]
SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "ds_optim.AdamW", "params": {"lr": 3e-4, "weight_decay": 0.0}},
    "ours": {"type": "ds_optim.Muon", "params": {**SETTINGS, "adjust_lr": "original"}},
    "DeepSpeed's": {"type": "Muon", "params": SETTINGS},
}
CLIPPING = 1.0
STEPS = 3
SHARES = {  # of the bytes that torch is handed, what a rank must send of them on n ranks
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "broadcast_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
    "alltoall_": lambda n: (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: (n - 1) / n,
    "reduce_": lambda n: (n - 1) / n,
    "gather_": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


class Wire(TorchDispatchMode):
    """Adds up what this rank sends in collectives, and names those that it cannot count."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.unknown = 0.0, set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space == "c10d" and name not in ("barrier", "monitored_barrier_", "recv_"):
            if name in SHARES:
                whole = max(sum(_bytes(one) for one in tree_leaves(part)) for part in args)
                self.sent += SHARES[name](dist.get_world_size()) * whole
            else:
                self.unknown.add(name)
        return function(*args, **(kwargs or {}))


def _bytes(one: Any) -> int:
    return one.numel() * one.itemsize if isinstance(one, Tensor) else 0


def llama() -> nn.Module:
    """Two layers of the 60M shape, the same everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = json.loads((ROOT / "configs" / "models" / "llama_60m.json").read_text())
    return LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 2, "vocab_size": 512}))


def batches() -> list[Tensor]:
    """Tokens of every step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(512, (4, 64), generator=generator) for _ in range(STEPS)]


def matrices(model: nn.Module) -> list[str]:
    """What both take for matrices."""
    return [name for name, one in model.named_parameters() if one.dim() == 2 and "proj" in name]


def published(clipping: float) -> dict[str, Tensor]:
    """Weights of matrices after these steps in one process, as the equations have them: clipped, then averaged."""
    from reference.adamw import adamw
    from reference.muon import muon

    model = llama()
    listed = matrices(model)
    states: list[dict[str, dict[str, Tensor]]] = [{}, {}]
    for step, tokens in enumerate(batches(), 1):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), clipping)
        params = {name: one.detach().clone() for name, one in model.named_parameters()}
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        ours = {name: params[name] for name in listed}
        rest = {name: one for name, one in params.items() if name not in ours}
        muon(ours, grads, states[0], step, **{**SETTINGS, "adjust_lr": "original"})  # type: ignore[arg-type]
        adamw(rest, grads, states[1], step, lr=SETTINGS["lr"], betas=(0.9, 0.95), weight_decay=0.0)
        with torch.no_grad():
            for name, one in model.named_parameters():
                one.copy_({**ours, **rest}[name])
    return {name: one.detach().clone() for name, one in model.named_parameters() if name in listed}


def trained(kind: str, stage: int, clipping: float) -> dict[str, Any]:
    """What one engine sends, multiplies and keeps on this rank, and the matrices that it ends with."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = llama()
    zero: dict[str, Any] = {"stage": stage}
    if kind == "DeepSpeed's":
        zero["reduce_scatter"] = False  # which its ZeRO-3 demands
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": clipping,
            "zero_optimization": zero,
            "optimizer": copy.deepcopy(OPTIMIZERS[kind]),
        },
    )
    wire, flops = Wire(), FlopCounterMode(display=False)
    for step, tokens in enumerate(batches(), 1):
        if step == STEPS:
            with wire, flops:
                engine.backward(engine(input_ids=tokens, labels=tokens).loss)
                engine.step()
        else:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
    engine.optimizer.zero_grad()
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if isinstance(one, Tensor) and type(one).__name__ != "FakeTensor"
    }
    weights = {name: safe_get_full_fp32_param(one).clone() for name, one in engine.module.named_parameters()}
    report = {
        "sent": wire.sent,
        "unknown": sorted(wire.unknown),
        "flops": flops.get_total_flops(),
        "kept": sum(storages.values()),
        "weights": {name: weights[name] for name in matrices(llama())} if dist.get_rank() == 0 else {},
    }
    engine.destroy()
    return report


def build_deepspeeds_adam() -> None:
    """Which its Muon compiles where it starts: that takes longer than a rank may take to answer."""
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load()


def off(found: dict[str, Tensor], wanted: dict[str, Tensor], begin: dict[str, Tensor]) -> float:
    """The largest distance of a matrix from what was wanted, in distances moved."""
    return max(
        float((found[name].view_as(one) - one).norm() / (one - begin[name]).norm()) for name, one in wanted.items()
    )


def table(pools: Pools, ranks: Sequence[int]) -> list[str]:
    """One line for each number of ranks, stage and optimizer."""
    wanted, unclipped = published(CLIPPING), published(0.0)
    begin = {name: one.detach() for name, one in llama().named_parameters()}
    lines = [
        "| ranks | ZeRO | Muon | sent by a rank, MB | GFLOP of a rank | of all | memory, MB, most | off | unclipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in ranks:
        for stage in (1, 2, 3):
            reports = {kind: pools(count).run(trained, kind, stage, CLIPPING) for kind in OPTIMIZERS}
            unknown = {name for listed in reports.values() for one in listed for name in one["unknown"]}
            assert not unknown, f"not counted: {unknown}"
            base = reports["AdamW"]
            for kind in ("ours", "DeepSpeed's"):
                freely = pools(count).run(trained, kind, stage, 0.0)[0]["weights"]
                more = {
                    key: [one[key] - other[key] for one, other in zip(reports[kind], base, strict=True)]
                    for key in ("sent", "flops", "kept")
                }
                cells = (
                    f"{sum(more['sent']) / count / 1e6:.1f}",
                    f"{sum(more['flops']) / count / 1e9:.1f}",
                    f"{sum(more['flops']) / 1e9:.1f}",
                    f"{max(more['kept']) / 1e6:.1f}",
                    f"{off(reports[kind][0]['weights'], wanted, begin):.1e}",
                    f"{off(freely, unclipped, begin):.1e}",
                )
                lines.append(f"| {count} | {stage} | {kind} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return lines


def page(lines: Sequence[str]) -> str:
    """The result, with what it ran on."""
    import deepspeed

    made = (
        f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, deepspeed {deepspeed.__version__}, "
        f"{datetime.date.today()}"
    )
    said = (__doc__ or "").split("\n\n")
    return (
        "\n\n".join(
            [
                "# Our Muon beside DeepSpeed's own",
                f"`python benchmarks/deepspeeds_muon.py`. {made}.",
                *said[2:],
                "\n".join(lines),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Count, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--markdown", type=Path, help="where the page is written")
    given = parser.parse_args()
    build_deepspeeds_adam()
    with Pools() as pools:
        lines = table(pools, given.ranks)
    if given.markdown:
        pages.write(given.markdown, page(lines))


if __name__ == "__main__":
    main()
