"""Symmetric state is kept by one triangle, and what was written when it was kept whole loads in every form.

The forms that files of 0.1.0 show are read in tests/test_written_checkpoints.py too, without a word about packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import meshes
from ds_optim import Shampoo, checkpoint
from ds_optim.checkpoint.convert import convert
from ds_optim.checkpoint.directory import read_about
from ds_optim.kernels import triangles as in_cpp
from ds_optim.linalg import packed as in_torch
from ds_optim.linalg.packed import Triangles, order_of, pack, packed_diagonal, packed_size, unpack
from ds_optim.rule import PackedSymmetric, bytes_of, kept_whole
from ds_optim.stepping.former_state import in_todays_form, packed_again, room_for_stored
from ds_optim.stepping.logical_tensors import Logical, LogicalRange
from engines import Case, build_model
from expected import by_one_process
from meshes import MeshCase, make, weights
from pool import Pools
from test_written_checkpoints import CASES, SAVED_AT, STEPS, WRITTEN, agree

ORDERS = (1, 2, 5, 16, 33, 257)
MATRICES = ("factor", "root")
CASE = Case("Shampoo", {"max_preconditioner_dim": 8, "precondition_frequency": 3, "weight_decay": 0.1}, steps=6)
K = 3


def symmetric(count: int, order: int, seed: int) -> Tensor:
    values = torch.randn(count, order, order, generator=torch.Generator().manual_seed(seed))
    return values.tril() + values.tril(-1).mT


# -- the form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("by", [in_torch, in_cpp], ids=["torch", "C++"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_symmetric_matrix_comes_back_as_it_was(
    by: Triangles, count: int, order: int, threads: int, seed: int
) -> None:
    matrices = symmetric(count, order, seed)
    size = packed_size(order)
    assert order_of(size) == order
    spoilt = matrices + torch.full((order, order), 1e9).triu(1)  # the other triangle is not looked at
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = by.pack(spoilt, out=torch.full((count, size), torch.nan))
        both = by.unpack(packed, out=torch.full_like(matrices, torch.nan))
        lower = by.unpack_lower(packed, out=torch.full_like(matrices, torch.nan))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, pack(matrices))
    assert torch.equal(both, matrices)
    assert torch.equal(lower.tril(), matrices.tril())
    assert torch.equal(unpack(packed), matrices)


def test_a_stack_on_a_cpu_has_its_triangles_copied_by_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would tell: the bits are the same."""
    copied = []
    for name in ("pack", "unpack", "unpack_lower"):
        copy = getattr(in_cpp, name)
        monkeypatch.setattr(
            in_cpp, name, lambda *args, copy=copy, **kwargs: copied.append(copy) or copy(*args, **kwargs)
        )
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = Shampoo([("w", weight)], roles={"w": "linear"}, precondition_frequency=1)
    weight.grad = torch.eye(16)
    optimizer.step()
    assert {copy.__name__ for copy in copied} == {"pack", "unpack", "unpack_lower"}
    copied.clear()
    monkeypatch.setenv("DS_OPTIM_KERNELS", "eager")
    optimizer.step()
    assert not copied


def test_what_does_not_belong_together_is_not_copied() -> None:
    matrices, packed = symmetric(2, 5, 0), torch.empty(2, packed_size(5))
    for wrong_packed, wrong in (
        (packed[:1], matrices),
        (torch.empty(2, packed_size(6)), matrices),
        (packed.double(), matrices),
        (packed, matrices.double()),
        (packed, torch.empty(2, 5, 10)[..., ::2]),
        (packed, torch.empty(2, 5, 6)),
    ):
        for copy in (
            lambda packed=wrong_packed, squares=wrong: in_cpp.unpack(packed, out=squares),
            lambda packed=wrong_packed, squares=wrong: in_cpp.pack(squares, out=packed),
        ):
            with pytest.raises(ValueError, match="contiguous fp32 matrices on the CPU"):
                copy()


def test_rows_of_the_lower_triangle_lie_behind_one_another(seed: int) -> None:
    (matrix,) = symmetric(1, 7, seed)
    rows = torch.cat([matrix[row, : row + 1] for row in range(7)])
    assert torch.equal(pack(matrix[None])[0], rows)
    spoilt = matrix + torch.full((7, 7), torch.nan).triu(1).nan_to_num(nan=1e9)
    assert torch.equal(pack(spoilt[None])[0], rows)  # the other triangle is not looked at
    values = torch.arange(1.0, 6.0)
    assert torch.equal(unpack(packed_diagonal(values)[None])[0], torch.diag(values))


@pytest.mark.parametrize(("longest", "width"), [(256, 512), (512, 512), (1024, 1024)])
@pytest.mark.parametrize(("state_dtype", "most"), [("fp32", 16.4), ("int8", 10.5)])
def test_shampoo_keeps_16_bytes_per_parameter_in_blocks_of_256_and_more(
    longest: int, width: int, state_dtype: str, most: float
) -> None:
    """The matrices of a Llama whose MLP's edges are no multiples of a block; kept whole, 24.4. In eight bits, 10.

    Blocks longer than a matrix is wide are no squares, and cost more: 17.1 at 1,024 in a width of 512.
    """
    mlp = {512: 1376, 1024: 2736}[width]
    shapes = {**dict.fromkeys("qkvo", (width, width)), "gate": (mlp, width), "up": (mlp, width), "down": (width, mlp)}
    params = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    optimizer = Shampoo(params.items(), roles={"*": "mlp"}, max_preconditioner_dim=longest, state_dtype=state_dtype)
    kept = sum(bytes_of(optimizer.stepper.spec(one)) for one in params.values())
    assert kept / sum(one.numel() for one in params.values()) <= most


def test_owners_are_those_that_blocks_had_when_they_were_kept_whole() -> None:
    """A checkpoint of DeepSpeed's has state where its owner was."""
    work = Shampoo.rule.work({"state_dtype": torch.float32, "graft": "adam"}, (96, 256))
    assert work.balanced_bytes == 8 * 96 * 256 + 8 * (96**2 + 256**2) + 12
    assert work.state_bytes == 8 * 96 * 256 + 8 * (packed_size(96) + packed_size(256)) + 12


# -- what was written when matrices were whole ------------------------------------------------------------------------


def test_sizes_tell_the_forms_apart(seed: int) -> None:
    orders = [3, 1, 4]
    matrices = [symmetric(1, order, seed) for order in orders]
    whole = torch.cat([one.view(-1) for one in matrices])
    packed = torch.cat([pack(one).view(-1) for one in matrices])
    assert torch.equal(packed_again(whole, orders), packed)
    assert packed_again(packed, orders) is packed
    spec = {"factor": PackedSymmetric(3), "other": ((2, 2), torch.float32)}
    assert kept_whole(spec) == {"factor": ((3, 3), torch.float32), "other": ((2, 2), torch.float32)}


def test_a_rank_reads_its_own_matrices_of_a_stored_tensor(seed: int) -> None:
    """The first and the last of three, in the other order."""
    orders, sizes = [3, 2, 4], [6, 3, 10]
    matrices = [symmetric(1, order, seed) for order in orders]
    mine = [LogicalRange(9, 19, 0), LogicalRange(0, 6, 10)]
    logical = Logical(sum(sizes), torch.float32, mine, mine, orders)
    wanted = torch.cat([pack(matrices[index]).view(-1) for index in (2, 0)])
    for stored in (torch.cat([one.view(-1) for one in matrices]), torch.cat([pack(one).view(-1) for one in matrices])):
        values = torch.zeros(16)
        parts, ending = room_for_stored(logical, values, len(stored))
        for start, part in parts:
            part.copy_(stored[start : start + len(part)])
        ending()
        assert torch.equal(values, wanted)


def whole(state: dict[str, Any], orders: dict[str, list[int]]) -> dict[str, Any]:
    """State as 0.1.0 had it."""
    found = dict(state)
    for key, its in orders.items():
        values = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
        parts = zip(values.split([packed_size(order) for order in its]), its, strict=True)
        flat = torch.cat([unpack(part[None]).view(-1) for part, _ in parts])
        found[key] = flat
    return found


def orders_of(optimizer: Any, tensor: Tensor) -> dict[str, list[int]]:
    """Of the matrices of one parameter, in the order of its blocks."""
    logical = optimizer.stepper.logical_state(tensor)[0]
    return {key: one.orders for key, one in logical.items() if one.orders}


def test_a_state_dict_of_one_process_goes_on(seed: int) -> None:
    params = {"w": nn.Parameter(torch.randn(20, 12)), "v": nn.Parameter(torch.randn(9, 7))}

    def made() -> tuple[dict[str, nn.Parameter], Shampoo]:
        ours = {name: nn.Parameter(one.detach().clone()) for name, one in params.items()}
        return ours, Shampoo(ours.items(), roles={"*": "mlp"}, max_preconditioner_dim=8, precondition_frequency=2)

    def trained(ours: dict[str, nn.Parameter], optimizer: Shampoo, steps: range) -> None:
        for step in steps:
            for index, one in enumerate(ours.values()):
                one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(seed + 10 * step + index))
            optimizer.step()

    ours, optimizer = made()
    trained(ours, optimizer, range(4))
    saved, weights_then = optimizer.state_dict(), {name: one.detach().clone() for name, one in ours.items()}
    owned = {}
    for index, tensor in enumerate(ours.values()):
        plan, place = optimizer.stepper.plans.place_of(tensor)
        its = [plan.blocks[block].tile.shape for block in plan.owned(place, 0)]
        keys = {f"{kind}_{axis}": [shape[axis] for shape in its] for kind in MATRICES for axis in (0, 1)}
        owned[index] = whole(saved["state"][index], keys)
        assert owned[index]["root_0"].numel() > saved["state"][index]["root_0"].numel()
        blocks = optimizer.stepper.plans.owned(tensor)
        back = in_todays_form(plan, blocks, optimizer.stepper.plans.state_of_block, owned[index])
        assert all(torch.equal(back[key], saved["state"][index][key]) for key in keys)
    others, again = made()
    for name, one in others.items():
        one.data.copy_(weights_then[name])
    again.load_state_dict({**saved, "state": owned})
    for one, two in ((ours, optimizer), (others, again)):
        trained(one, two, range(4, 8))
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def by_torchs_functions(mesh_case: MeshCase, folder: str, full: bool) -> dict[str, Tensor]:
    """The second half goes on from the first one's state as 0.1.0 would have saved it."""
    wrapped, model, optimizer = make(mesh_case)
    meshes.train(mesh_case, wrapped, model, optimizer, range(1, K + 1))
    options = StateDictOptions(full_state_dict=full)
    values = get_model_state_dict(model, options=options)
    states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())
    for name, parameter in model.named_parameters():
        its = states["state"][name]
        before = whole(its, orders_of(optimizer, parameter))
        for key, one in before.items():
            if isinstance(one, Tensor) and full:
                its[key] = one.full_tensor() if isinstance(one, DTensor) else one
            elif key.startswith(MATRICES):
                place = its[key].device_mesh, its[key].placements
                its[key] = torch.distributed.tensor.distribute_tensor(one, *place)
    if not full:
        dcp.save({"optimizer": states}, checkpoint_id=folder)
    wrapped, model, optimizer = make(mesh_case, seed=1)
    set_model_state_dict(model, values, options=options)
    if not full:
        states = get_optimizer_state_dict(model, optimizer, options=options)
        template = checkpoint.as_stored({"optimizer": states}, folder)
        dcp.load(template, checkpoint_id=folder)
        states = template["optimizer"]
    set_optimizer_state_dict(model, optimizer, states, options=options)
    meshes.train(mesh_case, wrapped, model, optimizer, range(K + 1, CASE.steps + 1))
    return weights(model)


@pytest.mark.parametrize(("ranks", "strategy", "full"), [(2, "fsdp", True), (3, "fsdp", False), (2, "fsdp", False)])
def test_torchs_state_dicts_of_a_mesh_go_on(pool: Pools, ranks: int, strategy: str, full: bool, tmp_path: Path) -> None:
    wanted = by_one_process(CASE)
    for found in pool(ranks).run(by_torchs_functions, MeshCase(CASE, strategy), str(tmp_path), full):
        assert all(torch.equal(values, wanted[name]) for name, values in found.items())


def test_a_directory_of_deepspeeds_becomes_a_canonical_checkpoint_of_today(tmp_path: Path) -> None:
    case = CASES["Shampoo"]
    folder = convert(WRITTEN / "0.1.0" / "deepspeed" / "Shampoo", tmp_path, model=build_model(case))
    old = read_about(WRITTEN / "0.1.0" / "canonical" / "Shampoo" / "written")["parameters"]
    about = read_about(folder)["parameters"]
    smaller = [(name, key) for name, one in about.items() for key in one["state"] if key.startswith(MATRICES)]
    assert smaller
    for name, key in smaller:
        assert about[name]["state"][key]["numel"] <= old[name]["state"][key]["numel"]
    wrapped, model, optimizer = make(MeshCase(case, "single"), seed=1)
    checkpoint.load(tmp_path, model, optimizer)
    meshes.train(MeshCase(case, "single"), wrapped, model, optimizer, range(SAVED_AT + 1, STEPS + 1))
    assert agree("0.1.0", "deepspeed", "Shampoo", weights(model))


def test_an_optimizer_counts_the_tables_of_its_own_matrices_alone(seed: int) -> None:
    """They are the process's: another model's, of other orders, must not be counted as this one's memory."""

    def stepped(side: int) -> int:
        weight = nn.Parameter(torch.ones(side, side))
        optimizer = Shampoo([("w", weight)], roles={"w": "linear"}, precondition_frequency=1)
        weight.grad = torch.randn(side, side, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        return sum(one.nbytes for one in optimizer.stepper.buffers() if one.dtype == torch.int32 and one.numel() >= 100)

    alone = stepped(40)
    assert alone == 4 * (40 * 41 // 2 + 40 * 40)
    assert stepped(90) == 4 * (90 * 91 // 2 + 90 * 90)
    assert stepped(40) == alone
