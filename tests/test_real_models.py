"""Real training of transformers' models, cut and spread: the losses of the unsharded model, within rounding.

Gradients are the models' own, so that sums are made in another order; everything else is exact in the tests of given
gradients.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optim.optimizers.registry import optimizers
from expected import add_rounding
from parallel import engine_alone, llama, mixtral
from pool import Pools

STEPS, RATE = 6, 5e-3
MOVED = 3  # runs whose gradients are beside by rounding
OPTIONS = {"Shampoo": {"precondition_frequency": 1}}  # names decide when a block refreshes
MODELS = {"llama": lambda: llama(False), "tied llama": lambda: llama(True), "mixtral": mixtral}


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(step))


def losses(called: Any, backward: Any, step: Any) -> list[float]:
    found = []
    for index in range(STEPS):
        loss = called(input_ids=tokens_of(index), labels=tokens_of(index)).loss
        backward(loss)
        step()
        found.append(float(loss.detach()))
    return found


def made(optimizer: str, model: nn.Module) -> Any:
    return optimizers()[optimizer](model.named_parameters(), lr=RATE, roles=model, **OPTIONS.get(optimizer, {}))


@cache
def unsharded(name: str, optimizer: str, moved: int = 0) -> list[float]:
    """One process's losses; ``moved``: a seed of the rounding that is added to its gradients."""
    torch.manual_seed(0)
    model = MODELS[name]()
    ours, generator = made(optimizer, model), torch.Generator().manual_seed(moved)

    def step() -> None:
        if moved:
            add_rounding(model, generator)
        ours.step()
        ours.zero_grad()

    return losses(model, lambda loss: loss.backward(), step)


@cache
def drift(name: str, optimizer: str) -> list[float]:
    """How far rounding alone takes the losses of one process apart: SOAP turns directions of no gradient by it."""
    wanted = unsharded(name, optimizer)
    others = [unsharded(name, optimizer, moved) for moved in range(1, MOVED + 1)]
    return [max(abs(one[step] / wanted[step] - 1) for one in others) for step in range(STEPS)]


def test_no_other_rule_ends_so_near() -> None:
    for name in MODELS:
        for one, two in itertools.permutations(optimizers(), 2):
            if (name, {one, two}) != ("mixtral", {"Muon", "NorMuon"}):  # which differ by 1e-5
                assert not near(unsharded(name, one), name, two), (name, one, two)


def near(found: list[float], name: str, optimizer: str) -> bool:
    """Whether losses are those of the unsharded model but for rounding."""
    wanted = zip(found, unsharded(name, optimizer), drift(name, optimizer), strict=True)
    return all(abs(one - two) <= (2e-5 + 2 * apart) * abs(two) for one, two, apart in wanted)


def by_plan(folder: str, optimizer: str) -> list[float]:
    """A job: the model over all ranks, as its own ``tp_plan`` cuts it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", dtype=torch.float32, attn_implementation="eager"
    )
    ours = made(optimizer, model)

    def step() -> None:
        ours.step()
        ours.zero_grad()

    return losses(model, lambda loss: loss.backward(), step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name.replace(" ", "_")))
        make().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*(("llama", name) for name in optimizers()), *(("mixtral", name) for name in optimizers())],
)
def test_transformers_own_tensor_parallelism(pool: Pools, saved: dict[str, str], name: str, optimizer: str) -> None:
    for found in pool(2).run(by_plan, saved[name], optimizer):
        assert near(found, name, optimizer), (found, unsharded(name, optimizer), drift(name, optimizer))


def in_engine(name: str, optimizer: str, settings: dict[str, Any]) -> list[float]:
    """A job: the same model in a DeepSpeed engine."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": f"ds_optim.{optimizer}", "params": {"lr": RATE, **OPTIONS.get(optimizer, {})}},
        "ds_optim": {"no_decay": []},
        **settings,
    }
    with engine_alone(MODELS[name](), config) as engine:
        return losses(engine, engine.backward, engine.step)


SETTINGS = {
    "slices": {"tensor_parallel": {"autotp_size": 2}},
    "stacks": {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"}},
}
ENGINES = [
    *(("llama", "slices", stage, name) for stage, name in enumerate(("AdamMini", "Shampoo", "Muon", "SOAP"))),
    *(("tied llama", "slices", stage, name) for stage, name in enumerate(("SWAN", "NorMuon", "AdamW", "AdamMini"))),
    *(("mixtral", "stacks", stage, name) for stage, name in enumerate(("Muon", "AdamMini", "Shampoo", "AdamMini"))),
    *(("mixtral", "stacks", stage, name) for stage, name in enumerate(("Lion", "SWAN", "SOAP", "NorMuon"))),
]


@pytest.mark.parametrize(("name", "settings", "stage", "optimizer"), ENGINES)
def test_deepspeeds_tensor_and_expert_parallelism(
    pool: Pools, name: str, settings: str, stage: int, optimizer: str
) -> None:
    config = {**SETTINGS[settings], "zero_optimization": {"stage": stage}}
    for found in pool(4).run(in_engine, name, optimizer, config):
        assert near(found, name, optimizer), (found, unsharded(name, optimizer), drift(name, optimizer))
