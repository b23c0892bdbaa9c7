"""What DeepSpeed offers beside ZeRO: our optimizers go with it as torch's AdamW does, or refuse it by name.

The control is the same script with `torch.optim.AdamW` in the JSON; `ds_optim.AdamW` must end where it does. The others
are compared with a run without the feature, or with themselves alone in one process on averaged gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import ds_optim
from ds_optim.releases import DEEPSPEED, TORCH
from engines import able_to_gather
from pool import Pools

OURS = {"ds_optim.AdamW": {}, "AdamMini": {}, "Shampoo": {"max_preconditioner_dim": 8, "precondition_frequency": 2}}
CONTROL = "AdamW"
TOLERANCE = {"ds_optim.AdamW": 1e-6, "AdamMini": 1e-6, "Shampoo": 2e-4}
"""Where gradients are summed in another order: roots of factors turn one unit in the last place into more."""
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
RATE = 1e-2
Weights = dict[str, Tensor]


class Small(nn.Module):
    """An embedding, matrices, a norm, and a head that only some forward passes use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 5)
        self.late = nn.Linear(9, 3, bias=False)

    def forward(self, tokens: Tensor, late: bool = True) -> Tensor:
        hidden = self.norm(torch.tanh(self.up(self.embed(tokens))))
        loss = self.down(hidden).float().square().mean()
        return loss + self.late(hidden).float().square().mean() if late else loss


class Experts(nn.Module):
    """Three experts, of which a forward pass uses those that its tokens chose."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, hidden: Tensor, chosen: Sequence[int]) -> Tensor:
        return sum((self.experts[index](hidden) for index in chosen), torch.zeros_like(hidden))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mixture = Experts()
        self.down = nn.Linear(6, 5)

    def forward(self, tokens: Tensor, chosen: Sequence[int]) -> Tensor:
        hidden = self.embed(tokens)
        return self.down(torch.tanh(self.mixture(hidden, chosen) + hidden)).square().mean()


def tokens_of(index: int, rank: int) -> Tensor:
    return torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(100 * index + rank))


def made(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return cls()


def start(
    name: str,
    stage: int,
    model: nn.Module,
    zero: dict[str, Any] | None = None,
    *,
    groups: Any = None,
    **extra: Any,
) -> Any:
    """An engine for a model; ``training_data`` among the extras goes to DeepSpeed, the rest into the JSON."""
    import deepspeed

    options = OURS.get(name, {"torch_adam": True})
    arguments = {"training_data": extra.pop("training_data", None), "model_parameters": groups}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": name, "params": {"lr": RATE, "weight_decay": 0.0, **options}},
        **extra,
    }
    engine, *others = deepspeed.initialize(model=model, config=config, **arguments)
    return able_to_gather(engine), *others


def weights_of(model: nn.Module) -> Weights:
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().float().clone()
    return found


def step(engine: Any, index: int) -> None:
    engine.backward(engine(tokens_of(index, dist.get_rank())))
    engine.step()


def far(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((values - other[name]).abs().max()) for name, values in one.items())


def alone(
    optimizer: str, model: nn.Module, losses: Callable[[nn.Module, int, int], list[Tensor]], steps: int
) -> Weights:
    """An optimizer in one process, on the gradients of two ranks averaged; a parameter that nobody used has zero.

    Args:
        losses: what a rank's backward passes of a step begin with, from (model, step, rank).
    """
    cls: Any = getattr(ds_optim, optimizer.removeprefix("ds_optim."))
    one = cls(model.named_parameters(), lr=RATE, weight_decay=0.0, roles=model, **OURS[optimizer])
    for index in range(steps):
        one.zero_grad()
        for rank in range(2):
            for loss in losses(model, index, rank):
                (loss / 2).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        one.step()
    return weights_of(model)


# -- settings, and hands on weights --------------------------------------------------------------------------------


def plain(optimizer: str, stage: int, folder: str, zero: dict[str, Any]) -> Weights:
    model = made(Small)
    engine, *_ = start(optimizer, stage, model, zero)
    for index in range(4):
        step(engine, index)
    engine.destroy()
    return weights_of(model)


def watched(optimizer: str, stage: int, folder: str, zero: dict[str, Any]) -> Weights:
    """The same under monitors, timers and the flops profiler, with an evaluation of other weights after each step."""
    import deepspeed

    model = made(Small)
    monitor = {"enabled": True, "output_path": folder, "job_name": f"{optimizer} {stage}"}
    profiler = {"enabled": True, "profile_step": 1, "output_file": f"{folder}/flops.txt"}
    extra = {"csv_monitor": monitor, "flops_profiler": profiler, "steps_per_print": 1, "wall_clock_breakdown": True}
    engine, *_ = start(optimizer, stage, model, zero, **extra)
    parameters = list(model.parameters())
    for index in range(4):
        step(engine, index)
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=stage == 3):
            kept = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.mul_(0.5)
        with torch.no_grad():
            engine(tokens_of(99, dist.get_rank()))
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=stage == 3):
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.data.copy_(values)
    engine.destroy()
    return weights_of(model)


def handled(optimizer: str, stage: int, folder: str, zero: dict[str, Any]) -> Weights:
    """A learning rate per group; fp32 weights that are set; an edit of model weights, over which the master wins."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    model = made(Small)
    slow = [model.embed.weight, *model.norm.parameters()]
    others = [one for one in model.parameters() if all(one is not other for other in slow)]
    engine, *_ = start(optimizer, stage, model, zero, groups=[{"params": slow, "lr": 0.0}, {"params": others}])
    before = weights_of(model)
    for index in range(2):
        step(engine, index)
    assert torch.equal(weights_of(model)["embed.weight"], before["embed.weight"])
    engine.optimizer.param_groups[0]["lr"] = RATE
    if stage:
        safe_set_full_fp32_param(model.up.weight, torch.full((9, 6), 0.25))
        with deepspeed.zero.GatheredParameters([model.down.weight], modifier_rank=0, enabled=stage == 3):
            model.down.weight.data.zero_()
    step(engine, 2)
    if stage:
        assert float((weights_of(model)["up.weight"] - 0.25).abs().max()) < 5 * RATE
        assert float((weights_of(model)["down.weight"] - before["down.weight"]).abs().max()) < 10 * RATE
        assert torch.equal(weights_of(model)["down.weight"], safe_get_full_fp32_param(model.down.weight))
    step(engine, 3)
    assert not torch.equal(weights_of(model)["embed.weight"], before["embed.weight"])
    engine.destroy()
    return weights_of(model)


def autocast(optimizer: str, stage: int, folder: str, zero: dict[str, Any]) -> Weights:
    model = made(Small)
    engine, *_ = start(optimizer, stage, model, zero, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    for index in range(4):
        step(engine, index)
    engine.destroy()
    return weights_of(model)


def accumulated(optimizer: str, stage: int, folder: str, zero: dict[str, Any]) -> Weights:
    """Backward passes as many as the user likes, then one step (not at ZeRO-3, where DeepSpeed's sum is wrong).

    Before 0.19.4 this can be had at ZeRO-0 alone.
    """
    model = made(Small)
    engine, *_ = start(optimizer, stage, model, zero, managed_gradient_accumulation=False)
    for index in range(3):
        for micro in range(3):
            engine.backward(engine(tokens_of(3 * index + micro, dist.get_rank())))
        engine.step()
    engine.destroy()
    return weights_of(model)


FEATURES = (plain, watched, handled, autocast, accumulated)


def all_features(stage: int, folder: str) -> dict[str, dict[str, Weights]]:
    return {
        feature.__name__: {
            optimizer: feature(optimizer, stage, folder, {})
            for optimizer in (CONTROL, *OURS)
            if not (feature is watched and optimizer == CONTROL)
        }
        for feature in FEATURES
        if not (feature is accumulated and (stage == 3 or (stage and DEEPSPEED.is_before("0.19.4"))))
    }


def three_backward_passes(model: nn.Module, index: int, rank: int) -> list[Tensor]:
    return [model(tokens_of(3 * index + micro, rank)) for micro in range(3)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_settings_and_edits_do_what_they_do_to_adamw(pool: Pools, stage: int, tmp_path: Path) -> None:
    found, _ = pool(2).run(all_features, stage, str(tmp_path))
    for feature, ends in found.items():
        assert far(ends["ds_optim.AdamW"], ends.get(CONTROL, found["plain"][CONTROL])) <= 1e-6, feature
        for optimizer in OURS:
            if feature == "watched":
                assert far(ends[optimizer], found["plain"][optimizer]) == 0, optimizer
            elif feature == "accumulated":
                expected = alone(optimizer, made(Small), three_backward_passes, 3)
                assert far(ends[optimizer], expected) <= TOLERANCE[optimizer], optimizer
            elif feature != "plain":
                assert far(ends[optimizer], found["plain"][optimizer]) > 0, (feature, optimizer)
    for optimizer in OURS:
        rates = (tmp_path / f"{optimizer} {stage}" / "Train_Samples_lr.csv").read_text().splitlines()
        assert [float(row.split(",")[1]) for row in rates[1:]] == [RATE] * 4  # below a heading
    assert "params per GPU" in (tmp_path / "flops.txt").read_text()


ZERO_PLUS_PLUS = {"hpZ": {"zero_hpz_partition_size": 2}, "parameters": {"offload_param": {"device": "cpu"}}}


def kept_elsewhere() -> dict[str, dict[str, Weights]]:
    """ZeRO-3 with its parameters in other places, none of which may change a bit."""
    places = {"plain": {}, **ZERO_PLUS_PLUS, "both": {**OFFLOAD, **ZERO_PLUS_PLUS["parameters"]}}
    return {name: {optimizer: plain(optimizer, 3, "", zero) for optimizer in OURS} for name, zero in places.items()}


def test_where_zero_3_keeps_parameters_changes_nothing(pool: Pools) -> None:
    found, _ = pool(2).run(kept_elsewhere)
    for name, ends in found.items():
        for optimizer in OURS:
            assert far(ends[optimizer], found["plain"][optimizer]) == 0, (name, optimizer)


# -- several backward passes, several ranks, several engines --------------------------------------------------------

USES = ((True, True), (False, False), (False, True), (True, True))  # of `late`, by step and backward pass
CHOSEN = (((0, 1), (1, 2)), ((1,), (1,)), ((2,), (0,)), ((0,), (0, 1)))  # experts, by step and rank


def coalesced_losses(model: nn.Module, index: int, rank: int) -> list[Tensor]:
    return [model(tokens_of(2 * index + micro, rank), late) for micro, late in enumerate(USES[index])]


def one_loss_twice(model: nn.Module, index: int, rank: int) -> list[Tensor]:
    return [model(tokens_of(2 * index, rank), USES[index][0])] * 2


def coalesced(optimizer: str, stage: int, zero: dict[str, Any], losses: Any) -> Weights:
    model = made(Small)
    engine, *_ = start(optimizer, stage, model, zero)
    for index in range(len(USES)):
        with engine.coalesce_grad_reduction():
            *first, last = losses(engine, index, dist.get_rank())
            for loss in first:
                engine.backward(loss, retain_graph=loss is last)
            engine.backward(last)
        engine.step()
    engine.destroy()
    return weights_of(model)


def all_coalesced(stage: int, zero: dict[str, Any]) -> list[dict[str, Weights]]:
    # A graph cannot be kept at ZeRO-3: DeepSpeed takes the weights away that it goes back through.
    passes = [coalesced_losses] if stage == 3 else [coalesced_losses, one_loss_twice]
    return [{optimizer: coalesced(optimizer, stage, zero, losses) for optimizer in OURS} for losses in passes]


COALESCED = [] if DEEPSPEED.is_before("0.19.1") else [(1, {}), (2, OFFLOAD), (3, {}), (3, OFFLOAD)]


@pytest.mark.parametrize(("stage", "zero"), COALESCED, ids=str)
def test_coalesced_gradients_are_the_sum_of_what_their_passes_used(
    pool: Pools, stage: int, zero: dict[str, Any]
) -> None:
    found, _ = pool(2).run(all_coalesced, stage, zero)
    for optimizer in OURS:
        assert (
            far(found[0][optimizer], alone(optimizer, made(Small), coalesced_losses, len(USES))) <= TOLERANCE[optimizer]
        ), optimizer
        if len(found) > 1:  # a graph that is gone back through twice gives its gradient twice
            expected = alone(optimizer, made(Small), lambda *at: [2 * one_loss_twice(*at)[0]], len(USES))
            assert far(found[1][optimizer], expected) <= TOLERANCE[optimizer], optimizer


def mixture(zero: dict[str, Any]) -> dict[str, Weights]:
    """Each rank uses other experts, some nobody: their parent must be a leaf of ZeRO-3, else ranks wait for ever."""
    import deepspeed

    found = {}
    for optimizer in OURS:
        model = made(Mixture)
        deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        engine, *_ = start(optimizer, 3, model, zero)
        for index, chosen in enumerate(CHOSEN):
            engine.backward(engine(tokens_of(index, dist.get_rank()), chosen[dist.get_rank()]))
            engine.step()
        found[optimizer] = weights_of(model)
        engine.destroy()
    return found


@pytest.mark.parametrize("zero", [{}, OFFLOAD], ids=str)
def test_experts_that_only_one_rank_uses_are_trained_under_a_leaf_module(pool: Pools, zero: dict[str, Any]) -> None:
    found, _ = pool(2).run(mixture, zero)
    for optimizer in OURS:
        expected = alone(
            optimizer, made(Mixture), lambda model, at, rank: [model(tokens_of(at, rank), CHOSEN[at][rank])], 4
        )
        assert far(found[optimizer], expected) <= TOLERANCE[optimizer], optimizer


def interleaved(stage: int, zero: dict[str, Any]) -> tuple[dict[str, Weights], dict[str, Weights]]:
    """Each optimizer's engine beside the others', step by step, and alone."""
    engines = {optimizer: start(optimizer, stage, made(Small), zero)[0] for optimizer in OURS}
    for index in range(4):
        losses = {optimizer: engine(tokens_of(index, dist.get_rank())) for optimizer, engine in engines.items()}
        for optimizer, engine in engines.items():
            engine.backward(losses[optimizer])
        for engine in engines.values():
            engine.step()
    together = {optimizer: weights_of(engine.module) for optimizer, engine in engines.items()}
    for engine in engines.values():
        engine.destroy()
    return together, {optimizer: plain(optimizer, stage, "", zero) for optimizer in OURS}


@pytest.mark.parametrize(("stage", "zero"), [(0, {}), (2, OFFLOAD), (3, {})], ids=str)
def test_engines_side_by_side_train_bitwise_as_alone(pool: Pools, stage: int, zero: dict[str, Any]) -> None:
    for together, apart in pool(2).run(interleaved, stage, zero):
        for optimizer in OURS:
            assert far(together[optimizer], apart[optimizer]) == 0, optimizer


# -- data and files -------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return tokens_of(index, 7)


def curriculum(folder: str) -> dict[str, Weights]:
    """Batches drawn by DeepSpeed's data sampler, whose difficulty grows."""
    metric = {
        "index_to_sample_path": "",
        "index_to_metric_path": "",
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        "min_difficulty": 4,
        "max_difficulty": 8,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 3, "difficulty_step": 2},
    }
    learning = {"enabled": True, "data_cluster_path": folder, "curriculum_metrics": {"length": metric}}
    sampling = {"enabled": True, "num_epochs": 2, "num_workers": 0, "curriculum_learning": learning}
    found = {}
    for optimizer in (CONTROL, *OURS):
        model = made(Small)
        engine, _, loader, _ = start(
            optimizer,
            2,
            model,
            training_data=Rows(),
            data_efficiency={"enabled": True, "seed": 3, "data_sampling": sampling},
        )
        batches = iter(loader)
        for _ in range(4):
            engine.backward(engine(next(batches)))
            engine.step()
        found[optimizer] = weights_of(model)
        engine.destroy()
    return found


def test_data_efficiency_draws_the_same_batches(pool: Pools, tmp_path: Path) -> None:
    one, other = pool(2).run(curriculum, str(tmp_path))
    assert far(one["ds_optim.AdamW"], one[CONTROL]) <= 1e-6
    assert all(far(one[optimizer], other[optimizer]) == 0 for optimizer in OURS)


def exported(stage: int, folder: str) -> list[str]:
    """Optimizers whose masters DeepSpeed's ``zero_to_fp32.py`` does not give back from a checkpoint, bit for bit."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    wrong = []
    for optimizer in ("AdamMini", "Shampoo"):
        model = made(Small).bfloat16()
        engine, *_ = start(optimizer, stage, model, bf16={"enabled": True})
        for index in range(2):
            step(engine, index)
        engine.save_checkpoint(f"{folder}/{optimizer}")
        masters = {name: safe_get_full_fp32_param(parameter) for name, parameter in model.named_parameters()}
        engine.destroy()
        read = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{optimizer}")
        if far(masters, {name: read[name] for name in masters}):
            wrong.append(optimizer)
    return wrong


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_finds_the_masters(pool: Pools, stage: int, tmp_path: Path) -> None:
    assert pool(2).run(exported, stage, str(tmp_path)) == [[], []]


# -- compiled, or refused by name -----------------------------------------------------------------------------------


def refusal(stage: int, extra: dict[str, Any]) -> str:
    try:
        engine, *_ = start("AdamMini", stage, made(Small), **extra)
    except ValueError as error:
        return str(error)
    engine.destroy()
    return ""


@pytest.mark.parametrize("stage", [1, 3])
def test_deepcompile_is_refused(pool: Pools, stage: int) -> None:
    for message in pool(2).run(refusal, stage, {"compile": {"deepcompile": True}}):
        assert "compile.deepcompile moves gradients past the hooks" in message


def compiled(stage: int, zero: dict[str, Any], backwards: bool) -> tuple[Weights, Weights]:
    """With and without torch's compiler, which must not hide from us what was used; `late` is not, in step 2."""
    ends = []
    accelerator = get_accelerator()
    before = accelerator.get_compile_backend()
    for compiles in (False, True):
        model = made(Small)
        engine, *_ = start("AdamMini", stage, model, zero)
        if compiles:
            accelerator.set_compile_backend("eager")  # what the backward pass is compiled by
            engine.compile(backend="eager", compiled_autograd_enabled=backwards)
        for index in range(3):
            engine.backward(engine(tokens_of(index, dist.get_rank()), index != 1))
            engine.step()
        engine.destroy()
        ends.append(weights_of(model))
    accelerator.set_compile_backend(before)
    torch._dynamo.reset()
    return ends[0], ends[1]


COMPILED = [(1, {}, True), (2, OFFLOAD, False), (3, {}, False)]
if TORCH.is_before("2.10") or DEEPSPEED.is_before("0.19"):  # compiled autograd fails in DeepSpeed's hooks at ZeRO-1 too
    COMPILED[0] = (1, {}, False)


@pytest.mark.parametrize(("stage", "zero", "backwards"), COMPILED, ids=str)
def test_a_compiled_engine_trains_the_same_weights(
    pool: Pools, stage: int, zero: dict[str, Any], backwards: bool
) -> None:
    """``backwards``: by compiled autograd too, which fails in DeepSpeed's own hooks at ZeRO-2 and 3."""
    for plainly, compiling in pool(2).run(compiled, stage, zero, backwards):
        assert far(plainly, compiling) == 0
