"""The oracles and the product reproduce the official implementations (see tests/vectors/README.md) to 1e-6 in fp32.

Also: the vectors are sharp enough to notice a wrong block, a wrong decay and a wrong form, without which agreement says
little.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import ds_optim
from reference.adam_mini import adam_mini
from reference.adamw import adamw
from reference.adan import adan
from reference.lion import lion
from reference.muon import muon
from reference.shampoo import shampoo, shampoo_paper
from reference.soap import soap

FOLDER = Path(__file__).parent / "vectors"
FILES = ["adamw", "lion", "adan_prox", "adan_no_prox", "adam_mini", "muon_original", "muon_match_rms_adamw"]
SHAMPOO_FILES = ["shampoo_graft_adam", "shampoo_graft_adam_f3"]
ORACLES: Mapping[str, Callable[..., None]] = {
    "AdamW": adamw,
    "Lion": lion,
    "Adan": adan,
    "AdamMini": adam_mini,
    "Shampoo": shampoo,
    "Muon": muon,
    "SOAP": soap,
}
TOLERANCE = 1e-6  # relative and absolute
SOAP_TOLERANCE = 2e-4  # of the distance moved: eigenvectors of fp32 matrices
# What a user would write for bare parameters; every other matrix has one block per row anyway.
ROLES = {
    "*.q_proj.weight": {"kind": "query", "head_dim": 6},
    "*.k_proj.weight": {"kind": "key", "head_dim": 6},
    "*norm.weight": "norm",
}
MATRICES = {"*": "linear"}  # three bare matrices

# The official runs use a small lr, eps and weight decay, so the forms of Adan and the place of eps hardly show in them
# (the two forms differ by lr^2 * weight_decay). Here every term is of the size of the parameters.
HARSH: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"eps": 0.1},
    "lion": {},
    "adan_prox": {"eps": 0.1},
    "adan_no_prox": {"eps": 0.1},
    "adam_mini": {"eps": 0.1},
    "muon_original": {},
    "muon_match_rms_adamw": {},
    "shampoo_graft_adam": {"graft_eps": 0.1, "epsilon": 0.1},
    "shampoo_graft_adam_f3": {"graft_eps": 0.1, "epsilon": 0.1},
}
HARSH_LR = (0.01, 0.03, 0.1, 0.1, 0.05, 0.02, 0.0)  # by step
HARSH_DECAY = 2.0


@dataclass(frozen=True)
class Vector:
    """One file: `grads[t - 1]` belongs to step t, `kept[t]` are the official parameters after step t."""

    optimizer: str
    arch: Mapping[str, int]
    hyper: Mapping[str, Any]
    init: Mapping[str, Tensor]
    grads: tuple[Mapping[str, Tensor], ...]
    kept: Mapping[int, Mapping[str, Tensor]]

    def lr(self, t: int) -> float:
        """The learning rate of step t."""
        rate = self.hyper["lr"]
        return rate if isinstance(rate, float) else rate[t - 1]

    @property
    def weight_decay(self) -> dict[str, float]:
        """Per name: Adam-mini's official code exempts norms and biases, the others got every tensor in one group."""
        exempt = ("norm", "bias") if self.optimizer == "AdamMini" else ()
        return {name: 0.0 if any(word in name for word in exempt) else self.hyper["weight_decay"] for name in self.init}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the learning rate and decay, as keyword arguments of the oracle and of the product alike."""
        if self.optimizer == "Shampoo":  # its file names some settings as Meta's code does, and some in words
            return {
                "betas": tuple(self.hyper["betas"]),
                "eps": self.hyper["graft_eps"],
                "matrix_eps": self.hyper["epsilon"],
                "ridge": "absolute",
                "refresh": "together",
                **{
                    name: self.hyper[name]
                    for name in (
                        "max_preconditioner_dim",
                        "precondition_frequency",
                        "start_preconditioning_step",
                        "graft",
                        "graft_beta2",
                    )
                },
            }
        settings = {name: value for name, value in self.hyper.items() if name not in ("lr", "weight_decay")}
        if self.optimizer == "Muon":
            return {"adjust_lr": settings.pop("adjust_lr_fn"), **settings}
        if self.optimizer == "SOAP":  # the rest of it is said of what is not so here
            settings = {name: settings[name] for name in ("betas", "eps", "precondition_frequency")}
        return settings | {"betas": tuple(settings["betas"])}

    @property
    def head_dim(self) -> int:
        return self.arch["hidden_size"] // self.arch["num_attention_heads"]


def load(name: str) -> Vector:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    steps = {kind: {int(key.split("/")[1]) for key in tensors if key.startswith(kind)} for kind in ("grad", "param")}

    def under(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    return Vector(
        optimizer=case["optimizer"],
        arch=case.get("arch", {}),
        hyper=case["hyper"],
        init=under("init/"),
        grads=tuple(under(f"grad/{t}/") for t in range(1, max(steps["grad"]) + 1)),
        kept={t: under(f"param/{t}/") for t in sorted(steps["param"])},
    )


def harsh(name: str) -> Vector:
    """The vector's parameters and gradients under the HARSH settings; there are no official results for these."""
    vector = load(name)
    hyper = {**vector.hyper, **HARSH[name], "lr": HARSH_LR, "weight_decay": HARSH_DECAY}
    return replace(vector, hyper=hyper, kept={})


def block_labels(vector: Vector) -> dict[str, Tensor]:
    """The official partition, element by element: heads of queries and keys, rows of other matrices, whole norms."""
    labels = {}
    for name, tensor in vector.init.items():
        if tensor.dim() == 1:
            labels[name] = torch.zeros(tensor.shape, dtype=torch.int64)
            continue
        row = torch.arange(tensor.shape[0])
        block = row // vector.head_dim if "q_proj" in name or "k_proj" in name else row
        labels[name] = block[:, None].expand(tensor.shape)
    return labels


def oracle_path(
    vector: Vector,
    *,
    weight_decay: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    **changed: Any,
) -> list[dict[str, Tensor]]:
    """The oracle's parameters after each step."""
    params = {name: tensor.to(dtype) for name, tensor in vector.init.items()}
    state: dict[str, dict[str, Tensor]] = {}
    settings = vector.settings | ({"labels": block_labels(vector)} if vector.optimizer == "AdamMini" else {}) | changed
    path = []
    for t, grads in enumerate(vector.grads, start=1):
        ORACLES[vector.optimizer](
            params, grads, state, t, lr=vector.lr(t), weight_decay=weight_decay or vector.weight_decay, **settings
        )
        path.append(dict(params))
    return path


def roles_of(vector: Vector) -> Mapping[str, Any]:
    """What a user would write for the bare parameters of this file."""
    return MATRICES if vector.optimizer in ("Shampoo", "Muon", "SOAP") else ROLES


def product_path(vector: Vector, roles: Any, model: torch.nn.Module | None = None) -> list[dict[str, Tensor]]:
    """The parameters of ds_optim's optimizer after each step, on `model` if there is one, else on bare parameters."""
    parameters = (
        dict(model.named_parameters())
        if model is not None
        else {name: torch.nn.Parameter(tensor.clone()) for name, tensor in vector.init.items()}
    )
    by_decay: dict[float, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, decay in vector.weight_decay.items():
        by_decay.setdefault(decay, []).append((name, parameters[name]))
    together = {"refresh": "together"} if vector.optimizer == "SOAP" else {}  # as Shampoo's settings have it already
    optimizer = getattr(ds_optim, vector.optimizer)(
        [{"params": pairs, "weight_decay": decay} for decay, pairs in by_decay.items()],
        roles=roles,
        **{**together, **vector.settings},
    )
    path = []
    for t, grads in enumerate(vector.grads, start=1):
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = vector.lr(t)
        optimizer.step()
        path.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, grads[name]), f"{name}: the optimizer wrote to the gradient"
    return path


def largest_error(path: list[dict[str, Tensor]], vector: Vector) -> float:
    """Largest |difference| / (1 + |official|) over the kept steps: within TOLERANCE, relative and absolute together."""
    return max(
        float(((path[t - 1][name].double() - official.double()).abs() / (1 + official.double().abs())).max())
        for t, kept in vector.kept.items()
        for name, official in kept.items()
    )


@pytest.mark.parametrize("name", [*FILES, *SHAMPOO_FILES])
def test_the_oracle_reproduces_the_official_code(name: str) -> None:
    vector = load(name)
    assert largest_error(oracle_path(vector), vector) <= TOLERANCE


@pytest.mark.parametrize("name", [*FILES, *SHAMPOO_FILES])
def test_the_oracle_in_fp64_reproduces_the_official_code(name: str) -> None:
    vector = load(name)
    assert largest_error(oracle_path(vector, dtype=torch.float64), vector) <= TOLERANCE


@pytest.mark.parametrize("name", [*FILES, *SHAMPOO_FILES])
def test_the_optimizer_reproduces_the_official_code(name: str) -> None:
    vector = load(name)
    assert largest_error(product_path(vector, roles_of(vector)), vector) <= TOLERANCE


def of_what_moved(path: list[dict[str, Tensor]], vector: Vector) -> float:
    """Largest distance from the official parameters, in units of how far those are from where they began."""
    return max(
        float(
            (path[t - 1][name].double() - official.double()).norm()
            / max(float((official - vector.init[name]).norm()), 1e-30)
        )
        for t, kept in vector.kept.items()
        for name, official in kept.items()
    )


def test_soap_reproduces_the_official_code() -> None:
    vector = load("soap")
    for path in (
        oracle_path(vector, dtype=torch.float64),
        oracle_path(vector),
        product_path(vector, roles_of(vector)),
    ):
        assert of_what_moved(path, vector) <= SOAP_TOLERANCE
    assert torch.equal(vector.kept[1]["w_a"], vector.init["w_a"])  # the first step moves nothing


@pytest.mark.parametrize(
    "changed", [{"precondition_frequency": 2}, {"betas": (0.95, 0.9)}, {"max_preconditioner_dim": 8}, {"eps": 1e-3}]
)
def test_the_vectors_notice_another_soap(changed: dict[str, Any]) -> None:
    vector = load("soap")
    assert of_what_moved(oracle_path(vector, dtype=torch.float64, **changed), vector) > 10 * SOAP_TOLERANCE


@pytest.mark.parametrize("name", ["muon_original", "muon_match_rms_adamw"])
@pytest.mark.parametrize(
    "changed",
    [
        {"momentum": 0.9},
        {"nesterov": False},
        {"ns_steps": 4},
        {"adjust_lr": "the other"},
        {"coefficients": [(3.0, -3.2, 1.2)] * 5},
        {"beta2": 0.95},
    ],
)
def test_the_vectors_notice_another_muon(name: str, changed: dict[str, Any]) -> None:
    vector = load(name)
    if "adjust_lr" in changed:
        (other,) = {"original", "match_rms_adamw"} - {vector.settings["adjust_lr"]}
        changed = {"adjust_lr": other}
    assert largest_error(oracle_path(vector, **changed), vector) > 30 * TOLERANCE


def test_adam_mini_reproduces_the_official_code_with_roles_read_from_the_model() -> None:
    vector = load("adam_mini")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: value for key, value in vector.arch.items() if key not in ("steps", "kept")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    assert model.load_state_dict(dict(vector.init), strict=True)
    assert largest_error(product_path(vector, model, model), vector) <= TOLERANCE


@pytest.mark.parametrize("name", [*FILES, *SHAMPOO_FILES])
def test_the_vectors_notice_a_wrong_weight_decay(name: str) -> None:
    vector = load(name)
    halved = {key: value / 2 for key, value in vector.weight_decay.items()}
    assert largest_error(oracle_path(vector, weight_decay=halved), vector) > 3 * TOLERANCE


def test_the_vectors_notice_blocks_of_another_size() -> None:
    vector = load("adam_mini")
    for kind in ("q_proj", "k_proj", "v_proj", "lm_head", "embed_tokens", "norm"):
        wrong = block_labels(vector)
        for name, tensor in vector.init.items():
            if kind in name:  # the whole tensor for matrices, single elements for norms
                wrong[name] = torch.arange(tensor.numel()) if tensor.dim() == 1 else torch.zeros_like(wrong[name])
        assert largest_error(oracle_path(vector, labels=wrong), vector) > 3 * TOLERANCE, kind


@pytest.mark.parametrize("name", SHAMPOO_FILES)
@pytest.mark.parametrize(
    "changed",
    [
        {"max_preconditioner_dim": 12},
        {"max_preconditioner_dim": 128},
        {"exponent": -1 / 2},
        {"graft": None},
        {"graft_beta2": 0.9},
        {"precondition_frequency": 2},
        {"start_preconditioning_step": 4},
        {"matrix_eps": 1e-3},
        {"ridge": "relative", "matrix_eps": 1e-3},
    ],
    ids=str,
)
def test_the_vectors_notice_another_shampoo(name: str, changed: dict[str, Any]) -> None:
    vector = load(name)
    assert largest_error(oracle_path(vector, **changed), vector) > 30 * TOLERANCE


def test_shampoo_staggered_by_nothing_is_shampoo_together() -> None:
    vector = load("shampoo_graft_adam_f3")
    nothing = {name: [0] * 100 for name in vector.init}
    assert largest_error(oracle_path(vector, refresh="staggered", offsets=nothing), vector) <= TOLERANCE
    ones = {name: [1] * 100 for name in vector.init}  # refreshes at steps 5, 8, ...
    assert largest_error(oracle_path(vector, refresh="staggered", offsets=ones), vector) > 30 * TOLERANCE


@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 4, 5), (2, 3, 4, 3)])
def test_shampoo_without_its_additions_is_the_papers(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    init = torch.randn(shape, dtype=torch.float64, generator=generator)
    paper, today = {"w": init}, {"w": init}
    states: list[dict[str, dict[str, Tensor]]] = [{}, {}]
    for t in range(1, 6):
        grads = {"w": torch.randn(shape, dtype=torch.float64, generator=generator)}
        shampoo_paper(paper, grads, states[0], t, lr=0.1, eps=0.01, weight_decay=0.1)
        plain = {"betas": (0.0, 1.0), "matrix_eps": 0.01, "ridge": "absolute", "graft": None}
        shampoo(today, grads, states[1], t, lr=0.1, weight_decay=0.1, **plain)
        torch.testing.assert_close(today["w"], paper["w"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*FILES, *SHAMPOO_FILES])
def test_the_optimizer_agrees_with_the_oracle_where_every_term_counts(name: str) -> None:
    vector = harsh(name)
    product, oracle = product_path(vector, roles_of(vector)), oracle_path(vector, dtype=torch.float64)
    for step, (found, wanted) in enumerate(zip(product, oracle, strict=True), start=1):
        for key, tensor in wanted.items():
            torch.testing.assert_close(
                found[key].double(),
                tensor,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda text, at=(key, step): f"{at}: {text}",
            )


def test_every_term_counting_tells_the_forms_of_adan_apart() -> None:
    vector = harsh("adan_prox")
    two_forms = [oracle_path(vector, no_prox=no_prox)[-1]["lm_head.weight"] for no_prox in (False, True)]
    assert float((two_forms[0] - two_forms[1]).abs().max()) > 1e-3
