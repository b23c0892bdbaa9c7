"""What Shampoo and SWAN move between ranks: counted in real steps, and computed for models nobody runs on two cores.

    python benchmarks/communication.py [--markdown docs/results/communication.md] [--skip-arithmetic]

Counted: a Llama of the SWAN paper's 60M shape, two layers of it, in real DeepSpeed engines at ZeRO 1, 2 and 3 on 2 and
4 ranks; every message's elements are counted as it is sent. The same over two tensor-parallel ranks (AutoTP), and a
small Mixtral whose experts are spread over two (AutoEP). The floor is what equal slices of every parameter make each
rank move on average: (N-1)/N * P/N elements in, and the same out. Computed: from shapes and layouts alone, as
``ds-optim estimate`` does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from rich.progress import track

from ds_optim.blueprint import blueprint, meta_model
from ds_optim.deepspeed.predict import predicted_layouts
from ds_optim.sharding.plan import imbalance
from ds_optim.stepping.owned_blocks import OwnedBlocks
from parallel import engine_alone
from pool import Pools

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, dict[str, Any]] = {"Shampoo": {"max_preconditioner_dim": 256}, "SWAN": {}}
STAGES = (1, 2, 3)
SPREAD: dict[str, dict[str, Any]] = {
    "ZeRO": {},
    "AutoTP": {"tensor_parallel": {"autotp_size": 2}},
    "AutoEP": {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"}},
}
RANKS = (2, 4)
COMPUTED = [("llama2_7b", (8, 64, 1024)), ("llama2_70b", (8, 64, 1024))]


def counted(optimizer: str, stage: int, spread: str) -> dict[str, Any]:
    """Elements that this rank sent and received in the second step, and the plan's own figures."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = json.loads((ROOT / "configs" / "models" / "llama_60m.json").read_text())
    shape = {**shape, "num_hidden_layers": 2, "vocab_size": 512}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": OPTIONS[optimizer]},
        **SPREAD[spread],
    }
    if "expert_parallel" in config:
        shape = {**shape, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    with engine_alone(model, config) as engine:
        return counted_in(engine)


def counted_in(engine: Any) -> dict[str, Any]:
    """The same of an engine."""
    tokens = torch.arange(16).view(1, 16)
    basic = engine.basic_optimizer
    for step in range(2):
        if step:
            basic.stepper.traffic.sent = basic.stepper.traffic.received = basic.stepper.traffic.messages = 0
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    costs = basic.plan.costs
    rank = torch.distributed.get_rank()
    return {
        "sent": basic.stepper.traffic.sent,
        "received": basic.stepper.traffic.received,
        "messages": basic.stepper.traffic.messages,
        "planned": (int(costs.sent[rank]), int(costs.received[rank])),
        "floor": costs.floor,
        "straddling": costs.straddling,
        "elements": costs.matrix_elements,
    }


def counted_table(pools: Pools) -> tuple[list[str], bool]:
    """The counted figures as Markdown, and whether stage 3 keeps to 1.05 of the floor and counts equal the plan's."""
    lines = [
        "| optimizer | ZeRO | ranks | cut by | floor, MB | sent, mean | sent, most | mean / floor | unavoidable | "
        "moved for balance | messages |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    good = True
    cases = [(ranks, optimizer, stage, "ZeRO") for ranks in RANKS for optimizer in OPTIONS for stage in STAGES]
    cases += [(4, optimizer, stage, cut) for cut in ("AutoTP", "AutoEP") for optimizer in OPTIONS for stage in STAGES]
    for ranks, optimizer, stage, cut in track(cases, description="counting"):
        reports = pools(ranks).run(counted, optimizer, stage, cut)
        good &= all((one["sent"], one["received"]) == one["planned"] for one in reports)
        moved = [(one["sent"] + one["received"]) / 2 for one in reports]
        mean, floor = sum(moved) / ranks, reports[0]["floor"]
        straddling = reports[0]["straddling"] / ranks
        if stage == 3 and cut == "ZeRO":
            good &= mean <= 1.05 * floor
        megabytes = 4 / 1e6
        lines.append(
            f"| {optimizer} | {stage} | {ranks} | {cut} | {floor * megabytes:.2f} | {mean * megabytes:.2f} | "
            f"{max(moved) * megabytes:.2f} | {mean / floor:.2f} | {straddling * megabytes:.2f} | "
            f"{(mean - straddling) * megabytes:.2f} | {reports[0]['messages']} |"
        )
    return lines, good


def computed_table() -> tuple[list[str], bool]:
    """The computed figures as Markdown, and whether costs are even wherever there are ten blocks per rank."""
    lines = [
        "| model | optimizer | ZeRO | ranks | blocks per rank | flops, max/mean | worst step | state | with waiting | "
        "moved / floor | GB sent by a rank, most | seconds to plan |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    good = True
    cases = [
        (model, ranks, optimizer, stage)
        for model, sizes in COMPUTED
        for ranks in sizes
        for optimizer in ("Shampoo", "SWAN")
        for stage in (1, 3)
    ]
    for model, ranks, optimizer, stage in track(cases, description="computing"):
        config = json.loads((ROOT / "configs" / "models" / f"{model}.json").read_text())
        started = time.perf_counter()
        about = blueprint(meta_model(config), {}, optimizer, {})
        made = about.optimizer.predicted(predicted_layouts(about.groups, stage, ranks), 0)
        assert isinstance(made, OwnedBlocks)
        (plan,) = made.plans.listed
        seconds = time.perf_counter() - started
        costs = plan.costs
        per_rank = len(plan.blocks) / ranks
        even = imbalance(costs.flops), costs.worst_step, imbalance(costs.state_bytes)
        if per_rank >= 10:
            good &= max(even) <= 1.10
        most = float((costs.sent + costs.received).max()) / 2 * 4 / 1e9
        lines.append(
            f"| {model} | {optimizer} | {stage} | {ranks} | {per_rank:.1f} | {even[0]:.2f} | {even[1]:.2f} | "
            f"{even[2]:.2f} | {plan.waiting(made.options.exchange_bucket_size):.2f} | "
            f"{costs.sent.mean() / costs.floor:.2f} | {most:.3f} | {seconds:.0f} |"
        )
    return lines, good


def main() -> int:
    """Count, compute and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--skip-arithmetic", action="store_true", help="only what is counted in real steps")
    arguments = parser.parse_args()
    lines, good = counted_table(_pools)
    text = [
        "# What travels",
        "",
        "`python benchmarks/communication.py`, "
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}.",
        "",
        "## Counted in real engines",
        "",
        "fp32 MB that a rank sends in a step, gradients to owners and updates back; it receives as much on average.",
        "*Floor*: equal slices of every parameter and one owner per matrix, twice (N-1)/N of P/N elements.",
        "*Unavoidable*: what would move if whoever holds most of a block owned it; the rest moves so that flops, state",
        "and refreshes are even. At ZeRO 1 and 2 a rank holds most matrices whole: the floor is only for comparison.",
        "*AutoTP*: over two ranks, and ZeRO over two more; what tensor parallelism cuts must come together. *AutoEP*:",
        "a Mixtral of four experts, two on each rank.",
        "",
        *lines,
        "",
    ]
    if not arguments.skip_arithmetic:
        lines, even = computed_table()
        good &= even
        text += [
            "## Computed from shapes",
            "",
            "Shampoo with blocks of 1024 and a refresh every 10 steps; SWAN with whole matrices. *Worst step*: of all",
            "residues of the refresh schedule, the largest max/mean of the ranks' flops. With fewer blocks than ranks",
            "(SWAN at 1,024 ranks) the ranks without a matrix wait: that is a limit of one owner per matrix. *With",
            "waiting*: a step's arithmetic over a fair share of it, if every bucket waits for its busiest owner.",
            "",
            *lines,
            "",
        ]
    print("\n".join(text))
    print("holds" if good else "DOES NOT HOLD: see the docstring for what is asked")
    if arguments.markdown:
        pages.write(arguments.markdown, "\n".join(text))
    return 0 if good else 1


if __name__ == "__main__":
    with Pools() as _pools:
        sys.exit(main())
