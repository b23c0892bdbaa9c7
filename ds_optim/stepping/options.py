"""The settings of a whole optimizer, and what is wrong with settings of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.precision import PRECISIONS, MatmulPrecision
from ds_optim.rule import Betas, Rule, SettingCheck, WholeMatrix, flag, one_of, whole_number
from ds_optim.sharding.schedule import BUCKET_SIZE

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
_STATE_DTYPES = {**_DTYPES, "int8": torch.int8}

COMMON = ("roles", "state_dtype", "int8_embeddings", "bf16_stochastic_round", "seed")
"""Options that every optimizer's constructor takes."""

EXCHANGE = ("exchange_bucket_size", "exchange_dtype")
"""Further options of whole-matrix rules, whose blocks travel."""

PRODUCTS = ("matmul_precision",)
"""Options of those whole-matrix rules that leave their products to `ds_optim.linalg`."""

_OURS_ALONE = ("roles", "int8_embeddings", "bf16_stochastic_round", "seed")  # that no group has a reason to repeat


def dtype_of(value: Any) -> torch.dtype | None:
    """A dtype that state can be kept in, also from its name in a JSON (``"bf16"``, ``"torch.float32"``).

    ``torch.int8`` stands for eight bits, see `ds_optim.stepping.eight_bits`.
    """
    return _STATE_DTYPES.get(str(value).removeprefix("torch."))


def _dtype(allowed: Mapping[str, torch.dtype], wanted: str) -> SettingCheck:
    return SettingCheck(lambda value: dtype_of(value) in allowed.values(), wanted, is_optional=False)


_CHECKS: Mapping[str, SettingCheck] = {
    "state_dtype": _dtype(_STATE_DTYPES, "be fp32, bf16 or int8"),
    "int8_embeddings": flag(),
    "bf16_stochastic_round": flag(),
    "seed": whole_number(0),
}
_CHECKS_OF_MATRICES: Mapping[str, SettingCheck] = {
    "exchange_bucket_size": whole_number(1, "of elements "),
    "exchange_dtype": _dtype(_DTYPES, "be fp32 or bf16"),
    "matmul_precision": one_of(PRECISIONS),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a whole optimizer, see `ShardedOptimizer`."""

    state_dtype: torch.dtype = torch.float32
    int8_embeddings: bool = False
    bf16_stochastic_round: bool = False
    seed: int = 0
    exchange_bucket_size: int = BUCKET_SIZE
    exchange_dtype: torch.dtype = torch.float32
    matmul_precision: MatmulPrecision = "ieee"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From what a constructor was given, which was judged before."""
        dtypes = {key: dtype_of(value) or torch.float32 for key, value in given.items() if key.endswith("_dtype")}
        return cls(**{**given, **dtypes})

    def denied_by(self, group: Mapping[str, Any]) -> list[str]:
        """What a parameter group may not have, as sentences; other people's groups repeat some of what is so."""
        return [
            f"{key} is a setting of the whole optimizer, not of one group"
            for key in (*COMMON, *EXCHANGE, *PRODUCTS)
            if key in group and not self._has(key, group[key])
        ]

    def _has(self, key: str, value: Any) -> bool:
        return key not in _OURS_ALONE and bool(
            getattr(self, key) == (dtype_of(value) if key.endswith("_dtype") else value)
        )


def setting_problems(rule: Rule, settings: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with settings, as sentences; those that are absent are not judged."""
    problems = []
    for key in ("lr", "eps", "weight_decay"):
        if key in settings:
            problems += _number_problems(key, settings[key])
    problems += [*judged(_CHECKS, settings), *_contradictions(settings)]
    if settings.get("betas") is not None:
        problems += _betas_problems(rule.betas, settings["betas"])
    if isinstance(rule, WholeMatrix):
        problems += judged(_CHECKS_OF_MATRICES, settings)
    return [*problems, *judged(rule.checks, settings), *rule.contradictions(settings)]


def _contradictions(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with common settings that are each good by themselves."""
    asked, dtype = settings.get("int8_embeddings"), settings.get("state_dtype")
    if asked is True and dtype is not None and dtype_of(dtype) != torch.int8:
        return ['int8_embeddings is of state in eight bits: give state_dtype="int8" too, or leave it out']
    return []


def judged(checks: Mapping[str, SettingCheck], settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that are checked, as sentences."""
    return [
        problem for key, check in checks.items() if key in settings for problem in check.problems(key, settings[key])
    ]


def _number_problems(key: str, value: Any) -> list[str]:
    shown = value
    if isinstance(value, Tensor) and value.numel() == 1:
        if value.device.type != "cpu":
            return []  # looking would wait for the device
        shown = value = float(value)
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    good = is_number and 0 <= float(value) < float("inf")
    return [] if good else [f"{key} must be a finite number >= 0, not {shown!r}"]


def _betas_problems(wanted: Betas, betas: Any) -> list[str]:
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != wanted.count:
        trainers = (
            ' (a Trainer fills "auto" with two; put all three in the JSON\'s top-level "ds_optim": {"betas": [...]} '
            "instead)"
            if wanted.count == 3
            else ""
        )
        return [f"betas must be {wanted.count} numbers, not {betas!r}{trainers}"]
    problems = []
    for position, beta in enumerate(betas):
        highest = wanted.last_may_be_one and position == wanted.count - 1 and beta == 1
        if isinstance(beta, bool) or not isinstance(beta, Real) or not (0 <= float(beta) < 1 or highest):
            last = ", the last in [0, 1]" if wanted.last_may_be_one else ""
            problems.append(f"every beta must lie in [0, 1){last}, not {beta!r}")
    return problems


def kind_problems(name: str, parameter: Tensor) -> list[str]:
    """What a parameter is that is no dense fp32, bf16 or fp16 tensor, and what to do about it."""
    if parameter.is_sparse:
        return [f"{name} is sparse: give the optimizer a dense one (to_dense())"]
    if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return []
    if parameter.is_complex():
        return [
            f"{name} is {parameter.dtype}, and moments of complex numbers are not defined here: keep it as two real "
            "parameters, or as torch.view_as_real(...) of it in fp32"
        ]
    if parameter.dtype == torch.float64:
        return [f"{name} is torch.float64, which no kernel here steps: convert it with model.float()"]
    return [
        f"{name} is {parameter.dtype}: convert it to fp32, bf16 or fp16, or freeze it and leave it out of the optimizer"
    ]
