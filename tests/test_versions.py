"""What follows from the releases that are installed: refused in one sentence, said in one line, or nothing."""

from __future__ import annotations

import functools
import inspect
import json
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers  # noqa: F401  (its release is asked for where it is imported)
import wrapt
from typer.testing import CliRunner

from ds_optim import AdamMini, known_torch, known_transformers, releases
from ds_optim.blueprint import BlueprintError, meta_model
from ds_optim.cli import app
from ds_optim.deepspeed import differences, guards, wrappers
from ds_optim.releases import ALL, DEEPSPEED, TORCH, Releases
from ds_optim.sharding import dtensor
from pool import Pools
from test_registration import python

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from versions import AREAS  # noqa: E402

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SOME = Releases("some", "1.8", "3", ("1.8.2", "2.1"))


class Older:
    """An object without what newer releases have."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


# -- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("1.7.9", "too old"),
        ("1.8", "untested"),
        ("1.8.0a0+5228986c39.nv25.06", "untested"),  # a preview that a vendor ships as the release
        ("1.8.2+cpu", "tested"),
        ("2.0.1", "untested"),
        ("2.1.0", "tested"),
        ("2.1.1", "newer"),
        ("3.0", "too new"),
        ("", "not installed"),
    ],
)
def test_a_release_stands_where_its_numbers_say(version: str, standing: str) -> None:
    assert SOME.standing(version) == standing
    assert bool(SOME.problem(version)) == (standing in ("too old", "too new"))
    assert bool(SOME.note(version)) == (standing == "newer")


def test_a_problem_names_what_is_wrong_what_works_and_the_remedy() -> None:
    assert SOME.problem("1.7.9") == (
        "some 1.7.9 is too old: pip install 'some>=1.8,<3'; some versions known to work: 1.8 and later, below 3 "
        "(tested: 1.8.2, 2.1)"
    )


def test_setup_requires_the_releases_that_messages_name() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="requirements")
    required = [*setup["REQUIREMENTS"], *setup["TRAINER"]]
    assert {one.requirement for one in ALL} <= set(required)


SINCE = {"DeepSpeed's objects", "Muon and SOAP", "packed and eight-bit state"}
"""Areas that came when commits were noted, or later."""


def areas_of(row: dict[str, Any]) -> set[str]:
    """What a whole row has; one of before commits were noted is without the areas that came then."""
    is_older = any(area.get("commit", "before").startswith("before") for area in row["areas"].values())
    return AREAS.keys() - (SINCE if is_older else set())


def test_what_is_called_tested_is_what_passed() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "versions.json").read_text(encoding="utf-8"))
    rows.pop("beside", None)
    whole = [row for row in rows.values() if row["areas"].keys() >= areas_of(row)]
    passed = [row for row in whole if all(area["passed"] and not area["failed"] for area in row["areas"].values())]
    for one in ALL:
        found = {row["releases"][one.package] for row in passed}
        assert set(one.tested) == found, one.package
        assert one.standing(one.first) == "tested", one.package
        assert list(one.tested) == sorted(one.tested, key=lambda text: [int(part) for part in text.split(".")])


# -- what a user sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "standing"), [("2.6.0+cu124", "too old"), ("3.0.0", "too new")])
def test_an_import_under_another_torch_is_one_sentence(tmp_path: Path, version: str, standing: str) -> None:
    done = python(f"import torch\ntorch.__version__ = {version!r}\nfrom ds_optim import AdamMini\n", tmp_path)
    assert done.returncode == 1
    assert f"ImportError: ds_optim cannot work here: torch {version} is {standing}: pip install 'torch>=" in done.stderr
    assert "AttributeError" not in done.stderr


def test_the_command_says_what_is_wrong_with_every_package(tmp_path: Path) -> None:
    code = "import torch\ntorch.__version__ = '2.7.1'\nimport deepspeed\ndeepspeed.__version__ = '0.16.9'\n"
    done = python(f"{code}from ds_optim_command import main\nmain()\n", tmp_path)
    assert done.returncode == 1
    assert "ds-optim: ds_optim cannot work here: torch 2.7.1 is too old: pip install" in done.stderr
    assert "; deepspeed 0.16.9 is too old: pip install" in done.stderr
    assert "Traceback" not in done.stderr


ENGINE = """
import importlib.metadata
found = importlib.metadata.version
importlib.metadata.version = lambda name: "VERSION" if name == "deepspeed" else found(name)
import torch
import deepspeed
deepspeed.__version__ = "VERSION"

def train(client, **config):
    model = torch.nn.Linear(8, 4)
    made = client(model.parameters()) if client else None
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, **config}
    engine = deepspeed.initialize(model=model, optimizer=made, config=config)[0]
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    return type(engine.basic_optimizer).__name__

def said(*arguments, **config):
    try:
        print("RESULT trained with", train(*arguments, **config))
    except Exception as error:
        print("RESULT", type(error).__name__, " ".join(str(error).split()))

from ds_optim import Lion
said(None, optimizer={"type": "AdamMini", "params": {"lr": 0.1}})
said(lambda parameters: Lion(parameters, lr=0.1), zero_allow_untested_optimizer=True)
said(torch.optim.SGD, zero_allow_untested_optimizer=True)
"""


def results(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that a script printed."""
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]


@pytest.mark.parametrize(("version", "standing"), [("0.15.4", "too old"), ("1.0.0", "too new")])
def test_an_engine_of_another_deepspeed_is_refused_in_one_sentence(tmp_path: Path, version: str, standing: str) -> None:
    done = python(ENGINE.replace("VERSION", version), tmp_path)
    named, given, foreign = results(done)
    why = f"deepspeed {version} is {standing}: pip install '{DEEPSPEED.requirement}'"
    assert why in done.stderr  # when DeepSpeed is imported
    for message in (named, given):
        assert message.startswith("RuntimeError")
        assert why in message
    assert "'AdamMini' is no optimizer of DeepSpeed's or torch's" in named
    assert foreign == "trained with SGD"  # and stays out of everybody else's way


def test_newer_releases_that_fit_train_and_are_named_once(tmp_path: Path) -> None:
    deepspeed = "import deepspeed\n"  # before 0.19 it replaces an imported transformers
    others = "import transformers, accelerate\ntransformers.__version__, accelerate.__version__ = '6.1', '1.99'\n"
    done = python(ENGINE.replace(deepspeed, deepspeed + others).replace("VERSION", "0.99.1"), tmp_path)
    assert results(done) == ["trained with AdamMini", "trained with Lion", "trained with SGD"]
    assert done.stderr.count("deepspeed 0.99.1 is newer than the newest that was tested with ds_optim") == 1
    assert done.stderr.count("accelerate 1.99 is newer than the newest that was tested with ds_optim") == 1
    assert done.stderr.count("ds_optim may not work with what is imported here: transformers 6.1 is too new") == 1


def test_doctor_lists_no_faults_that_the_installed_deepspeed_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed  # noqa: F401

    for version, says in (("0.18.6", {"before 0.19.8", "before 0.19.0"}), ("0.19.8", set())):
        monkeypatch.setattr(sys.modules["deepspeed"], "__version__", version)
        listed = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"}).output
        assert {old for old in ("before 0.19.8", "before 0.19.0") if old in listed} == says


def test_doctor_says_where_every_package_stands_and_fails_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert judged.exit_code == 0, judged.output
    for one in ALL:
        assert f"{one.first} and later, below {one.end}" in judged.output
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.1")
    judged = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert judged.exit_code == 1
    assert "problem: transformers 4.40.1 is too old: pip install 'transformers>=" in judged.output
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.999.0")
    judged = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert judged.exit_code == 0
    assert "transformers 5.999.0 is newer than all that were tested: nothing compares it" in judged.output


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (DEEPSPEED.tested[-1], ""),
        ("0.19.1", "deepspeed 0.19.1 lies between tested ones: what it says of its partitions is compared"),
        ("0.98.0", "deepspeed 0.98.0 is newer than all that were tested: what it says of its partitions is compared"),
        ("0.5.0", ""),  # does not do at all
    ],
)
def test_what_follows_of_a_release_is_said(version: str, said: str) -> None:
    assert DEEPSPEED.follows(version).startswith(said)
    assert bool(DEEPSPEED.follows(version)) == bool(said)


@pytest.mark.parametrize("package", [one.package for one in ALL])
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.1", "ds_optim may not work with what is imported here: {} 0.1 is too old: pip install '{}>="),
        ("77.0", "ds_optim may not work with what is imported here: {} 77.0 is too new: pip install '{}>="),
        ("newest", "is newer than the newest that was tested with ds_optim"),
        ("tested", ""),
        ("absent", ""),
    ],
)
def test_what_is_imported_and_was_not_tried_is_said_once(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, said: str
) -> None:
    releases._say.cache_clear()
    for one in ALL:
        monkeypatch.setitem(sys.modules, one.package, SimpleNamespace(__version__=one.tested[-1]))
    (one,) = (one for one in ALL if one.package == package)
    if version == "absent":
        monkeypatch.delitem(sys.modules, package)
    else:
        newest = f"{one.tested[-1]}.9"
        version = {"newest": newest, "tested": one.tested[0]}.get(version, version)
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(__version__=version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        releases.say_what_was_not_tried()
        releases.say_what_was_not_tried()
    assert len(caught) == bool(said)
    for warning in caught:
        assert said.format(package, package) in str(warning.message)
        assert str(warning.message).count(f"{package} {version} is ") == 1
    releases._say.cache_clear()


# -- a newer DeepSpeed, before anything is known of it ----------------------------------------------------------------


def more(self: Any, where: str, client_optimizer: Any, model_parameters: Any) -> Any: ...


def others(self: Any, optimizer: Any, parameters: Any, where: str) -> Any: ...


def made_with(signature: Any, choice: str) -> str:
    """A job: an engine whose DeepSpeed is asked for an optimizer with other arguments; what trains, or the error."""
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_optim.deepspeed import plugin

    known = DeepSpeedEngine._configure_optimizer.__wrapped__
    received: list[Any] = []

    @functools.wraps(signature)
    def newer(engine: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(signature).bind(engine, *args, **kwargs).arguments
        received.append(given["where"])
        known(engine, *[value for name, value in given.items() if name not in ("self", "where")])

    wrapped = wrapt.FunctionWrapper(newer, plugin._configure_optimizer)

    def configure(engine: Any, *arguments: Any) -> None:
        names = [name for name in inspect.signature(signature).parameters if name not in ("self", "where")]
        wrapped.__get__(engine)(where="here", **dict(zip(names, arguments, strict=True)))

    model = torch.nn.Linear(8, 4)
    clients: dict[str, Any] = {
        "made": lambda: AdamMini(model.named_parameters(), lr=0.1),
        "callable": lambda: lambda parameters: AdamMini(parameters, lr=0.1, roles=model),
        "foreign": lambda: torch.optim.SGD(model.parameters()),
        "foreign callable": lambda: torch.optim.SGD,
    }
    client = clients.get(choice, lambda: None)()
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    if "named" in choice:
        config["optimizer"] = {"type": "AdamMini" if choice == "named" else "SGD", "params": {"lr": 0.1}}
    with patch.object(DeepSpeedEngine, "_configure_optimizer", configure):
        try:
            engine = deepspeed.initialize(model=model, optimizer=client, config=config)[0]
        except ValueError as error:
            return str(error)
    assert received == ["here"]
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    engine.destroy()
    return f"trained with {type(engine.basic_optimizer).__name__}"


@pytest.mark.parametrize("choice", ["foreign", "foreign callable", "foreign, named", "named", "made", "callable"])
def test_other_arguments_are_passed_on_and_break_no_engine_of_others(pool: Pools, choice: str) -> None:
    trains = "SGD" if choice.startswith("foreign") else "AdamMini"
    assert pool(1).run(made_with, more, choice) == [f"trained with {trains}"]
    (found,) = pool(1).run(made_with, others, choice)
    if choice.startswith("foreign"):
        assert found == "trained with SGD"
    else:
        assert found.startswith("ds_optim cannot run under this configuration, nothing was changed:\n- deepspeed ")
        assert f"; {DEEPSPEED.known}; pip install 'deepspeed==" in found


def test_an_engine_that_cannot_be_read_is_nobodys_business_but_ours() -> None:
    from ds_optim.deepspeed import plugin

    weights = [torch.nn.Parameter(torch.ones(2))]
    foreign, ours = torch.optim.SGD(weights), AdamMini([("w", weights[0])], roles={"w": "linear"})
    made: list[Any] = []

    def make(client_optimizer: Any, model_parameters: Any, more: str) -> str:
        made.append((client_optimizer, model_parameters, more))
        engine.basic_optimizer = basic
        return "made"

    whole = Older(**dict.fromkeys(wrappers.ENGINE_ATTRIBUTES["configuration"]))  # and nothing in it can be called
    whole._config = Older(_param_dict={}, optimizer_params={}, zero_force_ds_cpu_optimizer=True)
    for engine in (Older(), whole):
        for client in (foreign, None):
            basic: Any = foreign
            assert plugin._configure_optimizer(make, engine, (client, weights, "more"), {}) == "made"
            assert made.pop() == (client, weights, "more")
        basic = ours
        with pytest.raises(ValueError, match=r"versions known to work: .*; pip install 'deepspeed=="):
            plugin._configure_optimizer(make, engine, (None, weights, "more"), {})
        assert made.pop() == (None, weights, "more")
    with pytest.raises(ValueError, match="Older has no seq_data_parallel_group, mesh_device"):
        plugin._configure_optimizer(make, Older(), (ours, weights, "more"), {})
    assert not made


# -- what older releases lack -----------------------------------------------------------------------------------------


def test_offsets_are_running_sums_where_deepspeed_states_none() -> None:
    parameters = [torch.empty(3), torch.empty(2, 2), torch.empty(5)]
    assert differences.offsets(Older(round_robin_bit16_groups=[parameters]), 0) == [0, 3, 7]
    stated = Older(round_robin_bit16_groups=[parameters], round_robin_bit16_offsets=[torch.tensor([0, 8, 16])])
    assert differences.offsets(stated, 0) == [0, 8, 16]


def test_all_sub_groups_have_the_same_ranks_where_they_have_none_of_their_own() -> None:
    assert differences.sub_group_ranks(Older(dp_process_group="all"), 3) == "all"
    newer = Older(dp_process_group="all", _get_sub_group_process_group=lambda index: f"of {index}")
    assert differences.sub_group_ranks(newer, 3) == "of 3"


def test_a_boundary_is_a_value_or_a_method() -> None:
    for found in (True, False):
        assert differences.is_boundary(Older(is_gradient_accumulation_boundary=found)) is found
        assert differences.is_boundary(Older(is_gradient_accumulation_boundary=lambda found=found: found)) is found


def test_accumulation_is_managed_unless_it_is_turned_off() -> None:
    assert differences.is_managed(Older())
    assert not differences.is_managed(Older(managed_gradient_accumulation=lambda: False))


def test_gradients_are_handed_over_where_deepspeed_can() -> None:
    parameters = [torch.empty(1), torch.empty(1)]
    older = Older()
    assert not differences.hand_over(older, parameters)
    differences.forget_arrivals(older)
    done: list[str] = []
    newer = Older(
        _offload_accumulated_param_ids={0, 7},
        get_param_id=lambda one: 0 if one is parameters[0] else 5,
        finalize_gradient_accumulation_boundary=lambda: done.append("finalized"),
        _wait_for_offload_copies=lambda: done.append("waited"),
    )
    assert differences.hand_over(newer, parameters)
    assert (newer._offload_accumulated_param_ids, done) == ({0}, ["finalized"])
    differences.forget_arrivals(newer)
    assert (newer._offload_accumulated_param_ids, done) == (set(), ["finalized", "waited"])


def test_expert_parallelism_is_a_setting_that_older_ones_lack() -> None:
    assert not differences.has_expert_parallelism(Older())
    assert differences.has_expert_parallelism(Older(expert_parallel_config=SimpleNamespace(enabled=True)))


def test_groups_of_fsdp_are_several_or_one() -> None:
    group = SimpleNamespace(fsdp_params=["a", "b"])
    for state in (Older(_fsdp_param_groups=[group]), Older(_fsdp_param_group=group)):
        assert list(known_torch.fsdp_parameters(Older(_get_fsdp_state=lambda state=state: state))) == ["a", "b"]
    empty = Older(_fsdp_param_group=None)
    assert not list(known_torch.fsdp_parameters(Older(_get_fsdp_state=lambda: empty)))
    with pytest.raises(AttributeError):
        list(known_torch.fsdp_parameters(Older(_get_fsdp_state=Older)))


def test_products_are_exact_by_the_older_setting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    allowed: list[str] = ["medium"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", allowed.append)
    for precision, setting in (("ieee", "highest"), ("tf32", "high")):
        with known_torch.fp32_products(precision):  # type: ignore[arg-type]
            assert allowed[-1] == setting
        assert allowed[-1] == "medium"


def test_a_backward_pass_says_its_number_and_its_end() -> None:
    assert known_torch.graph_task() == -1
    known_torch.backward_problem.cache_clear()
    assert known_torch.backward_problem() == ""
    seen: list[str] = []
    weight = torch.ones(1, requires_grad=True)

    def arrives(_: torch.Tensor) -> None:
        assert known_torch.graph_task() >= 0
        for end in ("first", "second"):
            known_torch.when_backward_ends(functools.partial(seen.append, end))
        seen.append("arrived")

    weight.register_hook(arrives)
    weight.sum().backward()
    assert seen == ["arrived", "first", "second"]


class Silent:
    """An autograd engine that takes no callbacks."""

    run_backward = torch.autograd.Variable._execution_engine.run_backward


CHANGES: list[tuple[Any, str, Any, str]] = [
    (
        torch._C,
        "_current_graph_task_id",
        None,
        "does not say when a backward pass ends ('NoneType' object is not callable)",
    ),
    (torch._C, "_current_graph_task_id", lambda: -1, "says otherwise in which backward pass it is"),
    (
        *(torch.autograd.Variable, "_execution_engine", Silent),
        "does not say when a backward pass ends (type object 'Silent' has no attribute 'queue_callback')",
    ),
]


def under_another_torch(change: int, stage: int, offload: bool) -> str:
    """A job: why an engine is refused where torch's private parts are others."""
    import deepspeed

    owner, name, other, _ = CHANGES[change]
    zero = {"stage": stage, **(OFFLOAD if offload else {})}
    optimizer = {"type": "ds_optim.AdamW", "params": {"lr": 1e-3}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "optimizer": optimizer}
    known_torch.backward_problem.cache_clear()
    with patch.object(owner, name, other):
        try:
            engine = deepspeed.initialize(model=torch.nn.Linear(4, 2), config=config)[0]
        except RuntimeError as error:
            return str(error)
        finally:
            known_torch.backward_problem.cache_clear()
    engine.destroy()
    return "no error"


@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_an_engine_whose_backward_passes_cannot_be_told_apart_is_refused(pool: Pools, change: int) -> None:
    for stage, offload in ((3, False), (1, True)):
        for message in pool(2).run(under_another_torch, change, stage, offload):
            assert f"torch {TORCH.installed} {CHANGES[change][-1]}" in message
            assert TORCH.known in message
            assert "nothing was changed" in message
    assert pool(2).run(under_another_torch, change, 2, False) == ["no error"] * 2  # which does not ask


def test_an_accelerators_bytes_are_counted_where_it_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device, count = torch.device("cuda"), {"memory_allocated": lambda _: 7, "mem_get_info": lambda _: (5, 9)}
    for module, wanted in ((SimpleNamespace(**count), (7, 5)), (SimpleNamespace(), (None, None))):
        monkeypatch.setattr(torch, "get_device_module", lambda _, module=module: module)
        assert (known_torch.allocated(device), known_torch.free(device)) == wanted
    assert known_torch.allocated(torch.device("cpu")) is None


def test_an_accelerator_that_cannot_say_whether_it_is_at_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, is_at_work in ((SimpleNamespace(), False), (SimpleNamespace(is_initialized=lambda: True), True)):
        monkeypatch.setattr(torch, "get_device_module", lambda _, module=module: module)
        assert known_torch.is_at_work(torch.device("cuda")) is is_at_work


def scattered(world_size: int = 2) -> float:
    """The average of every rank's number, by a reduce-scatter."""
    mine, numbers = torch.zeros(3), torch.full((3 * world_size,), float(dist.get_rank()))
    dist.reduce_scatter_tensor(mine, numbers, op=dist.ReduceOp.AVG)
    return float(mine[0])


def test_where_gloo_gives_sums_for_averages_is_known(pool: Pools) -> None:
    assert pool(2).run(scattered) == [1.0 if known_torch.sums_for_averages("cpu") else 0.5] * 2


def told_of_sums() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    dtensor._say_sums.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with patch.object(known_torch, "sums_for_averages", lambda _: True):
            for _ in range(2):
                AdamMini(fully_shard(torch.nn.Linear(4, 4)).named_parameters())
    return [str(one.message) for one in caught if "FSDP2" in str(one.message)]


def test_fsdp2_is_told_of_sums_once(pool: Pools) -> None:
    for told in pool(2).run(told_of_sums):
        assert len(told) == 1
        assert "set_force_sum_reduction_for_comms(True) on every FSDPModule" in told[0]


def test_the_blueprint_of_a_model_needs_transformers_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.1")
    with pytest.raises(BlueprintError, match=r"^transformers 4\.40\.1 is too old: pip install"):
        meta_model({"model_type": "llama"})


def test_activations_are_checkpointed_by_either_name() -> None:
    asked: list[Any] = []
    known_transformers.checkpoint_activations(Older(gradient_checkpointing_enable=asked.append))
    known_transformers.checkpoint_activations(Older(activation_checkpointing_enable=asked.append))
    assert asked == [{"use_reentrant": False}] * 2


# -- faults of older releases -----------------------------------------------------------------------------------------


def plain(model: torch.nn.Sequential) -> list[Any]:
    return list(model.parameters())


def with_a_frozen_group(model: torch.nn.Sequential) -> list[Any]:
    return [{"params": list(layer.requires_grad_(layer is not model[0]).parameters())} for layer in model]


def with_an_empty_parameter(model: torch.nn.Sequential) -> list[Any]:
    model[0].register_parameter("nothing", torch.nn.Parameter(torch.empty(0)))
    return list(model.parameters())


Prepare = Callable[[torch.nn.Sequential], list[Any]]
FP32_SUMS: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
GATHERS = "uses gathered weights before all of them have arrived in deepspeed before 0.19.8: set"
REDUCES = "reduces no gradients in deepspeed before 0.19.8: leave it out"
PASSES = "keeps the first and the last micro-batch alone in deepspeed before 0.19.0: use ZeRO stage 1 or 3"
SUMS = 'deepspeed before 0.19.0 steps every rank with its own gradients: set "bf16"'
GROUPS = (
    "parameter group 0 is frozen, and at ZeRO stage 3 deepspeed before 0.19.3 gives the groups behind it the options"
)
EMPTY = "0.nothing of shape (0,) has no elements, which deepspeed before 0.19.8 cannot lay out at ZeRO stage"
# (last release with it, first without, "zero_optimization", the rest of the JSON, what is trained, what is said)
FAULTS: list[tuple[str, str, dict[str, Any], dict[str, Any], Prepare, str]] = [
    ("0.19.7", "0.19.8", {"stage": 3, "stage3_allgather_sequential": False}, {}, plain, GATHERS),
    ("0.19.7", "0.19.8", {"stage": 1, "contiguous_gradients": False}, {}, plain, REDUCES),
    ("0.19.7", "0.19.8", {"stage": 2, "contiguous_gradients": False}, {}, plain, REDUCES),
    ("0.18.9", "0.19.0", {"stage": 2, **OFFLOAD}, {"gradient_accumulation_steps": 3}, plain, PASSES),
    ("0.18.9", "0.19.0", {"stage": 1}, FP32_SUMS, plain, SUMS),
    ("0.19.2", "0.19.3", {"stage": 3, "stage3_allgather_sequential": True}, {}, with_a_frozen_group, GROUPS),
    ("0.19.7", "0.19.8", {"stage": 1}, {}, with_an_empty_parameter, f"{EMPTY} 1"),
    ("0.19.7", "0.19.8", {"stage": 2}, {}, with_an_empty_parameter, f"{EMPTY} 2"),
]


@pytest.mark.parametrize(("last", "fixed", "zero", "more", "prepare", "said"), FAULTS, ids=[one[-1] for one in FAULTS])
def test_what_a_release_does_wrong_is_refused_until_the_one_that_mends_it(
    pool: Pools, last: str, fixed: str, zero: dict[str, Any], more: dict[str, Any], prepare: Prepare, said: str
) -> None:
    for message in pool(2).run(refused_under, last, zero, more, prepare):
        assert said in message
        assert "nothing was changed" in message
    if not DEEPSPEED.is_before(fixed):  # else the fault itself would be met
        assert pool(2).run(refused_under, fixed, zero, more, prepare) == ["no error"] * 2


def refused_under(version: str, zero: dict[str, Any], more: dict[str, Any], prepare: Prepare) -> str:
    """A job: why no engine is made under a release of DeepSpeed."""
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    model.to(torch.bfloat16 if "bf16" in more else torch.float32)
    trained = prepare(model)
    optimizer = {"type": "ds_optim.AdamW", "params": {"lr": 1e-3}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "optimizer": optimizer, **more}
    with patch.object(deepspeed, "__version__", version):
        try:
            engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
        except (RuntimeError, ValueError) as error:
            return str(error)
    engine.destroy()
    return "no error"


def test_weights_are_gathered_together_where_that_is_no_fault(pool: Pools) -> None:
    together, one_by_one = ({"stage": 3, "stage3_allgather_sequential": value} for value in (False, True))
    assert pool(2).run(refused_under, "0.19.7", one_by_one, {}, plain) == ["no error"] * 2
    assert pool(1).run(refused_under, "0.19.7", together, {}, plain) == ["no error"]


@pytest.mark.parametrize(("version", "loses"), [("0.18.9", True), ("0.19.0", False)])
def test_passes_whose_boundary_is_set_by_hand_are_lost_at_zero_2_until_0_19(
    monkeypatch: pytest.MonkeyPatch, version: str, loses: bool
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__=version))
    for stage, passes in ((2, 1), (2, 4), (1, 1), (3, 1)):
        engine = Older(zero_optimization_stage=lambda of=stage: of, gradient_accumulation_steps=lambda of=passes: of)
        assert differences.loses_earlier_passes(engine) is (loses and (stage, passes) == (2, 1))


@pytest.mark.parametrize("has_a_graph", [True, False])
def test_a_step_leaves_autograd_where_the_weights_hang_in_a_graph(has_a_graph: bool) -> None:
    """Before 0.19.0 they do, also of a pipeline, whose steps nothing else is hung on."""
    seen: list[bool] = []
    made = type("DeepSpeedZeroOptimizer", (), {"step": lambda _: seen.append(torch.is_grad_enabled())})()
    weights = torch.ones(3, requires_grad=True)
    made.bit16_groups_flat = [torch.ones(2), weights * 1 if has_a_graph else weights.detach()]
    guards.step_outside_of_autograd(Older(optimizer=made, pipeline_parallelism=True))
    made.step()
    assert seen == [not has_a_graph]


@pytest.mark.parametrize(
    ("zero", "name"),
    [
        ({"offload_optimizer": None}, "zenflow"),
        ({"zenflow": None, "offload_optimizer": SimpleNamespace(device="cpu", ratio=1.0)}, "super_offload"),
        ({"zenflow": None, "offload_optimizer": SimpleNamespace(device="cpu", super_offload=False)}, "ratio"),
    ],
)
def test_settings_that_are_called_otherwise_are_a_reason_and_no_error(zero: dict[str, Any], name: str) -> None:
    from ds_optim.deepspeed.refusals import refusals

    reasons = refusals(SimpleNamespace(zero_config=SimpleNamespace(**zero)), AdamMini)
    for wanted in (name, "float16_config"):
        assert any("keeps a setting elsewhere" in reason and f"'{wanted}'" in reason for reason in reasons)
    assert all(DEEPSPEED.known in reason for reason in reasons)


def test_frozen_parameters_that_deepspeed_would_step_are_refused(pool: Pools) -> None:
    """Before 0.19.1 its wrapper at ZeRO-0 in bf16 has masters of all parameters of a group."""
    (said,) = pool(1).run(frozen_at_zero_0)
    assert said == (
        "frozen is frozen, and this DeepSpeed has an fp32 master of it stepped all the same at ZeRO-0 in bf16: leave "
        "frozen parameters out of model_parameters, or use ZeRO stage 1"
    )


def frozen_at_zero_0() -> str:
    """A job: what the reader finds wrong with one trained and one frozen parameter."""
    from ds_optim.deepspeed.reader import EngineReader

    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2), requires_grad=False)]
    engine = SimpleNamespace(seq_data_parallel_group=None, has_moe_layers=False, module=torch.nn.Module())
    reader = EngineReader(engine, dict(zip(weights, ("trained", "frozen"), strict=True)))
    reader.replicated([weights], [[weight.detach().clone() for weight in weights]])
    (problem,) = reader.problems
    return problem


# -- what a step is made of -------------------------------------------------------------------------------------------

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0": ({"stage": 0}, {}),
    "0 bf16": ({"stage": 0}, BF16),
    "1": ({"stage": 1}, {}),
    "1 bf16": ({"stage": 1}, BF16),
    "1 bf16, fp32 sums": ({"stage": 1}, FP32_SUMS),
    "1 offload": ({"stage": 1, **OFFLOAD}, {}),
    "1 no buckets": ({"stage": 1, "contiguous_gradients": False}, {}),
    "2": ({"stage": 2}, {}),
    "2 bf16": ({"stage": 2}, BF16),
    "2 offload": ({"stage": 2, **OFFLOAD}, {}),
    "2 no buckets": ({"stage": 2, "contiguous_gradients": False}, {}),
    "3": ({"stage": 3}, {}),
    "3 bf16": ({"stage": 3}, BF16),
    "3 offload": ({"stage": 3, **OFFLOAD}, {}),
}
# {(strategy, backward passes): the first release where it is good}; the others are in all that work
GOOD_SINCE = {
    **{("1 bf16, fp32 sums", passes): "0.19.0" for passes in (1, 4)},
    **{(f"{stage} no buckets", passes): "0.19.8" for stage in (1, 2) for passes in (1, 4)},
    ("2 offload", 4): "0.19.0",
}
GOOD_BY_HAND_SINCE = {"1 offload": DEEPSPEED.first, "2 offload": "0.19.0", "3 offload": DEEPSPEED.first}


def gradient_of_a_step(zero: dict[str, Any], more: dict[str, Any], passes: int, by_hand: bool) -> list[float] | str:
    """A job: the gradient that a step sees, by the first moment it leaves, of data that no two passes share."""
    import deepspeed

    from ds_optim.checkpoint import full_state

    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)).to(torch.bfloat16 if "bf16" in more else None)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1 if by_hand else passes,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "optimizer": {"type": "ds_optim.AdamW", "params": {"lr": 1e-3, "betas": [0.0, 0.9]}},
        **more,
    }
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config)
    except (RuntimeError, ValueError) as error:
        return str(error)
    try:
        for index in range(passes):
            if by_hand:
                engine.set_gradient_accumulation_boundary(index == passes - 1)
            data = torch.full((1, 5), 8.0 * (dist.get_rank() + 1) * (index + 1), dtype=next(model.parameters()).dtype)
            engine.backward(engine(data).sum())
            engine.step()
        return [float(value) for value in full_state(engine, "0.weight")["exp_avg"].unique()]
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_has_the_mean_over_all_ranks_and_micro_batches_or_is_refused(
    pool: Pools, strategy: str, passes: int
) -> None:
    zero, more = STRATEGIES[strategy]
    mean = 8 * 1.5 * (1 if passes == 1 else 2.5)
    since = GOOD_SINCE.get((strategy, passes), DEEPSPEED.first)
    for found in pool(2).run(gradient_of_a_step, zero, more, passes, False):
        is_refused = isinstance(found, str) and f"before {since}" in found
        assert is_refused == DEEPSPEED.is_before(since), found
        assert is_refused or found == [mean], found


@pytest.mark.parametrize("strategy", GOOD_BY_HAND_SINCE)
def test_so_has_one_whose_boundary_was_set_by_hand(pool: Pools, strategy: str) -> None:
    zero, more = STRATEGIES[strategy]
    for found in pool(2).run(gradient_of_a_step, zero, more, 4, True):
        is_refused = isinstance(found, str) and "lost gradients of this step" in found
        assert is_refused == DEEPSPEED.is_before(GOOD_BY_HAND_SINCE[strategy]), found
        assert is_refused or found == [8 * 1.5 * 10], found
