"""How all optimizers scale: counted on the ranks at hand, planned for up to 1,024.

    python benchmarks/scaling.py [--markdown docs/results/scaling.md] [--only measured|planned|nothing]
    deepspeed --hostfile hosts benchmarks/scaling.py --measure --model configs/models/llama2_7b.json

Counted: real DeepSpeed engines of a small Llama on 1, 2 and 4 gloo ranks; what the optimizer's step and ZeRO itself
send, what the busiest rank multiplies, what the fullest one keeps, each beside what is predicted for that case.
Planned: the same quantities for large models, and the share of a training step that the optimizer takes on a machine
that the options describe. ``--measure`` counts and times on the ranks of the job that it is started in, and prints the
prediction for exactly these. Exit status 1 if state is not what was predicted to the byte, or a count is off by more
than 1 %.

``--markdown`` also writes a .json with everything and a .png beside the page; ``--only`` takes the rest from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pages

if "--measure" not in sys.argv:  # on a cluster its own accelerators count
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from rich.progress import track
from scaling_measured import gathered, measure
from scaling_page import OPTIMIZERS, draw, here_lines, page
from scaling_plan import LOOKED_AT, Assumptions, Planned, plan_scaling

from pool import Pools

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "configs" / "models"
OPTIONS: dict[str, dict[str, Any]] = {
    "Shampoo": {"refresh": "together", "start_preconditioning_step": 1},
    "SOAP": {"refresh": "together"},
}
"""For what is counted: no root or basis falls into the counted step, all of them into one of every ten timed ones."""
CASES = ((1, 2), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3))  # ranks, ZeRO stage
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
PLANNED = ("llama2_7b", "llama2_70b")
STAGES = (2, 3)  # an optimizer's layouts at 1 are those at 2
ROUNDS = 10  # a period of Shampoo's roots


def row(name: str, stage: int, ranks: int, found: Sequence[Mapping[str, Any]], predicted: Planned) -> dict[str, Any]:
    """What all ranks counted of one case, beside the prediction: pairs (counted, predicted)."""
    pairs = {
        "sent_mean": (sum(one["sent"] for one in found) / ranks, predicted.sent_mean),
        "sent_most": (max(one["sent"] for one in found), predicted.sent_most),
        "zero": (sum(one["zero"] for one in found) / ranks, predicted.zero_sent),
        "flops": (max(one["flops"] for one in found), predicted.products_most),
        "state": (max(one["state"] for one in found), predicted.state_most),
        "state_mean": (sum(one["state"] for one in found) / ranks, predicted.state_mean),
    }
    shares = {"share": sum(one["share"] for one in found) / ranks, "predicted_share": predicted.share}
    seconds = sum(one["seconds"] for one in found) / ranks
    times = {"seconds": seconds, "predicted_seconds": predicted.step_seconds}
    return {"optimizer": name, "stage": stage, "ranks": ranks, **pairs, **shares, **times}


def deviation(pair: Sequence[float]) -> float:
    """(predicted - counted) / counted; 0 where both are nothing."""
    counted, predicted = pair
    if not counted:
        return math.inf if predicted else 0.0
    return (predicted - counted) / counted


def holds(one: Mapping[str, Any]) -> bool:
    """Whether a row's state is what was predicted, and its counts are within 1 %."""
    exact = one["optimizer"] != "AdamMini" or one["ranks"] <= LOOKED_AT  # of more, the fullest may not be among them
    pairs = ("sent_mean", "sent_most", "zero", "flops", "state", "state_mean")
    return (not exact or one["state"][0] == one["state"][1]) and all(abs(deviation(one[key])) <= 0.01 for key in pairs)


def measured(pools: Pools, model: Mapping[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Every optimizer in every case, all of a case in one job."""
    rows = []
    optimizers = {name: OPTIONS.get(name, {}) for name in OPTIMIZERS}
    for ranks, stage in track(CASES, description="counting"):
        reports = pools(ranks).run(measure, dict(model), optimizers, stage, tokens, ROUNDS)
        for name, options in optimizers.items():
            predicted = plan_scaling(model, name, stage, ranks, options=options, on_cpu=True)
            rows.append(row(name, stage, ranks, [one[name] for one in reports], predicted))
    return rows


def planned(models: Iterable[str], ranks: Iterable[int], assumptions: Assumptions) -> dict[str, list[dict[str, Any]]]:
    """Every optimizer, stage and number of ranks, by model, with the seconds that the plan itself took."""
    found: dict[str, list[dict[str, Any]]] = {}
    cases = [(m, o, s, r) for m in models for o in OPTIMIZERS for s in STAGES for r in ranks]
    for model, optimizer, stage, count in track(cases, description="planning"):
        started = time.perf_counter()
        one = plan_scaling(shape(MODELS / f"{model}.json"), optimizer, stage, count, assumptions)
        derived = {"share": one.share, "zero_sent": one.zero_sent, "step_seconds": one.step_seconds}
        derived["planning_seconds"] = time.perf_counter() - started
        found.setdefault(model, []).append({**dataclasses.asdict(one), **derived})
    return found


def measured_here(arguments: argparse.Namespace, assumptions: Assumptions) -> int:
    """Count and time on the ranks of this job; returns the exit status."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has just deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed()
    ranks, model = dist.get_world_size(), shape(arguments.model)
    tokens = arguments.measured_tokens
    about = dataclasses.replace(assumptions, tokens=tokens)
    rows = []
    for stage in arguments.stage:
        for name in arguments.optimizer:
            options = OPTIONS.get(name, {})
            reports = gathered(measure(model, {name: options}, stage, tokens, ROUNDS)[name])
            if dist.get_rank() == 0:
                on_cpu = not torch.accelerator.is_available()
                predicted = plan_scaling(model, name, stage, ranks, about, options, on_cpu=on_cpu)
                rows.append(row(name, stage, ranks, reports, predicted))
            dist.barrier()
    status = 0
    if dist.get_rank() == 0:
        good = all(map(holds, rows))
        lines = here_lines(rows, deviation, with_times=torch.accelerator.is_available())
        if torch.accelerator.is_available():
            lines += ["", *[f"{name} = {value:g}: {meaning}" for name, value, meaning in about.listed]]
        print("\n".join([f"{arguments.model.stem}, {ranks} ranks, {tokens:,} tokens per rank and step", "", *lines]))
        print("holds" if good else "DOES NOT HOLD: see the docstring for what is asked")
        status = 0 if good else 1
    dist.destroy_process_group()
    return status


def shape(path: Path) -> dict[str, Any]:
    """A model config."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def provenance() -> dict[str, str]:
    """Of a part of the record."""
    return {
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}",
    }


def parser() -> argparse.ArgumentParser:
    """The command line; every assumption is an option."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--markdown", type=Path, help="where to write the page, and .json and .png beside it")
    made.add_argument("--only", choices=("measured", "planned", "nothing"), help="the rest is taken from the .json")
    made.add_argument("--measure", action="store_true", help="on the ranks of this job (deepspeed, torchrun)")
    made.add_argument("--model", type=Path, default=MODELS / "llama_small.json", help="what is measured, a config.json")
    made.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="with --measure")
    made.add_argument("--stage", nargs="+", type=int, choices=(1, 2, 3), default=[1, 3], help="with --measure")
    made.add_argument("--measured-tokens", type=int, default=64, help="per rank and step, where it is measured (64)")
    made.add_argument("--planned-model", nargs="+", default=list(PLANNED), help="names in configs/models")
    made.add_argument("--planned-ranks", nargs="+", type=int, default=list(RANKS), help="(8 to 1,024)")
    machine = made.add_argument_group("the machine that times are planned for")
    for one in dataclasses.fields(Assumptions):
        option, kind = f"--{one.name.replace('_', '-')}", type(one.default)
        machine.add_argument(option, type=kind, default=one.default, help=f"{one.metadata['about']} ({one.default:g})")
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    return made


def main(pools: Pools) -> int:
    """Count, plan, print and write; returns the exit status."""
    arguments = parser().parse_args()
    try:
        assumptions = Assumptions(**{one.name: getattr(arguments, one.name) for one in dataclasses.fields(Assumptions)})
    except ValueError as error:
        print(f"scaling.py cannot start: {error}", file=sys.stderr)
        return 2
    if arguments.measure:
        return measured_here(arguments, assumptions)
    kept = arguments.markdown and arguments.markdown.with_suffix(".json")
    record: dict[str, Any] = {}
    if arguments.only and kept and kept.exists():
        record = json.loads(kept.read_text(encoding="utf-8"))
    if arguments.only in (None, "measured"):
        tokens = arguments.measured_tokens
        rows = measured(pools, shape(arguments.model), tokens)
        about = {"model": arguments.model.stem, "tokens": tokens, "rounds": ROUNDS}
        record["measured"] = {**provenance(), **about, "rows": rows}
    if arguments.only in (None, "planned"):
        started = time.perf_counter()
        models = planned(arguments.planned_model, arguments.planned_ranks, assumptions)
        about = {"assumptions": assumptions.listed, "seconds": time.perf_counter() - started}
        record["planned"] = {**provenance(), **about, "models": models}
    text = page(record, deviation)
    print(text)
    good = all(map(holds, record.get("measured", {}).get("rows", [])))
    print("holds" if good else "DOES NOT HOLD: see the docstring for what is asked")
    if arguments.markdown:
        kept.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
        pages.write(arguments.markdown, text)
        if "planned" in record:
            draw(record["planned"]["models"], arguments.markdown.with_suffix(".png"))
    return 0 if good else 1


if __name__ == "__main__":
    with Pools() as _pools:
        sys.exit(main(_pools))
