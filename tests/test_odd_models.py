"""Models whose parameters are not what they seem: packed integers, weights made of others, state-space parameters.

The control of what trains is the same script with `torch.optim.AdamW` in the JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ds_optim
from ds_optim import checkpoint
from ds_optim.roles import infer_roles, is_decay_exempt
from pool import Pools
from test_features_of_deepspeed import CONTROL, OFFLOAD, OURS, Weights, far, made, start, tokens_of, weights_of

STAGES = [(0, {}), (2, {}), (3, OFFLOAD)]


class Quantised(nn.Module):
    """A linear map whose weight is kept in bytes, two values in each, and an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        packed = torch.randint(0, 256, (9 * 6 // 2,), dtype=torch.int64).to(torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.signed = nn.Parameter(torch.randint(-8, 8, (9, 6), dtype=torch.int8), requires_grad=False)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 9, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        halves = torch.stack((self.packed & 15, self.packed >> 4)).reshape(9, 6)
        weight = (halves.to(hidden.dtype) + self.signed.to(hidden.dtype)) / 16
        return nn.functional.linear(hidden, weight) + self.lora_B(self.lora_A(hidden))


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6).requires_grad_(False)
        self.base = Quantised()
        self.down = nn.Linear(9, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.tanh(self.base(self.embed(tokens)))).square().mean()


class Normalised(nn.Module):
    """Weight norm as in Wav2Vec2: over the last dimension of a convolution; and of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = parametrizations.weight_norm(nn.Linear(6, 9))
        self.mix = parametrizations.weight_norm(nn.Conv1d(9, 4, 3, padding=1), dim=2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.up(self.embed(tokens))).T[None]).float().square().mean()


def trained(cls: type[nn.Module], stage: int, zero: dict[str, Any], folder: str) -> dict[str, Weights]:
    """Weights after three steps; with a folder, those that came back from a checkpoint into another engine."""
    found = {}
    for optimizer in (CONTROL, *OURS):
        model = made(cls)
        engine, *_ = start(optimizer, stage, model, zero)
        for index in range(3):
            engine.backward(engine(tokens_of(index, torch.distributed.get_rank())))
            engine.step()
        found[optimizer] = weights_of(model)
        if folder and optimizer != CONTROL:
            checkpoint.save(f"{folder}/{optimizer}", engine)
            engine.destroy()
            model = made(cls)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            engine, *_ = start(optimizer, stage, model, zero)
            checkpoint.load(f"{folder}/{optimizer}", engine)
            found[f"{optimizer}, loaded"] = weights_of(model)
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "zero"), STAGES, ids=str)
def test_adapters_of_quantised_weights_train_and_the_bytes_stay(
    pool: Pools, stage: int, zero: dict[str, Any], tmp_path: Path
) -> None:
    found, _ = pool(2).run(trained, Adapted, stage, zero, str(tmp_path))
    assert far(found["ds_optim.AdamW"], found[CONTROL]) <= 1e-6
    before = weights_of(made(Adapted))
    for optimizer in OURS:
        assert torch.equal(found[optimizer]["base.packed"], before["base.packed"])
        assert torch.equal(found[optimizer]["base.signed"], before["base.signed"])
        assert not torch.equal(found[optimizer]["base.lora_B.weight"], before["base.lora_B.weight"])
        assert far(found[f"{optimizer}, loaded"], found[optimizer]) == 0


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64])
def test_what_is_frozen_may_be_of_any_kind_until_it_is_trained(kind: torch.dtype) -> None:
    frozen = nn.Parameter(torch.ones(3).to(kind), requires_grad=False)
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = ds_optim.AdamMini([("frozen", frozen), ("up_proj.weight", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(4, 3))
    if kind in (torch.float64, torch.complex64):
        frozen.requires_grad_(True)
        frozen.grad = torch.ones_like(frozen)
        before = weight.detach().clone()
        with pytest.raises(ValueError, match=f"frozen is {kind}"):
            optimizer.step()
        assert torch.equal(weight, before)
        with pytest.raises(ValueError, match=f"frozen is {kind}"):
            ds_optim.AdamMini([("frozen", frozen)])


class Packed(nn.Module):
    """A linear map of a quantisation library: bytes, and sizes that say what they stand for."""

    def __init__(self, linear: nn.Linear, leaf: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        if leaf == "weight":
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer(leaf, packed)


@pytest.mark.parametrize("leaf", ["weight", "qweight"])
def test_adapters_of_packed_weights_have_the_heads_of_what_was_packed(leaf: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=names))
    adapters = {name: role for name, role in infer_roles(model).items() if "lora_" in name}
    for module in list(model.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer = Packed(module.base_layer, leaf)
    assert {name: role for name, role in infer_roles(model).items() if "lora_" in name} == adapters


# -- weights that are made of other parameters ----------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "zero"), STAGES, ids=str)
def test_weight_norm_trains_as_under_adamw(pool: Pools, stage: int, zero: dict[str, Any]) -> None:
    found, _ = pool(2).run(trained, Normalised, stage, zero, "")
    assert far(found["ds_optim.AdamW"], found[CONTROL]) <= 1e-6
    for optimizer in OURS:
        assert far(found[optimizer], weights_of(made(Normalised))) > 0


def reparametrised() -> list[tuple[nn.Module, dict[str, str]]]:
    """Modules, and the kind of each of their parameters that is not a bias."""
    list_of = "parametrizations.weight.original"
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(6, 9))
    return [
        (parametrizations.weight_norm(nn.Conv1d(6, 8, 3), dim=2), {f"{list_of}0": "norm", f"{list_of}1": "conv"}),
        (parametrizations.weight_norm(nn.Linear(6, 9)), {f"{list_of}0": "norm", f"{list_of}1": "linear"}),
        (parametrizations.spectral_norm(nn.Linear(6, 9)), {list_of: "linear"}),
        (parametrizations.weight_norm(nn.Embedding(7, 6)), {f"{list_of}0": "norm", f"{list_of}1": "embedding"}),
        (old, {"weight_g": "norm", "weight_v": "linear"}),
    ]


def test_a_reparametrised_weight_keeps_its_role_and_its_length_is_a_gain() -> None:
    for module, kinds in reparametrised():
        roles = infer_roles(nn.Sequential(module))
        roles = {name.removeprefix("0."): role for name, role in roles.items() if not name.endswith("bias")}
        assert {name: role.kind for name, role in roles.items()} == kinds
        assert [name for name, role in roles.items() if is_decay_exempt(role)] == [
            name for name, kind in kinds.items() if kind == "norm"
        ]


def test_names_alone_make_no_weight_norm() -> None:
    gated = nn.Module()
    gated.w_g, gated.w_v = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    assert not any(is_decay_exempt(role) for role in infer_roles(gated).values())


def test_wav2vec2_has_no_parameter_that_nobody_knows() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=(4, 4),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2,
    )
    roles = infer_roles(transformers.Wav2Vec2Model(config))
    assert {name for name, role in roles.items() if role.source == "fallback"} == set()
    assert roles["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].kind == "conv"
    assert is_decay_exempt(roles["encoder.pos_conv_embed.conv.parametrizations.weight.original0"])


# -- what the model says about decay --------------------------------------------------------------------------------


def spared(model: nn.Module) -> set[str]:
    return {name.rpartition("mixer.")[2] for name, role in infer_roles(model).items() if is_decay_exempt(role)}


def test_weight_decay_leaves_state_space_parameters_alone() -> None:
    common = {"vocab_size": 20, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**common))
    norms = {"backbone.layers.0.norm.weight", "backbone.norm_f.weight"}
    assert spared(mamba) == {"A_log", "D", "conv1d.bias", "dt_proj.bias", *norms}
    mamba2 = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**common, num_heads=4, head_dim=4, n_groups=1, expand=2)
    )
    assert spared(mamba2) == {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight", *norms}


def test_a_parameter_that_the_model_marks_is_spared_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight._no_weight_decay = True
    assert spared(model) == {"1.weight"}
    decayed, exempt = ds_optim.param_groups(model, 0.1)
    assert [list(group["params"]) for group in (decayed, exempt)] == [[model[0].weight], [model[1].weight]]
    # The kind that a user states says nothing about decay; a role does.
    stated = ds_optim.roles.resolve_roles({"1.weight": "mlp"}, {"1.weight": (2, 4)})
    assert not is_decay_exempt(stated["1.weight"])
    shapes = {"0.weight": (4, 3), "1.weight": (2, 4)}
    over = ds_optim.roles.override_roles(infer_roles(model), {"1.weight": "mlp"}, shapes)
    assert over["1.weight"].kind == "mlp"
    assert is_decay_exempt(over["1.weight"])


def marked(stage: int) -> list[tuple[float, list[int]]]:
    """The groups that a JSON with weight decay makes: their decay, and the sizes of their parameters."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight._no_weight_decay = True
    json = {"type": "AdamMini", "params": {"weight_decay": 0.1}}
    engine, *_ = start("AdamMini", stage, model, optimizer=json)
    groups = engine.basic_optimizer.param_groups
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    decays = [group["weight_decay"] for group in groups]
    engine.destroy()
    return list(zip(decays, sizes, strict=True))


def test_the_json_honours_the_marks(pool: Pools) -> None:
    assert pool(1).run(marked, 0) == [[(0.1, [12]), (0.0, [8])]]


# -- other sizes ----------------------------------------------------------------------------------------------------


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(self.embed(tokens)).square().mean()

    def grow(self) -> None:
        """As transformers' ``resize_token_embeddings``: the parameter stays, its data does not."""
        self.embed.weight.data = torch.cat([self.embed.weight.data, torch.zeros(3, 6)])
        self.embed.weight.grad = None


def grown(stage: int, folder: str) -> list[str]:
    """What is said of an embedding that grows after the first step, and between saving and loading."""
    said = []
    for optimizer in OURS:
        model = made(Grows)
        engine, *_ = start(optimizer, stage, model)
        engine.backward(engine(tokens_of(0, 0)))
        engine.step()
        checkpoint.save(f"{folder}/{optimizer}", engine)
        if stage == 0:
            model.grow()
            up = model.up.weight.detach().clone()
            engine.backward(engine(tokens_of(1, 0)))
            try:
                engine.step()
            except RuntimeError as error:
                said.append(str(error))
            assert torch.equal(model.up.weight, up), "nothing was changed"
        engine.destroy()
        model = made(Grows)
        model.grow()
        engine, *_ = start(optimizer, stage, model)
        try:
            checkpoint.load(f"{folder}/{optimizer}", engine)
        except checkpoint.CheckpointError as error:
            said.append(str(error))
        engine.destroy()
    return said


@pytest.mark.parametrize("stage", [0, 3])
def test_an_embedding_that_grows_too_late_is_named(pool: Pools, stage: int, tmp_path: Path) -> None:
    for said in pool(2).run(grown, stage, str(tmp_path)):
        late = "embed.weight has 84 elements and had 66 when it was first seen"
        misfit = "embed.weight has shape (11, 6) in the checkpoint, (14, 6) here"
        expected = [late, misfit] if stage == 0 else [misfit]
        assert len(said) == len(OURS) * len(expected)
        assert all(reason in message for reason, message in zip(expected * len(OURS), said, strict=True))
