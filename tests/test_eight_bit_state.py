"""State in eight bits, on ranks: the same bits under every strategy, bytes as predicted, and what cannot be is refused.

The tests' model is small: here parameters of 300 elements have their state in eight bits, blocks of which are cut by
every boundary of these shapes. `test_eight_bit_kernels` compares one process with the textbook.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ds_optim
import meshes
from ds_optim.optimizers.registry import optimizers
from ds_optim.sharding import dtensor
from ds_optim.stepping import eight_bits
from ds_optim.stepping.eight_bits import coded_keys
from engines import WIDER, Case, assembled, build_model, run
from expected import MATRIX_RULES, by_one_process, distance, is_matrix
from meshes import MeshCase
from pool import Pools
from test_invariance import OFTEN, in_rows

SMALL = 300
IN_CODES = {
    name: {**options, "state_dtype": "int8", "int8_embeddings": name in ("ds_optim.Lion", "SWAN")}
    for name, options in OFTEN.items()
}
for _name in ("Shampoo", "SOAP"):
    IN_CODES[_name]["max_preconditioner_dim"] = 18  # whole tiles of 324 elements, ragged ones without codes
FACTORS: dict[str, list[Any]] = {
    "optimizer": list(IN_CODES),
    "strategy": ["0 bf16", "1 fp32", "1 bf16_optimizer", "2 bf16", "3 fp32"],
    "ranks": [1, 2, 3, 4],
    "variant": ["plain", "offload", "sub-groups"],
    "route": ["json", "client"],
    "groups": ["flat", "user's"],
    "tied": [False, True],
    "frozen": [(), ("embed_tokens", "k_proj")],
    "accumulation": [1, 4],
    "clipping": [0.0],
    "unused": [None, 4],
    "layers": [1],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    in_rows(metafunc, FACTORS)


def with_small_ones(job: Callable[..., Any], *arguments: Any) -> Any:
    """A job of a worker in which parameters of `SMALL` elements are enough."""
    before, eight_bits.LEAST = eight_bits.LEAST, SMALL
    try:
        return job(*arguments)
    finally:
        eight_bits.LEAST = before


def case_of(row: list[Any]) -> tuple[Case, int]:
    """The case of one row of the array, and its number of ranks."""
    import test_invariance

    case, ranks = test_invariance.case_of(row)
    return replace(case, options=IN_CODES[case.optimizer], sizes=WIDER, steps=Case.steps), ranks


def assert_the_same(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if case.optimizer == "AdamMini":  # the sums of its cut blocks are added up in another order
        assert distance(found, wanted) <= 1e-6
    else:
        assert not [name for name, values in wanted.items() if not torch.equal(values, found[name])]


def test_every_strategy_ends_with_the_bits_of_one_process(pool: Pools, row: list[Any]) -> None:
    case, ranks = case_of(row)
    found = assembled(pool(ranks).run(with_small_ones, run, case))
    assert_the_same(case, found, with_small_ones(by_one_process, case))


def in_codes(name: str, **settings: Any) -> Case:
    """Of a model whose matrices are large enough for codes."""
    return Case(name, IN_CODES[name], **{"sizes": WIDER, **settings})


@cache
def alone(name: str) -> dict[str, Tensor]:
    return with_small_ones(by_one_process, in_codes(name))


@pytest.mark.parametrize(
    ("ranks", "name", "strategy", "flag"),
    [
        (1, "AdamMini", "fsdp", ""),
        (2, "ds_optim.AdamW", "fsdp", ""),
        (2, "ds_optim.Lion", "ddp", ""),
        (3, "Adan", "fsdp", "offload"),
        (3, "AdamMini", "fsdp", "late"),
        (3, "ds_optim.Lion", "fsdp", "mixed"),
        (4, "ds_optim.AdamW", "hsdp", "late"),
        (4, "Shampoo", "fsdp", ""),
        (4, "SWAN", "hsdp", ""),
        (2, "ds_optim.Muon", "ddp", ""),
        (3, "NorMuon", "fsdp", "late"),
        (4, "SOAP", "hsdp", ""),
    ],
)
def test_meshes_end_with_the_bits_of_one_process(pool: Pools, ranks: int, name: str, strategy: str, flag: str) -> None:
    case = in_codes(name)
    mesh_case = MeshCase(case, strategy, **({flag: True} if flag else {}))
    for report in pool(ranks).run(with_small_ones, meshes.run, mesh_case):
        assert_the_same(case, report["weights"], alone(name))


def test_a_run_in_eight_bits_is_no_run_in_fp32() -> None:
    """Or nothing here would be tested."""
    for name, options in IN_CODES.items():
        fp32 = {key: value for key, value in options.items() if key not in ("state_dtype", "int8_embeddings")}
        assert 1e-6 < distance(alone(name), by_one_process(replace(in_codes(name), options=fp32))) < 0.1


@pytest.mark.parametrize("name", [name for name in IN_CODES if name.split(".")[-1] in MATRIX_RULES])
def test_matrices_of_the_cases_are_in_eight_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a rule keeps per element of them, if it keeps anything; or only vectors would be compared above."""
    monkeypatch.setattr(eight_bits, "LEAST", SMALL)
    cls, model = optimizers()[name.split(".")[-1]], build_model(in_codes(name)).float()
    optimizer = cls(model.named_parameters(), roles=model, **IN_CODES[name])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wanted = {coded_keys(key).codes for key in cls.rule.element_state}
    states = {name: optimizer.state[one] for name, one in model.named_parameters() if is_matrix(name, tuple(one.shape))}
    assert sum(wanted <= state.keys() for state in states.values()) > len(states) // 2


# -- what is kept -----------------------------------------------------------------------------------------------------


def model_of(numel: int) -> nn.Module:
    """An embedding, a norm and two matrices, of which one is small."""
    model = nn.Module()
    model.embed_tokens = nn.Embedding(numel // 64, 64)
    model.norm = nn.LayerNorm(5000)
    model.wide = nn.Linear(64, numel // 64)
    model.small = nn.Linear(63, 65, bias=False)
    return model


BYTES = {
    "AdamW": 2.04,
    "Lion": 1.02,
    "Adan": 4.07,
    "AdamMini": 1.08,
    "Shampoo": 2.04,
    "SWAN": 0.01,
    "Muon": 1.02,
    "NorMuon": 1.09,
    "SOAP": 2.04,
}
"""Per element of a large matrix of 64 columns, one row a block of Adam-mini's; beside what is kept of axes."""
OF_AXES = ("factor_", "root_", "basis_")


@pytest.mark.parametrize("name", list(optimizers()))
def test_what_is_kept_has_the_stated_size(name: str) -> None:
    model = model_of(64 * 512)
    cls = optimizers()[name]
    optimizer = cls(model.named_parameters(), roles=model, state_dtype="int8", int8_embeddings=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def kept(parameter: Tensor) -> set[torch.dtype]:
        state = optimizer.state[parameter]
        return {value.dtype for key, value in state.items() if key != "step" and value.numel() >= 4000}

    weight = model.wide.weight
    size = sum(one.nbytes for key, one in optimizer.state[weight].items() if not key.startswith(("step", *OF_AXES)))
    assert size <= BYTES[name] * weight.numel()
    if name != "SWAN":
        assert torch.uint8 in kept(weight)
    for parameter in (model.embed_tokens.weight, model.norm.weight, model.small.weight):
        assert kept(parameter) <= {torch.float32}


def test_embeddings_are_kept_in_eight_bits_if_asked_for() -> None:
    model = model_of(64 * 512)
    optimizer = ds_optim.AdamW(model.named_parameters(), roles=model, state_dtype="int8", int8_embeddings=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[model.embed_tokens.weight]
    assert "exp_avg_codes" not in optimizer.state[model.norm.weight]


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adan", "AdamMini", "Muon"])
def test_one_warning_names_what_is_in_eight_bits_for_want_of_a_role(name: str) -> None:
    """Norms too, vectors though they are; what Muon takes for matrices is another warning's."""
    model = model_of(64 * 512)

    def warned(parameters: Any, **options: Any) -> list[str]:
        optimizer = optimizers()[name](parameters, state_dtype="int8", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
        return [text for one in caught if "in eight bits" in (text := str(one.message))]

    (found,) = warned(model.parameters())
    matrices = "parameter 0 512x64 (other), parameter 3 512x64 (other)"
    norm = "parameter 1 5000 (other), parameter 2 5000 (other)"
    listed = sorted(re.findall(r"parameter \d [x0-9]+ \(other\)", found))
    assert listed == sorted(f"{norm}{'' if name == 'Muon' else f', {matrices}'}".split(", "))
    assert "Pass roles=model" in found
    assert warned(model.named_parameters(), roles=model) == []


@pytest.mark.parametrize("name", list(optimizers()))
def test_bad_settings_are_named_all_at_once(name: str) -> None:
    cls, parameter = optimizers()[name], [("weight", nn.Parameter(torch.ones(4, 4)))]
    with pytest.raises(ValueError, match="fp32, bf16 or int8"):
        cls(parameter, state_dtype="int4")
    with pytest.raises(ValueError, match=r"(?s)lr must.*int8_embeddings is of state in eight bits"):
        cls(parameter, lr=-1.0, int8_embeddings=True)
    with pytest.raises(ValueError, match="int8_embeddings is a setting of the whole optimizer"):
        cls([{"params": parameter, "int8_embeddings": True}], state_dtype="int8")
    if "exchange_dtype" in cls.__init__.__annotations__:
        with pytest.raises(ValueError, match="exchange_dtype must be fp32 or bf16"):
            cls(parameter, exchange_dtype="int8")


SETTINGS: Any = {"is_elementwise": True}


def scattered() -> dict[str, list[str]]:
    """What is said of parameters along dimension 1 and along dimension 0."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for dim in (1, 0):
        weight = distribute_tensor(torch.ones(8, 4), mesh, [Shard(dim)], src_data_rank=None)
        bound = dtensor.read("wide.weight", weight)
        found[f"codes {dim}"] = dtensor.problems(weight, bound, **SETTINGS, stochastic=False, in_codes=True)
        half = dtensor.problems(weight.bfloat16(), bound, **SETTINGS, stochastic=True, in_codes=False)
        found[f"rounded {dim}"] = half
        assert dtensor.problems(weight, bound, **SETTINGS, stochastic=True, in_codes=False) == []
    return found


def test_what_is_no_range_of_its_elements_is_refused_with_the_remedy(pool: Pools) -> None:
    """Tensor parallelism along dimension 1: 256 neighbouring elements lie on several ranks."""
    for said in pool(2).run(scattered):
        assert said["codes 0"] == said["rounded 0"] == []
        (codes,), (rounded,) = said["codes 1"], said["rounded 1"]
        assert codes.startswith("wide.weight lies as")
        assert codes.endswith('or set state_dtype="fp32"')
        assert rounded.startswith("wide.weight lies as")
        assert rounded.endswith("or set bf16_stochastic_round=False")
