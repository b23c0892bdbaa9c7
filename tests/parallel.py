"""Real DeepSpeed engines whose ranks have different parameters: stages of a pipeline, experts, slices of AutoTP.

Gradients and weights are constants of a parameter's name in the whole model, as in `engines`: what one process makes of
them is what all of these must end with.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optim
from ds_optim.deepspeed.model_parts import slices_in
from ds_optim.known_transformers import tied as with_ties
from ds_optim.roles import exempt_names
from ds_optim.roles.role import Role
from ds_optim.sharding.boxes import Box
from engines import constant_gradient, learning_rate

WIDTH, HEADS, TOKENS, LAYERS, EXPERTS = 12, 3, 11, 3, 4


class Attention(nn.Module):
    """Heads, a bias, and sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False))
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.o_proj((self.q_proj(hidden) * self.k_proj(hidden)).tanh())


class Layer(nn.Module):
    """Of a transformer, more or less."""

    def __init__(self, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp = feed_forward or Mlp()

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.mlp(self.norm(hidden))
        return hidden + self.attention(hidden) + (out[0] if isinstance(out, tuple) else out)


class Mlp(nn.Module):
    """Two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 17, bias=False), nn.Linear(17, WIDTH, bias=False)
        self.register_buffer("mark", torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(hidden).relu())


class Tied(nn.Embedding):
    """An embedding that is the output layer as well."""

    def __init__(self) -> None:
        super().__init__(TOKENS, WIDTH)


def logits(embedding: Tied, hidden: Tensor) -> Tensor:
    return hidden @ embedding.weight.T


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.view(-1, TOKENS), labels.view(-1))


@dataclass(frozen=True)
class Parallel:
    """One training run.

    Attributes:
        optimizer: as a JSON names it.
        stages: of a pipeline; 0: no pipeline.
        experts: over how many ranks they are spread; 0: there are none.
        stacks: over how many ranks AutoEP spreads stacks of experts; 0: it does not.
        slices: over how many ranks AutoTP cuts; 0: it does not.
        tied: of the model that it cuts, whether embeddings and output layer are.
        fused: the model that it cuts has two weights in one.
        frozen: parts of the names of parameters that are not trained.
    """

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stage: int = 1
    precision: str = "fp32"
    stages: int = 0
    experts: int = 0
    stacks: int = 0
    slices: int = 0
    tied: bool = False
    fused: bool = False
    frozen: tuple[str, ...] = ()
    steps: int = 6
    seed: int = 0

    def __str__(self) -> str:
        spread = f"experts on {self.experts}" if self.experts else ""
        spread = " ".join([f"{self.stages} stages", spread]).strip() if self.stages else spread
        spread = f"{self.slices} slices" if self.slices else spread
        spread = f"stacks on {self.stacks}" if self.stacks else spread
        spread += " in bf16" if self.precision == "bf16" else ""
        return f"{self.optimizer.removeprefix('ds_optim.')} at ZeRO-{self.stage}, {spread}"

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {"type": self.optimizer, "params": dict(self.options)},
        }
        if self.stacks:
            config["expert_parallel"] = {"enabled": True, "autoep_size": self.stacks, "preset_model": "mixtral"}
        if self.slices > 1:
            fused = {"partition_config": {"use_default_specs": False, "layer_specs": FUSED}} if self.fused else {}
            config["tensor_parallel"] = {"autotp_size": self.slices, **fused}
        return {**config, "bf16": {"enabled": True}} if self.precision == "bf16" else config

    def model(self) -> nn.Module:
        """This rank's part, with the weights of its parameters' names; the whole of what AutoTP is going to cut."""
        if self.stages:
            model = pipeline(self.stages, self.experts)
        elif self.stacks:
            model = mixtral()
        elif self.slices:
            model = gated() if self.fused else llama(self.tied)
        else:
            model = with_experts(self.experts)
        with torch.no_grad():
            for name, parameter in names_of(model, self.experts).items():
                parameter.copy_(weight(name, tuple(parameter.shape), self.seed))
                parameter.requires_grad_(not any(part in name for part in self.frozen))
        for name, module in model.named_modules():
            parts = name.split(".")
            if parts[-2:-1] == ["deepspeed_experts"]:  # the number among all
                module.mark.fill_(int(parts[-1]) + dist.get_rank() % self.experts * (EXPERTS // self.experts))
        return model.bfloat16() if self.precision == "bf16" else model


def pipeline(stages: int, experts: int) -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers = [
        TiedLayerSpec("embed", Tied),
        *(LayerSpec(Layer, mixture(experts) if experts else None) for _ in range(LAYERS)),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", Tied, forward_fn=logits),
    ]
    return PipelineModule(layers, num_stages=stages, loss_fn=loss_of, partition_method="uniform")


def mixture(ranks: int) -> nn.Module:
    from deepspeed.moe.layer import MoE

    return MoE(WIDTH, Mlp(), EXPERTS, ranks, k=1, min_capacity=8, capacity_factor=4.0)


def with_experts(ranks: int) -> nn.Module:
    made = [Layer(mixture(ranks) if index else None) for index in range(2)]
    return nn.Sequential(nn.Embedding(TOKENS, WIDTH), *made, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False))


def llama(tied: bool) -> nn.Module:
    """Heads that share keys, biases, a vocabulary that two ranks share unevenly, a width that is odd for each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=26,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=32,
        attention_bias=True,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return with_ties(LlamaForCausalLM(config))


class GatedMlp(nn.Module):
    """Gate and up projection in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 28, bias=False), nn.Linear(14, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        return hidden + self.down_proj(gate.sigmoid() * up)


FUSED = [
    {"patterns": [r".*\.gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
    {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
]


def gated() -> nn.Module:
    layers = [GatedMlp(), nn.LayerNorm(WIDTH), GatedMlp(), nn.LayerNorm(WIDTH)]
    return nn.Sequential(nn.Embedding(TOKENS, WIDTH), *layers, nn.Linear(WIDTH, TOKENS, bias=False))


def mixtral() -> nn.Module:
    """Of sizes that torch's grouped products take, in bf16 too."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return MixtralForCausalLM(config)


def take_defaults() -> None:
    """Let transformers' registry take the default that DeepSpeed 0.19.8 gives it, which it does since 5.24."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return
    registry = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    if registry is not dict and not hasattr(registry, "plain_get"):
        registry.plain_get = plain = registry.get
        registry.get = lambda self, key, default=None: default if isinstance(key, str) else plain(self, key)


def slice_of(whole: Tensor, shape: torch.Size, rank: int, ranks: int) -> Tensor:
    """What one of some ranks has of a tensor, by the shape of its slice; uneven ones are of two ranks."""
    for dim, size in enumerate(shape):
        if size != whole.shape[dim]:
            first = whole.shape[dim] - size if rank == ranks - 1 else rank * size
            return whole.narrow(dim, first, size)
    return whole


def names_of(model: nn.Module, ranks: int) -> dict[str, Tensor]:
    """Parameters by their names in the whole model, in which experts have numbers of their own."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "deepspeed_experts" in parts:
            at = parts.index("deepspeed_experts") + 1
            parts[at] = str(int(parts[at]) + dist.get_rank() % ranks * (EXPERTS // ranks))
        found[".".join(parts)] = parameter
    return found


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return constant_gradient(name, shape, 0, 100 + seed) * 4


def share(run: Parallel, name: str) -> float:
    """What the constant gradient is multiplied by on its way through an engine.

    Both stages of a tied weight have it; of an expert's, DeepSpeed divides the sum over those that have it by all.
    """
    if "tied_modules" in name:
        return float(min(run.stages, 2))
    return 1 / (run.experts or run.stacks) if "experts." in name else 1.0


@contextmanager
def engine_alone(model: nn.Module, config: dict[str, Any]) -> Any:
    """An engine, of which DeepSpeed keeps nothing afterwards: a pipeline's mpu, the groups of AutoTP."""
    import deepspeed
    import deepspeed.utils.groups as known

    take_defaults()
    engine = None
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
        yield engine
    finally:
        if engine is not None:
            engine.destroy()
        known.mpu = known._TENSOR_MODEL_PARALLEL_GROUP = known._MODEL_PARALLEL_GROUP = known._DATA_PARALLEL_GROUP = None
        for name in [
            name for name in vars(known) if name.startswith("_EXPERT_") and isinstance(vars(known)[name], dict)
        ]:
            vars(known)[name].clear()


@contextmanager
def engine_of(run: Parallel) -> Any:
    """An engine whose gradients are the constants, and the step that they are of."""
    clock = {"step": 0}
    with engine_alone(run.model(), run.config()) as engine:
        spread = max(run.slices, run.stacks, 1)
        slices = slices_in(engine.module)  # a test of its own holds them against the whole
        for name, parameter in names_of(engine.module, run.experts).items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if run.stacks and ".experts." in name:
                shape = (EXPERTS, *shape[1:])
            sliced = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None) or {}
            shape = tuple(sliced.get("logical_shape") or shape)

            boxes = slices[parameter].boxes if parameter in slices else ((),)

            def constant(
                grad: Tensor,
                name: str = name,
                shape: tuple[int, ...] = shape,
                boxes: tuple[tuple[Box, ...], ...] = boxes,
            ) -> Tensor:
                whole, rank = constant_gradient(name, shape, clock["step"], run.seed).to(grad.dtype), dist.get_rank()
                if len(boxes[0]) > 1:
                    parts = [whole[tuple(map(slice, box.start, box.stop))] for box in boxes[rank % spread]]
                    return torch.cat(parts).view(grad.shape)
                return slice_of(whole, grad.shape, rank % spread, spread).clone()

            if parameter.requires_grad:
                parameter.register_hook(constant)
        yield engine, clock


def train(run: Parallel, engine: Any, clock: dict[str, int], steps: range) -> None:
    tokens = torch.arange(8).view(1, 8) % TOKENS
    for step in steps:
        clock["step"] = step
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if run.stages:
            engine.train_batch(iter([(tokens, tokens)]))
        elif (run.slices and not run.fused) or run.stacks:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        else:
            engine.backward(loss_of(engine(tokens), tokens))
            engine.step()


def held(engine: Any) -> dict[str, list[tuple[int, int, Tensor]]]:
    """What this rank has of each parameter's fp32 elements: ``{name: [(start, stop, values)]}``."""
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for tensor, parameters in engine.basic_optimizer.logical().items():
        flat = tensor.detach().reshape(-1)
        for one in parameters:
            found.setdefault(one.name, []).extend(
                (start, stop, flat[offset : offset + stop - start].clone()) for start, stop, offset in one.weight.read
            )
    return found


def ran(run: Parallel) -> dict[str, Any]:
    """A job: train from scratch; what this rank ends with, and its roles and shapes."""
    with engine_of(run) as (engine, clock):
        before = held(engine)
        train(run, engine, clock, range(1, run.steps + 1))
        return {"before": before, **report(engine)}


def report(engine: Any) -> dict[str, Any]:
    shards = engine.basic_optimizer.shards
    return {
        "held": held(engine),
        "roles": {name: shards.roles[name] for name in shards.shapes},
        "shapes": shards.shapes,
    }


def whole_of(reports: list[dict[str, Any]], when: str = "held") -> dict[str, Tensor]:
    """Every parameter of all ranks, flat; what several have must agree bitwise."""
    shapes = {name: shape for one in reports for name, shape in one["shapes"].items()}
    found = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, shape in shapes.items()}
    for one in reports:
        for name, pieces in one[when].items():
            for start, stop, values in pieces:
                there = found[name][start:stop]
                assert bool((there.isnan() | (there == values)).all()), f"{name} differs between ranks"
                there.copy_(values)
    assert not any(bool(values.isnan().any()) for values in found.values())
    return found


def alone(
    run: Parallel, reports: list[dict[str, Any]], later: Parallel | None = None, half: int = 0
) -> dict[str, Tensor]:
    """What one process without an engine ends with, from the shapes and roles that the ranks report.

    Args:
        later: the run that goes on after ``half`` steps.
    """
    shapes = {name: shape for one in reports for name, shape in one["shapes"].items()}
    roles: dict[str, Role] = {name: role for one in reports for name, role in one["roles"].items()}
    made = {name: nn.Parameter(one.view(shapes[name])) for name, one in whole_of(reports, "before").items()}
    exempt = set(exempt_names(made, roles, None))
    options = {key: value for key, value in run.options.items() if key != "weight_decay"}
    decay = run.options.get("weight_decay", 0.0)
    groups = [
        {"params": [(name, one) for name, one in made.items() if (name in exempt) == spared], "weight_decay": its}
        for spared, its in ((False, decay), (True, 0.0))
    ]
    cls = getattr(ds_optim, run.optimizer.split(".")[-1])
    optimizer = cls([group for group in groups if group["params"]], roles=roles, **options)
    for step in range(1, run.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for name, one in made.items():
            one.grad = constant_gradient(name, tuple(one.shape), step, run.seed) * share(
                later if later is not None and step > half else run, name
            )
        optimizer.step()
    return {name: one.detach().reshape(-1) for name, one in made.items()}
