"""Real DeepSpeed engines for the tests: a small model of awkward shapes, gradients that are the same bits everywhere.

Every gradient is replaced by a constant of (step, parameter): a multiple of 3 * 2^-10, small enough that three of them
add up exactly in bf16, so that averaging over 1, 2, 3 or 4 ranks is exact. What is left to differ between strategies is
the optimizer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.known_transformers import tied as with_ties
from ds_optim.releases import DEEPSPEED
from ds_optim.stepping.sharded import ShardedOptimizer

VOCABULARY, WIDTH = 23, 15
SIZES = VOCABULARY, WIDTH, 19  # odd, two of them primes; blocks of 8, or of 3, straddle their ends
WIDER = 37, 21, 27  # of `benchmarks/full_matrix.py` and of checkpoints that were written long ago


class OddLlama(nn.Module):
    """A transformers Llama whose sizes are odd, with a bias, a conv and a tiny tensor beside it.

    Grouped-query attention with head_dim * heads != hidden size; tied embeddings on request; a parameter with fewer
    elements than there are ranks; a module that only some steps use.
    """

    def __init__(self, *, tied: bool = False, layers: int, sizes: tuple[int, int, int] = SIZES) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary, width, intermediate = sizes
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=6,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        self.llama = with_ties(LlamaForCausalLM(config))
        self.extra = nn.Linear(width, 5)
        self.sometimes = nn.Linear(width, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, use_all: bool = True) -> Tensor:
        output = self.llama(input_ids=tokens, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        loss = output.logits.float().square().mean() + (self.gain * self.extra(hidden)).float().square().mean()
        if use_all:
            loss = loss + self.sometimes(hidden).float().square().mean()
        return loss


def constant_gradient(name: str, shape: tuple[int, ...], step: int, seed: int, more_bits: int = 0) -> Tensor:
    """The gradient of one parameter at one step: 3 * integer * 2^-10, |integer| <= 28, some of them zero.

    ``more_bits``: as many binary places behind the integer, for fp32 only; averages stay exact up to 16.
    """
    generator = torch.Generator().manual_seed(hash((seed, step)) % 2**31 + sum(map(ord, name)))
    largest = 28 << more_bits
    return 3.0 * torch.randint(-largest, largest + 1, shape, generator=generator).float() / (1024 << more_bits)


def learning_rate(step: int) -> float:
    """A changing learning rate: warm-up from a small value, then decay."""
    return 1e-2 * min(step / 3, 1.0) * 0.93**step


FLAT_BF16: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
"""What gives ZeRO-1 DeepSpeed's BF16_Optimizer."""
if DEEPSPEED.is_before("0.19.0"):  # what is refused otherwise
    FLAT_BF16["bf16"]["immediate_grad_update"] = True


@dataclass(frozen=True)
class Case:
    """One training run of a few steps."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    stage: int = 2
    precision: str = "fp32"  # fp32, bf16, bf16_optimizer (ZeRO-1 with fp32 accumulation), fp16
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    layers: int = 1  # one has every kind of parameter
    sizes: tuple[int, int, int] = SIZES
    zero_init: bool = False
    frozen: tuple[str, ...] = ()
    user_groups: bool = False
    client: bool = False
    accumulation: int = 1
    steps: int = 6
    seed: int = 0
    more_bits: int = 0  # of the gradients; their squares then round when they are added up
    unused_from: int | None = None  # `sometimes` is used before this step only
    clipping: float = 0.0  # the global norm above which DeepSpeed scales gradients down; 0: never

    def config(self) -> dict[str, Any]:
        """The DeepSpeed configuration."""
        zero = {"stage": self.stage, **self.zero}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": False,
            **self.extra,
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.precision == "bf16_optimizer":
            config |= FLAT_BF16
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
        if not self.client:
            config["optimizer"] = {"type": self.optimizer, "params": self.options}
        return config


def build_model(case: Case) -> nn.Module:
    """The case's model, the same weights on every rank and under every strategy."""
    torch.manual_seed(1234 + case.seed)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(case.precision, torch.bfloat16)
    model = OddLlama(tied=case.tied, layers=case.layers, sizes=case.sizes).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in case.frozen))
    return model


def build_engine(case: Case) -> tuple[Any, nn.Module]:
    """A DeepSpeed engine for the case, on this rank."""
    import deepspeed

    import ds_optim

    context: Any = contextlib.nullcontext()
    if case.zero_init:
        source = build_model(case)
        context = deepspeed.zero.Init(config_dict_or_path=case.config())
    with context:
        model = build_model(case)
    if case.zero_init:
        for target, origin in zip(model.parameters(), source.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    target.data.copy_(origin.data)
    arguments: dict[str, Any] = {"model": model, "config": case.config()}
    groups = None
    if case.user_groups:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if "mlp" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named if "mlp" not in n and "norm" not in n and n != "gain"]},
            {"params": [p for n, p in named if n == "gain"]},  # one element: some ranks hold nothing of it
            {"params": [p for n, p in named if "norm" in n and "mlp" not in n], "weight_decay": 0.05},
        ]
    if case.client:
        cls = getattr(ds_optim, case.optimizer.split(".")[-1])
        arguments["optimizer"] = cls(groups or model.named_parameters(), **case.options)
    elif groups:
        arguments["model_parameters"] = groups
    if case.precision == "fp16":
        # DeepSpeed asks whether the CPU is fast at fp16 (AMX); torch computes it on any.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    engine, *_ = deepspeed.initialize(**arguments)
    return able_to_gather(engine), model


def able_to_gather(engine: Any) -> Any:
    """An engine whose optimizer may be another's, which steps on CPUs too.

    Before 0.19 DeepSpeed gathers weights inside autograd, which torch refuses over several ranks of a CPU. Under ours
    it gathers outside, which this does not touch.
    """
    wrapper = engine.optimizer
    if DEEPSPEED.is_before("0.19") and not isinstance(getattr(wrapper, "optimizer", None), ShardedOptimizer):
        wrapper.step = torch.no_grad()(wrapper.step)
    return engine


def install_gradients(model: nn.Module, case: Case, clock: dict[str, int]) -> None:
    """Replace every gradient of backward by the constant one of ``clock["step"]``."""
    from ds_optim.roles import canonical_name, logical_shape

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, shape = canonical_name(name), logical_shape(parameter)

        def constant(grad: Tensor, key: str = key, shape: tuple[int, ...] = shape) -> Tensor:
            return constant_gradient(key, shape, clock["step"], case.seed, case.more_bits).to(grad.dtype)

        parameter.register_hook(constant)


def train(engine: Any, case: Case, clock: dict[str, int], steps: range) -> None:
    """Steps ``steps`` (numbered from 1), setting the learning rate before each."""
    tokens = torch.arange(12).view(1, 12) % VOCABULARY
    for step in steps:
        clock["step"] = step
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        use_all = case.unused_from is None or step < case.unused_from
        for _ in range(case.accumulation):
            engine.backward(engine(tokens, use_all))
            engine.step()


def masters(engine: Any) -> dict[str, list[tuple[int, int, Tensor]]]:
    """This rank's fragments of the fp32 masters: ``{name: [(start, stop, values)]}``."""
    optimizer = engine.basic_optimizer
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for tensor, bound in optimizer.bound_tensors.items():
        for fragment in bound.layout.fragments(bound.rank):
            values = tensor.detach().reshape(-1).narrow(0, fragment.offset, fragment.numel).clone()
            name = bound.layout.parameters[fragment.parameter].name
            found.setdefault(name, []).append((fragment.start, fragment.stop, values))
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights, whole, as the forward pass sees them (a collective at ZeRO-3)."""
    import deepspeed

    from ds_optim.roles import canonical_name

    found = {}
    for name, parameter in model.named_parameters():
        with (
            deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()
        ):
            found[canonical_name(name)] = parameter.detach().clone()
    return found


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes of optimizer state on this rank, by key, storages counted once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for state in engine.basic_optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in seen:
                seen.add(value.untyped_storage().data_ptr())
                found[key] = found.get(key, 0) + value.untyped_storage().nbytes()
    return found


@contextlib.contextmanager
def engine_for(case: Case) -> Iterator[tuple[Any, nn.Module, dict[str, int]]]:
    """An engine whose gradients are the constants, destroyed afterwards."""
    clock = {"step": 0}
    engine, model = build_engine(case)
    install_gradients(model, case, clock)
    try:
        yield engine, model, clock
    finally:
        engine.destroy()


def run(case: Case) -> dict[str, Any]:
    """Train the case from scratch on this rank and report what the optimizer holds (a job for the pool)."""
    with engine_for(case) as (engine, model, clock):
        train(engine, case, clock, range(1, case.steps + 1))
        return {"masters": masters(engine), "weights": weights(model), "state_bytes": state_bytes(engine)}


def assembled(reports: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole fp32 masters, flat, from the fragments of all ranks; replicated ones must agree bitwise."""
    pieces: dict[str, dict[tuple[int, int], Tensor]] = {}
    for report in reports:
        for name, fragments in report["masters"].items():
            for start, stop, values in fragments:
                known = pieces.setdefault(name, {}).setdefault((start, stop), values)
                same = torch.equal(known.view(torch.int32), values.view(torch.int32))  # a NaN equals itself
                assert same, f"{name} [{start}, {stop}) differs between ranks"
    whole = {}
    for name, parts in pieces.items():
        ordered = sorted(parts.items())
        assert all(one[0][1] == two[0][0] for one, two in itertools.pairwise(ordered)), name
        whole[name] = torch.cat([values for _, values in ordered])
    return whole
