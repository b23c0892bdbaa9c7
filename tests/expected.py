"""What a case of `engines` must end with: by the textbook in fp64, and by our own optimizer on whole parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ds_optim
from engines import Case, build_model, constant_gradient, learning_rate
from reference.adam_mini import adam_mini
from reference.adamw import adamw
from reference.adan import adan
from reference.lion import lion
from reference.muon import muon
from reference.shampoo import shampoo
from reference.soap import soap
from reference.swan import swan

HEAD_DIM = 6  # of OddLlama
ROUNDING = 2e-7  # two ulps
MATRIX_RULES = ("Shampoo", "SWAN", "Muon", "NorMuon", "SOAP")


def add_rounding(model: nn.Module, generator: torch.Generator) -> None:
    """Put gradients beside by `ROUNDING` of their largest element, as sums in another order are."""
    for weight in model.parameters():
        assert weight.grad is not None
        noise = torch.randn(weight.shape, generator=generator) * (weight.grad != 0)  # no sum, no rounding
        weight.grad += noise * (ROUNDING * weight.grad.abs().max())


def block_labels(name: str, shape: tuple[int, ...]) -> Tensor:
    """Adam-mini's blocks of OddLlama's parameters, element by element, by the paper's table and the names alone."""
    elements = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    if name.endswith("bias"):
        return elements
    if "norm" in name or len(shape) == 1:
        return torch.zeros_like(elements)
    rows = elements // shape[1]
    return rows // HEAD_DIM if ("q_proj" in name or "k_proj" in name) else rows


def weight_decays(model: nn.Module, case: Case) -> dict[str, float]:
    """The weight decay of every trained parameter."""
    decay = case.options.get("weight_decay", 0.0)
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if case.user_groups:
            found[name] = 0.0 if "mlp" in name else 0.05 if "norm" in name else decay
        else:
            exempt = ("norm" in name or name.endswith("bias")) and not case.client
            found[name] = 0.0 if exempt else decay
    return found


def gradient(case: Case, name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """What reaches DeepSpeed: micro-batches add up, unused parameters count as zero."""
    if case.unused_from is not None and step >= case.unused_from and "sometimes" in name:
        return torch.zeros(shape)
    return case.accumulation * constant_gradient(name, shape, step, case.seed, case.more_bits)


def gradients(case: Case, shapes: Mapping[str, tuple[int, ...]], step: int) -> dict[str, Tensor]:
    """What the optimizer sees, fp64: all of them, scaled down together where DeepSpeed clips."""
    found = {name: gradient(case, name, shape, step).double() for name, shape in shapes.items()}
    if not case.clipping:
        return found
    norm = torch.cat([grad.reshape(-1) for grad in found.values()]).norm()
    share = (case.clipping / (norm + 1e-6)).clamp(max=1)
    return {name: grad * share for name, grad in found.items()}


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of OddLlama is one for a whole-matrix rule, by its name alone."""
    adams = ("embed_tokens", "lm_head", "norm", "bias", "gain")
    return len(shape) == 2 and not any(part in name for part in adams)


def by_matrix_oracle(case: Case) -> dict[str, Tensor]:
    """As `by_oracle` for a whole-matrix rule: Adam where there is no matrix."""
    model = build_model(case)
    params = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if is_matrix(name, tuple(p.shape))}
    others = {name: p for name, p in params.items() if name not in matrices}
    decay = weight_decays(model, case)
    options = {key: value for key, value in case.options.items() if not key.startswith("exchange_")}
    optimizer = case.optimizer.split(".")[-1]
    betas = options.get("betas", {"SWAN": (0.9, 0.999), "SOAP": (0.95, 0.95)}.get(optimizer, (0.9, 0.95)))
    if optimizer in ("Shampoo", "SOAP"):
        made = getattr(ds_optim, optimizer)(
            [(name, nn.Parameter(p.float())) for name, p in matrices.items()], roles={"*": "linear"}, **case.options
        )
        offsets: dict[str, list[int]] = {}
        for block in made.plan.blocks:  # in the order of the grid
            offsets.setdefault(made.plan.layouts[block.tensor].parameters[0].name, []).append(block.offset)
    state: dict[str, dict[str, Tensor]] = {}
    adam_state: dict[str, dict[str, Tensor]] = {}
    for step in range(1, case.steps + 1):
        lr = learning_rate(step)
        grads = gradients(case, {name: tuple(p.shape) for name, p in params.items()}, step)
        if optimizer == "Shampoo":
            settings = {
                "ridge": "relative",
                "matrix_eps": 1e-6,
                "start_preconditioning_step": options["precondition_frequency"],
                "refresh": "staggered",
                "offsets": offsets,
                **options,
                "weight_decay": decay,
            }
            shampoo(matrices, grads, state, step, lr=lr, **settings)
        elif optimizer == "SOAP":
            soap(matrices, grads, state, step, lr=lr, **{**options, "weight_decay": decay, "offsets": offsets})
        elif optimizer in ("Muon", "NorMuon"):
            beta2 = {"beta2": 0.95} if optimizer == "NorMuon" else {}
            muon(matrices, grads, state, step, lr=lr, **{**beta2, **options, "weight_decay": decay})
        else:
            swan(matrices, grads, state, step, lr=lr, axis="in", weight_decay=decay)
        adamw(others, grads, adam_state, step, lr=lr, betas=betas, weight_decay=decay)
    return {name: (matrices | others)[name].reshape(-1) for name in params}


def by_oracle(case: Case) -> dict[str, Tensor]:
    """Flat fp64 parameters after the case's steps, by the textbook."""
    if case.optimizer.split(".")[-1] in MATRIX_RULES:
        return by_matrix_oracle(case)
    model = build_model(case)
    params = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    options: dict[str, Any] = {**case.options, "weight_decay": weight_decays(model, case)}
    options.pop("state_dtype", None)
    oracle: Any = {"AdamW": adamw, "Lion": lion, "Adan": adan, "AdamMini": adam_mini}[case.optimizer.split(".")[-1]]
    if oracle is adam_mini:
        options["labels"] = {name: block_labels(name, shape) for name, shape in shapes.items()}
    state: dict[str, dict[str, Tensor]] = {}
    for step in range(1, case.steps + 1):
        oracle(params, gradients(case, shapes, step), state, step, lr=learning_rate(step), **options)
    return {name: p.reshape(-1) for name, p in params.items()}


def by_one_process(case: Case) -> dict[str, Tensor]:
    """Flat fp32 parameters after the case's steps, by our optimizer on whole parameters, without any engine."""
    model = build_model(case).float()
    decays = weight_decays(model, case)
    groups: dict[float, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if name in decays:
            groups.setdefault(decays[name], []).append((name, parameter))
    cls = getattr(ds_optim, case.optimizer.split(".")[-1])
    listed = [{"params": pairs, "weight_decay": decay} for decay, pairs in groups.items()]
    optimizer = cls(listed, roles=model, **{k: v for k, v in case.options.items() if k != "weight_decay"})
    for step in range(1, case.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        trained = {name: parameter for name, parameter in model.named_parameters() if name in decays}
        for name, grad in gradients(case, {n: tuple(p.shape) for n, p in trained.items()}, step).items():
            trained[name].grad = grad.float()
        optimizer.step()
    return {n: p.detach().reshape(-1) for n, p in model.named_parameters() if n in decays}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, in units of 1 + |wanted|."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    gaps = []
    for name, values in wanted.items():
        gaps.append(((found[name].double() - values.double()).abs() / (1 + values.double().abs())).max().item())
    return max(gaps)
