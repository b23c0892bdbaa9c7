"""What a prediction reads of a DeepSpeed JSON, with its types checked, and what in it cannot be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ds_optim.blueprint import BlueprintError

Precision = Literal["fp32", "bf16", "fp16", "pure bf16"]


class _JsonPart(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Switch(_JsonPart):
    enabled: bool = False


class _Offload(_JsonPart):
    device: Literal["none", "cpu", "nvme"] = "none"
    ratio: float = 1.0


class _Zero(_JsonPart):
    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: _Offload = _Offload()
    offload_param: _Offload = _Offload()
    contiguous_gradients: bool = True
    zero_hpz_partition_size: PositiveInt = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False


class _DataTypes(_JsonPart):
    grad_accum_dtype: str | None = None


class _Optimizer(_JsonPart):
    type: str
    params: dict[str, Any] = {}


class Training(_JsonPart):
    """The parts of a DeepSpeed JSON that decide memory; everything else is kept and passed on.

    ``"auto"`` and null count as left out.
    """

    optimizer: _Optimizer | None = None
    ds_optim: dict[str, Any] = {}
    zero_optimization: _Zero = _Zero()
    bf16: _Switch = _Switch()
    fp16: _Switch = _Switch()
    torch_autocast: _Switch = _Switch()
    data_types: _DataTypes = _DataTypes()
    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    sequence_parallel_size: PositiveInt = 1
    tensor_parallel: dict[str, Any] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Training:
        """Read a DeepSpeed JSON.

        Raises:
            BlueprintError: a value has the wrong type; each is named.
        """
        try:
            return cls.model_validate(_given(config))
        except ValidationError as error:
            raise BlueprintError(f"the DeepSpeed JSON cannot be read: {in_words(error)}") from error

    @property
    def precision(self) -> Precision:
        """What it trains in."""
        if self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16.enabled else "fp32"

    @property
    def offloads(self) -> bool:
        """Whether optimizer state lies in host memory."""
        return self.zero_optimization.offload_optimizer.device == "cpu"

    def passes(self, world_size: int) -> int:
        """Micro-batches per step."""
        if self.gradient_accumulation_steps:
            return self.gradient_accumulation_steps
        if self.train_batch_size and self.train_micro_batch_size_per_gpu:
            return max(1, self.train_batch_size // (self.train_micro_batch_size_per_gpu * max(1, world_size)))
        return 1

    def micro_batch(self, world_size: int) -> int:
        """Sequences per rank and pass; 1 if nothing says how many."""
        if self.train_micro_batch_size_per_gpu:
            return self.train_micro_batch_size_per_gpu
        return max(1, (self.train_batch_size or 1) // (max(1, world_size) * self.passes(world_size)))

    @property
    def zero_values(self) -> dict[str, Any]:
        """``zero_optimization`` as it was given, the stage left out."""
        return self.zero_optimization.model_dump(exclude_unset=True, exclude={"stage"})

    def problems(self) -> list[str]:
        """What cannot be predicted, as sentences."""
        zero = self.zero_optimization
        found = []
        if zero.offload_param.device != "none":
            found.append("parameters that are offloaded (offload_param) are not predicted: leave it out")
        if zero.offload_optimizer.device == "nvme":
            found.append('optimizer state on NVMe is refused by ds_optim: use "device": "cpu"')
        if zero.offload_optimizer.ratio != 1:
            found.append("offload_optimizer.ratio: a part of the state on the CPU is refused by ds_optim: use 1")
        if not zero.contiguous_gradients and zero.stage in (1, 2):
            found.append("contiguous_gradients: false is not predicted: leave it out")
        if zero.zero_hpz_partition_size > 1 or zero.zero_quantized_weights or zero.zero_quantized_gradients:
            found.append("ZeRO++ (zero_hpz_partition_size, zero_quantized_*) is not predicted: leave it out")
        if self.torch_autocast.enabled:
            found.append("torch_autocast is not predicted: use bf16 or fp16")
        half = self.precision != "fp32"
        if half and self.data_types.grad_accum_dtype not in (None, "bf16", "fp16"):
            found.append("BF16_Optimizer (data_types.grad_accum_dtype) is not predicted: leave it out")
        if self.sequence_parallel_size > 1 or self.tensor_parallel.get("autotp_size", 1) not in (0, 1):
            found.append("sequence and tensor parallelism are not predicted: data-parallel ranks only")
        return found


def in_words(error: ValidationError) -> str:
    """Every value that was refused, and why, in one line."""
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())


def _given(value: Any) -> Any:
    """Without ``"auto"`` and null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None and inner != "auto"}
    return value


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with everything left out that a Trainer would fill in."""
    found: dict[str, Any] = _given(config)
    return found
