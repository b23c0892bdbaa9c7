"""What a strategy hands to an optimizer: for each local tensor that it will step, where its elements come from.

A reader of a strategy (`ds_optim.deepspeed.reader`, say) makes `Binding`s; an optimizer consumes them and knows nothing
else about sharding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.sharding.exchange import Ranks, rank_in_job
from ds_optim.sharding.layout import Layout, ParameterSpec, Replicated, check, digest


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """One local tensor of a strategy.

    Attributes:
        layout: what the tensor holds, on every rank of its shard group.
        rank: this process's rank in the group.
        group: the shard group; None for a tensor that this process holds whole.
        owners: the group over which the owners of blocks are spread, where it is more than the shard group: HSDP
            replicates shards. Its ranks are those of one replica's shard group behind those of another's.
    """

    layout: Layout
    rank: int = 0
    group: dist.ProcessGroup | None = None
    owners: dist.ProcessGroup | None = None

    @property
    def owner_group(self) -> dist.ProcessGroup | None:
        """The group over which the owners of blocks are spread."""
        return self.owners if self.owners is not None else self.group

    @property
    def replicas(self) -> int:
        """How many shard groups hold the same."""
        return 1 if self.owners is None else dist.get_world_size(self.owners) // self.layout.world_size


@dataclass(frozen=True, slots=True)
class Binding:
    """All local tensors of one engine, in the order in which every rank steps them.

    Attributes:
        tensors: the local tensors, by identity.
        ranks: the processes of the engine, all shard groups of the tensors among them.
        problems: what the reader found that cannot be matched; `verify` raises them on every rank.
        settle: to be called when a step begins, before its gradients are read; None where nothing can be left in them
            from an earlier one.
        is_apart: whether some of the ranks step other parameters than others: stages of a pipeline, experts.
        steps: how often the engine has stepped, in all calls of one step the same; None: every call is a step.
    """

    tensors: Mapping[Tensor, BoundTensor]
    ranks: Ranks
    problems: tuple[str, ...] = field(default=())
    settle: Callable[[], None] | None = None
    is_apart: bool = False
    steps: Callable[[], int] | None = None


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor is all here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local_of` each, without a call for each: a step has hundreds."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def local_grad(tensor: Tensor) -> Tensor | None:
    """What this rank holds of a parameter's gradient, brought to where the parameter lies (a collective, if need be).

    Under tensor parallelism the gradient of a replicated parameter may still be a sum over ranks that is to be made.

    Raises:
        ValueError: the gradient of a DTensor is a plain tensor.
    """
    grad = tensor.grad
    if grad is None or not isinstance(tensor, DTensor):
        return grad
    if not isinstance(grad, DTensor):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} is a DTensor, its gradient is not: let backward() make it, or "
            "give a DTensor of the same mesh and placements (torch.distributed.tensor.distribute_tensor)"
        )
    if grad.placements != tensor.placements:
        grad = grad.redistribute(placements=tensor.placements)
    return grad.to_local()


def whole(name: str, parameter: Tensor) -> BoundTensor:
    """The binding of a parameter that this process holds whole."""
    return BoundTensor(Replicated(ParameterSpec(name, tuple(parameter.shape))))


def verify(binding: Binding, backend: str, plans: Mapping[dist.ProcessGroup | None, str]) -> None:
    """Raise on every rank, before any weight changes, unless all ranks of a binding can step it exactly.

    Checks on this rank what the reader of the strategy found, every layout's own sums and the tensors' sizes, then
    compares layout hashes and kernels over the binding's ranks, so that none of them goes on while another raises.

    Args:
        binding: this rank's.
        backend: the kernels that this rank would use.
        plans: a hash of what else the ranks of each shard group must agree on.

    Raises:
        RuntimeError: lists every problem of every rank.
    """
    problems = list(binding.problems)
    for tensor, bound in binding.tensors.items():
        problems += check(bound.layout)
        expected = bound.layout.local_numel(bound.rank)
        actual = local_of(tensor).numel()
        if actual != expected:
            names = ", ".join(spec.name for spec in bound.layout.parameters[:3])
            problems.append(f"local tensor of {names} ... has {actual} elements, its layout says {expected}")
    grouped: dict[tuple[int, ...], list[Layout]] = {}
    planned: dict[tuple[int, ...], str] = {}
    for bound in binding.tensors.values():
        grouped.setdefault(_members(bound.group), []).append(bound.layout)
    for group in dict.fromkeys(bound.group for bound in binding.tensors.values()):  # of which two may have the same
        planned[_members(group)] = planned.get(_members(group), "") + plans.get(group, "")
    hashes = {members: digest(layouts) + planned[members] for members, layouts in grouped.items()}
    mine = (problems, hashes, backend)

    ranks = binding.ranks.everyones(mine)
    reasons = [f"rank {rank}: {problem}" for rank, (found, _, _) in ranks.items() for problem in found]
    for members in sorted({members for _, hashes, _ in ranks.values() for members in hashes}):
        hashed = [ranks[rank][1].get(members) for rank in members]
        if len(set(hashed)) > 1:
            by_rank = {rank: _short(value) for rank, value in zip(members, hashed, strict=True)}
            reasons.append(f"the ranks of a shard group lay it out or plan it differently (hash by rank): {by_rank}")
    kernels = {used for _, _, used in ranks.values() if used}  # a rank may have nothing to step
    if len(kernels) > 1:
        listed = {used: [rank for rank, entry in ranks.items() if entry[2] == used] for used in sorted(kernels)}
        reasons.append(
            f"ranks would use different kernels, which round differently: {listed}; install a C++ compiler on every "
            "host or set DS_OPTIM_KERNELS to the same value everywhere"
        )
    if reasons:
        raise RuntimeError(
            "ds_optim cannot match the optimizer's tensors with the model's parameters, nothing was changed:\n- "
            + "\n- ".join(reasons)
            + "\nWhere no remedy is named, tensors are laid out in a way that is not known here: use versions of torch "
            "and deepspeed that are known to work (ds-optim doctor) or another strategy, and report it"
        )


def _short(hashed: str | None) -> str:
    """Enough of a hash of layouts, and of a plan behind it, to tell them apart."""
    return "nothing" if hashed is None else "/".join(hashed[start : start + 8] for start in range(0, len(hashed), 64))


def _members(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The global ranks of a group; a tensor without one is this process's own business."""
    if group is not None:
        return tuple(dist.get_process_group_ranks(group))
    return (rank_in_job(),)
