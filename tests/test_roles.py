"""Roles, and the Adam-mini blocks that follow from them, against what real models do with their weights.

The block boundaries are checked by behaviour: noise in one block of a query or key must change the attention of that
head and of no other, noise in one block of any other matrix must change one output of its module and no other.
"""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from ds_optim.known_transformers import tied
from ds_optim.optimizers.adam_mini import adam_mini_blocks
from ds_optim.optimizers.matrix_roles import is_matrix
from ds_optim.releases import TRANSFORMERS
from ds_optim.roles import (
    canonical_name,
    infer_roles,
    is_decay_exempt,
    logical_shape,
    override_roles,
    param_groups,
    resolve_roles,
    warn_unclaimed,
)
from ds_optim.roles.role import Part, Role, is_vector
from ds_optim.sharding.blocks import BlockGrid


def unclaimed_by_adam_mini(roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What Adam-mini would warn of."""
    return warn_unclaimed(roles, shapes, lambda role: role.is_understood, "makes every output row of them a block")


VOCABULARY, HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 40, 4, 2, 8, 24  # heads * head_dim = 32: not the width

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
GROUPED = {**SIZES, "num_key_value_heads": KEY_HEADS}
WIDE = {**GROUPED, "head_dim": HEAD_DIM}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 1,
    "n_head": HEADS,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


def build(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": build("LlamaForCausalLM", "LlamaConfig", **WIDE),
    "qwen2": build("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": build("Qwen3ForCausalLM", "Qwen3Config", **WIDE),
    "mistral": build("MistralForCausalLM", "MistralConfig", **WIDE),
    "gemma": build("GemmaForCausalLM", "GemmaConfig", **WIDE),
    "gemma2": build("Gemma2ForCausalLM", "Gemma2Config", **WIDE),
    "gemma3": build("Gemma3ForCausalLM", "Gemma3TextConfig", **WIDE),
    "gpt2": build("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt_neox": build("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "phi3": build("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "mixtral": build("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3),
    "qwen2_moe": build(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **GROUPED, **EXPERTS, shared_expert_intermediate_size=12
    ),
    "qwen3_moe": build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **WIDE, **EXPERTS),
    "gpt_oss": build("GptOssForCausalLM", "GptOssConfig", **WIDE, num_local_experts=3, num_experts_per_tok=2),
    "llama4": build(
        "Llama4ForCausalLM", "Llama4TextConfig", **WIDE, num_local_experts=3, intermediate_size_mlp=12, moe_layers=[0]
    ),
    "deepseek_v3": build(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **SIZES,
        num_key_value_heads=HEADS,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
    ),
    "bert": build("BertForSequenceClassification", "BertConfig", **SIZES),
    "t5": build(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_DIM,
        d_ff=20,
        num_heads=HEADS,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    ),
    "vit": build("ViTForImageClassification", "ViTConfig", **SIZES, image_size=8, patch_size=4),
    # Fused weights whose layouts differ: head by head, by groups, one key for all heads, in four slices as (q, v, k).
    "bloom": build(
        "BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=HEADS
    ),
    "falcon": build(
        "FalconForCausalLM",
        "FalconConfig",
        **SIZES,
        num_kv_heads=KEY_HEADS,
        new_decoder_architecture=True,
    ),
    "falcon_multi_query": build(
        "FalconForCausalLM", "FalconConfig", **SIZES, multi_query=True, new_decoder_architecture=False
    ),
    "gpt_bigcode": build("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT2),
    "codegen": build("CodeGenForCausalLM", "CodeGenConfig", **{**GPT2, "rotary_dim": 4}),
}
KEY_HEADS_OF = {
    **dict.fromkeys(MODELS, KEY_HEADS),
    **dict.fromkeys(["gpt2", "gpt_neox", "deepseek_v3", "bert", "t5", "vit", "bloom", "codegen"], HEADS),
    **dict.fromkeys(["falcon_multi_query", "gpt_bigcode"], 1),
}


@pytest.fixture(scope="module")
def models() -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            torch.manual_seed(0)
            made[name] = MODELS[name]().eval()
            with torch.no_grad():
                for parameter in made[name].parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return made[name]

    return get


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {canonical_name(name): logical_shape(parameter) for name, parameter in model.named_parameters()}


def block_of_each_element(grid: BlockGrid, shape: tuple[int, ...]) -> Tensor:
    """The number of the block that holds each element, by the definition of a grid and nothing else."""
    widths = [width for count, width in grid.runs for _ in range(count)]
    along_axis = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    blocks = torch.arange(grid.batch)[:, None, None, None] * len(widths) + along_axis[None, None, :, None]
    return blocks.expand(grid.batch, grid.reduce, grid.axis, grid.inner).reshape(shape)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    tokens = {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        tokens["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    return tokens


class Perturbed:
    """Noise in one block of a parameter for the duration of a ``with``."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter, self.mask = parameter, mask

    def __enter__(self) -> None:
        self.saved = self.parameter.detach().clone()
        noise = torch.randn(self.parameter.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.parameter.add_(noise * self.mask)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            self.parameter.copy_(self.saved)


# -- what the models' parameters are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_known_model_is_claimed(name: str, models: Callable[[str], nn.Module]) -> None:
    model = models(name)
    roles, shapes = infer_roles(model), shapes_of(model)
    assert list(roles) == list(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unclaimed_by_adam_mini(roles, shapes) == []
    # What stays unexplained is a vector: one block, as in the official code.
    unexplained = {name for name, role in roles.items() if role.source == "fallback"}
    assert all(is_vector(shapes[name]) for name in unexplained)
    assert {name.rsplit(".", 1)[1] for name in unexplained} <= {"sinks"}
    for parameter, role in roles.items():
        assert adam_mini_blocks(role, shapes[parameter]).numel == math.prod(shapes[parameter])


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_biases_are_told_by_their_modules(name: str, models: Callable[[str], nn.Module]) -> None:
    model = models(name)
    roles, shapes = infer_roles(model), shapes_of(model)
    for parameter, role in roles.items():
        leaf = parameter.rsplit(".", 1)[1]
        grid = adam_mini_blocks(role, shapes[parameter])
        if leaf == "bias" or leaf.endswith("_bias"):
            assert role.kind == "bias"
            assert grid.num_blocks == grid.numel
        elif len(shapes[parameter]) == 1 and leaf == "weight":
            assert role.kind == "norm"
            assert grid.num_blocks == 1
        assert is_decay_exempt(role) == (role.kind in ("norm", "bias"))


def test_an_embedding_that_is_tied_to_the_head_comes_once_and_is_an_embedding() -> None:
    for is_tied in (True, False):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, tie_word_embeddings=is_tied))
        roles = infer_roles(model)
        assert roles["model.embed_tokens.weight"].kind == "embedding"
        assert ("lm_head.weight" in roles) is not is_tied
        assert is_tied or roles["lm_head.weight"] == Role("head")


def test_a_head_tied_to_an_embedding_that_is_registered_later_is_an_embedding_still() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.tokens = nn.Embedding(9, 4)
            self.lm_head.weight = self.tokens.weight

    assert infer_roles(HeadFirst()) == {"lm_head.weight": Role("embedding")}


# -- blocks against behaviour -----------------------------------------------------------------------------------------

PARTS = ("query", "key", "value")


def attention_weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of the weights that make queries, keys and values, and of the attention maps that they act on."""
    for name, role in infer_roles(model).items():
        if role.kind in PARTS or any(part.kind == "key" for part in role.parts):
            maps = "attentions"
            if isinstance(model, transformers.T5ForConditionalGeneration):
                side, maps = name.split(".")[0], "cross_attentions"
                maps = maps if "EncDec" in name else f"{side}_attentions"
            if "indexer" not in name:
                yield name, maps


def kinds_of_blocks(role: Role) -> list[str]:
    """What each block of a query, key, value or fused weight is, in order, from the role alone."""
    kinds = []
    for part in role.parts:
        per_head = part.kind in ("query", "key")
        kinds += [part.kind] * (part.size // role.head_dim if per_head and role.head_dim else part.size)
    return kinds


@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_a_query_or_key_is_a_head(name: str, models: Callable[[str], nn.Module]) -> None:
    model = models(name)
    inputs, roles = inputs_of(model), infer_roles(model)

    @torch.no_grad()
    def maps() -> dict[str, Tensor]:
        output = model(**inputs, output_attentions=True)
        return {key: value[0] for key, value in output.items() if key.endswith("attentions") and value}

    before, groups, tested = maps(), HEADS // KEY_HEADS_OF[name], set()
    for parameter_name, key in attention_weights(model):
        assert before[key].shape[1] == HEADS  # (batch, heads, queries, keys)
        parameter, role = model.get_parameter(parameter_name), roles[parameter_name]
        grid = adam_mini_blocks(role, tuple(parameter.shape))
        blocks = block_of_each_element(grid, tuple(parameter.shape))
        kinds = kinds_of_blocks(role) or [role.kind] * grid.num_blocks
        assert len(kinds) == grid.num_blocks
        assert kinds.count("query") in (0, HEADS)
        assert kinds.count("key") in (0, HEADS // groups)
        seen = dict.fromkeys(PARTS, 0)
        for block, kind in enumerate(kinds):
            number, seen[kind] = seen[kind], seen[kind] + 1
            if kind == "value" and number % 5:
                continue  # a few neurons will do
            with Perturbed(parameter, blocks == block):
                after = maps()
            changed = {h for h in range(HEADS) if not torch.equal(before[key][:, h], after[key][:, h])}
            expected = {
                "query": {number},
                "key": set(range(number * groups, (number + 1) * groups)),
                "value": set(),
            }[kind]
            assert changed == expected, f"{parameter_name}, block {block} ({kind} {number}) changed heads {changed}"
            tested.add(kind)
    assert tested == set(PARTS)


@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_any_other_matrix_is_an_output_neuron(name: str, models: Callable[[str], nn.Module]) -> None:
    model = models(name)
    inputs, roles = inputs_of(model), infer_roles(model)
    outputs: dict[str, Tensor] = {}
    for parameter_name, role in roles.items():
        holder_name, _, leaf = parameter_name.rpartition(".")
        holder = model.get_submodule(holder_name)
        simple = isinstance(holder, nn.Linear | nn.Conv2d) or type(holder).__name__ == "Conv1D"
        if leaf != "weight" or not simple or role.kind in ("query", "key", "fused", "bias"):
            continue

        def keep(_: nn.Module, __: Any, output: Any, name: str = parameter_name) -> None:
            if isinstance(output, Tensor):  # some routers return more than their logits
                outputs[name] = output.detach().clone()

        handle = holder.register_forward_hook(keep)
        parameter = model.get_parameter(parameter_name)
        grid = adam_mini_blocks(role, tuple(parameter.shape))
        blocks = block_of_each_element(grid, tuple(parameter.shape))
        with torch.no_grad():
            model(**inputs)
            if parameter_name in outputs:
                before = outputs[parameter_name]
                channel = 1 if isinstance(holder, nn.Conv2d) else before.ndim - 1
                assert grid.num_blocks == before.shape[channel]
                for block in (0, 1, grid.num_blocks - 1):
                    with Perturbed(parameter, blocks == block % grid.num_blocks):
                        model(**inputs)
                    moved = (outputs[parameter_name] != before).movedim(channel, 0).flatten(1).any(1)
                    assert moved.nonzero().flatten().tolist() == [block % grid.num_blocks], parameter_name
        handle.remove()


# Transformers 5 stacked the experts of models whose experts were modules, and gave modules other names.
IS_4 = TRANSFORMERS.is_before("5")
STACKED = ["gpt_oss", "llama4"] if IS_4 else ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4"]


@pytest.mark.parametrize("name", STACKED)
def test_a_block_of_stacked_experts_is_one_neuron_of_one_expert(name: str, models: Callable[[str], nn.Module]) -> None:
    model = models(name)
    roles = infer_roles(model)
    (path,) = [path.removesuffix(".down_proj") for path in roles if path.endswith("experts.down_proj")]
    experts = model.get_submodule(path)
    tokens = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def output() -> Tensor:
        """Each token through the expert of its own number."""
        if name == "llama4":
            return experts(tokens)
        chosen = torch.arange(3)[:, None]
        weights = (torch.eye(3) if IS_4 else torch.ones(3, 3)) if name == "gpt_oss" else torch.ones(3, 1)
        return experts(tokens, chosen, weights).reshape(3, -1)

    down, up = experts.get_parameter("down_proj"), experts.get_parameter("gate_up_proj")
    saved = down.detach().clone()
    for parameter, leaf in ((down, "down_proj"), (up, "gate_up_proj")):
        role = roles[f"{path}.{leaf}"]
        grid = adam_mini_blocks(role, tuple(parameter.shape))
        blocks = block_of_each_element(grid, tuple(parameter.shape))
        neurons = grid.blocks_per_batch
        assert grid.num_blocks == 3 * neurons
        if leaf == "gate_up_proj":  # neuron i shows itself at output i
            with torch.no_grad():
                down.copy_(torch.eye(*down.shape[1:]).expand_as(down))
        before = output()
        for expert in range(3):
            for neuron in (0, 1, neurons // 2, neurons - 1):
                with Perturbed(parameter, blocks == expert * neurons + neuron):
                    moved = (output() != before).nonzero().tolist()
                if leaf == "down_proj":
                    where = neuron
                else:  # gate and up: halves, or every other one
                    where = neuron // 2 if name == "gpt_oss" else neuron % (neurons // 2)
                assert moved in ([[expert, where]], []), (leaf, expert, neuron)  # [] where an activation is flat
                assert moved or leaf == "gate_up_proj"
    with torch.no_grad():
        down.copy_(saved)


def test_a_block_of_an_embedding_is_a_token(models: Callable[[str], nn.Module]) -> None:
    model = models("bert")
    for name, tokens in (("word_embeddings", VOCABULARY), ("position_embeddings", 512), ("token_type_embeddings", 2)):
        grid = adam_mini_blocks(infer_roles(model)[f"bert.embeddings.{name}.weight"], (tokens, WIDTH))
        assert (grid.num_blocks, grid.runs) == (tokens, ((tokens, 1),))
    positions = adam_mini_blocks(infer_roles(models("vit"))["vit.embeddings.position_embeddings"], (1, 5, WIDTH))
    assert torch.equal(block_of_each_element(positions, (1, 5, WIDTH))[0, :, 0], torch.arange(5))
    assert positions.num_blocks == 5


# -- where models come from -------------------------------------------------------------------------------------------


def test_shapes_are_enough(models: Callable[[str], nn.Module]) -> None:
    for name in ("llama", "gpt2", "gpt_oss", "phi3"):
        with torch.device("meta"):
            on_meta = tied(MODELS[name]())
        assert infer_roles(on_meta) == infer_roles(models(name))


def test_roles_are_the_same_where_zero_3_holds_empty_parameters() -> None:
    for name in ("llama", "gpt2", "qwen2_moe", "gpt_neox", "t5"):
        model = MODELS[name]()
        roles = infer_roles(model)
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape
            parameter.data = torch.empty(0)
        assert infer_roles(model) == roles
        assert 0 not in [math.prod(shape) for shape in shapes_of(model).values()]


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("module.module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight", "layers.0.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_A.default.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
        ("weight", "weight"),
    ],
)
def test_names_are_those_of_the_model_that_the_user_wrote(wrapped: str, plain: str) -> None:
    assert canonical_name(wrapped) == plain


def test_wrappers_change_neither_names_nor_roles(models: Callable[[str], nn.Module]) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Shell(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    roles = infer_roles(models("bert"))
    assert infer_roles(Shell(models("bert"))) == roles
    assert infer_roles(Shell(torch.compile(Shell(models("bert"))))) != {}
    assert infer_roles(torch.compile(models("bert"))) == roles
    wrapped = MODELS["bert"]()
    layer = wrapped.bert.encoder.layer[0]
    layer.attention.self.query = torch.compile(layer.attention.self.query)
    layer.attention.self = checkpoint_wrapper(layer.attention.self)
    wrapped.bert.encoder.layer[0] = checkpoint_wrapper(layer)
    assert infer_roles(wrapped) == roles


def lora(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(MODELS[name]().eval(), peft.LoraConfig(r=2, **options))


def test_a_lora_model_keeps_the_roles_of_the_model_under_it(models: Callable[[str], nn.Module]) -> None:
    model = lora("llama", target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"])
    roles, base, shapes = infer_roles(model), infer_roles(models("llama")), shapes_of(model)
    assert list(roles) == list(shapes)
    for name, role in base.items():
        if name != "lm_head.weight":
            assert roles[name] == role
    assert roles["lm_head.modules_to_save.default.weight"].kind == "head"
    assert unclaimed_by_adam_mini(roles, shapes) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "vit"])
def test_lora_b_has_the_output_rows_of_its_weight_and_lora_a_directions(name: str) -> None:
    layers = {"gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": ["query_key_value", "dense"]}
    if name == "vit" and any(path.endswith(".query") for path, _ in MODELS[name]().named_modules()):
        layers["vit"] = ["query", "key", "value"]  # as older releases of transformers call them
    model = lora(name, target_modules=layers.get(name, ["q_proj", "k_proj", "v_proj", "o_proj"]))
    roles, shapes = infer_roles(model), shapes_of(model)
    adapted = [path.split(".lora_B.")[0] for path in roles if ".lora_B." in path]
    assert len(adapted) >= 2
    for path in adapted:
        a, b, weight = f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight", roles[f"{path}.weight"]
        assert (roles[a].kind, adam_mini_blocks(roles[a], shapes[a]).num_blocks) == ("linear", 2)
        assert (roles[b].kind, roles[b].head_dim, roles[b].parts) == (weight.kind, weight.head_dim, weight.parts)
        assert roles[b].output_dim == 0  # also where the weight is (in, out)
        whole = adam_mini_blocks(weight, shapes[f"{path}.weight"])
        assert adam_mini_blocks(roles[b], shapes[b]).runs == whole.runs
        assert is_matrix(roles[a], shapes[a])
        assert is_matrix(roles[b], shapes[b])


@pytest.mark.parametrize("layer", ["q_proj", "k_proj"])
def test_a_block_of_lora_b_is_a_head(layer: str) -> None:
    model = lora("llama", target_modules=[layer])
    (name,) = [name for name, _ in model.named_parameters() if "lora_B" in name]
    parameter, role = model.get_parameter(name), infer_roles(model)[canonical_name(name)]
    grid = adam_mini_blocks(role, tuple(parameter.shape))
    blocks = block_of_each_element(grid, tuple(parameter.shape))
    inputs = inputs_of(model)

    @torch.no_grad()
    def attention() -> Tensor:
        return model(**inputs, output_attentions=True).attentions[0]

    before, group = attention(), HEADS // grid.num_blocks
    assert grid.num_blocks == {"q_proj": HEADS, "k_proj": KEY_HEADS}[layer]
    for block in range(grid.num_blocks):
        with Perturbed(parameter, blocks == block):
            after = attention()
        changed = {head for head in range(HEADS) if not torch.equal(before[:, head], after[:, head])}
        assert changed == set(range(block * group, (block + 1) * group))


def test_what_an_adapter_adds_to_tokens_and_heads_belongs_to_tokens() -> None:
    model = lora("llama", target_modules=["embed_tokens", "lm_head"])
    roles, shapes = infer_roles(model), shapes_of(model)
    embedding, head = "model.embed_tokens.lora_embedding_{}.default", "lm_head.lora_{}.default.weight"
    found = {text: roles[text] for text in (embedding.format("A"), head.format("B"))}
    assert [role.kind for role in found.values()] == ["embedding", "head"]
    for text, role in found.items():
        grid = adam_mini_blocks(role, shapes[text])
        token = 1 if "embedding" in text else 0
        assert grid.num_blocks == VOCABULARY == shapes[text][token]
        blocks = block_of_each_element(grid, shapes[text])
        assert torch.equal(blocks.movedim(token, 0)[:, 0], torch.arange(VOCABULARY))
        assert not is_matrix(role, shapes[text])  # Shampoo and SWAN leave tokens to Adam
    for text in (embedding.format("B"), head.format("A")):
        assert roles[text].kind == "linear"
        assert is_matrix(roles[text], shapes[text])


def test_vectors_of_an_adapter() -> None:
    dora = lora("llama", target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1, 5])
    roles, shapes = infer_roles(dora), shapes_of(dora)
    (magnitude,) = [name for name in roles if "lora_magnitude_vector" in name]
    assert adam_mini_blocks(roles[magnitude], shapes[magnitude]).num_blocks == 1
    assert is_decay_exempt(roles[magnitude])
    (tokens,) = [name for name in roles if "trainable_tokens_delta" in name]
    assert (roles[tokens].kind, adam_mini_blocks(roles[tokens], shapes[tokens]).num_blocks) == ("embedding", 2)
    ada = peft.get_peft_model(MODELS["llama"](), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    kinds = {name.split(".")[-2]: role for name, role in infer_roles(ada).items() if "lora_" in name}
    assert {part: role.kind for part, role in kinds.items()} == {
        "lora_A": "linear",
        "lora_B": "query",
        "lora_E": "linear",
    }


@pytest.mark.skipif(IS_4, reason="Mixtral's experts are modules in transformers 4")
def test_adapters_of_convolutions_stacked_experts_and_torchs_attention() -> None:
    vit = lora("vit", target_modules=["projection"])
    assert {role.kind for name, role in infer_roles(vit).items() if "lora_" in name} == {"conv"}
    experts = lora("mixtral", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    assert {role.kind for name, role in infer_roles(experts).items() if "lora_" in name} == {"linear"}
    torchs = nn.TransformerEncoderLayer(12, 3, 16)
    roles = infer_roles(peft.get_peft_model(torchs, peft.LoraConfig(r=2, target_modules=["self_attn"])))
    fused = roles["self_attn.lora_B.default.weight"]
    assert (fused.kind, fused.head_dim, [part.kind for part in fused.parts]) == ("fused", 4, list(PARTS))


def test_adapters_by_name_alone() -> None:
    model = lora("llama", target_modules=["embed_tokens", "q_proj", "down_proj"], use_dora=True)
    trained = {canonical_name(name) for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: shape for name, shape in shapes_of(model).items() if name in trained}
    named, inferred = resolve_roles(None, shapes), infer_roles(model)
    assert {name: (role.kind, role.output_dim) for name, role in named.items()} == {
        name: (inferred[name].kind, inferred[name].output_dim) for name in shapes
    }


def test_torch_modules_have_roles_without_transformers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(12, 3, 16)
            self.up = nn.ConvTranspose2d(4, 6, 3)
            self.bn = nn.BatchNorm2d(6)
            self.memory = nn.LSTM(6, 5)
            self.bag = nn.EmbeddingBag(7, 4)

    model = Mixed()
    roles, shapes = infer_roles(model), shapes_of(model)
    fused = roles["block.self_attn.in_proj_weight"]
    assert (fused.kind, fused.head_dim, [p.size for p in fused.parts]) == ("fused", 4, [12, 12, 12])
    assert adam_mini_blocks(fused, (36, 12)).runs == ((6, 4), (12, 1))
    assert roles["block.self_attn.out_proj.weight"].kind == "attention_output"
    assert roles["block.linear1.weight"].kind == "linear"
    up = adam_mini_blocks(roles["up.weight"], shapes["up.weight"])  # (in, out, height, width)
    assert (up.reduce, up.axis, up.inner, up.num_blocks) == (4, 6, 9, 6)
    assert roles["bn.weight"].kind == "norm"
    assert roles["memory.weight_ih_l0"].kind == "linear"
    assert roles["memory.bias_ih_l0"].kind == "bias"
    assert roles["bag.weight"].kind == "embedding"


def test_a_fused_weight_of_a_module_of_the_users_own() -> None:
    class CausalSelfAttention(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.n_head, self.n_embd = 3, 12
            self.add_module(name, nn.Linear(12, 36, bias=False))
            self.c_proj = nn.Linear(12, 12, bias=False)

    role = infer_roles(CausalSelfAttention("c_attn"))["c_attn.weight"]
    assert (role.output_dim, role.head_dim) == (0, 4)
    assert role.parts == (Part("query", 12), Part("key", 12), Part("value", 12))
    # Fewer key heads than the module tells of: no guess either.
    grouped = CausalSelfAttention("qkv")
    grouped.qkv = nn.Linear(12, 20, bias=False)
    assert infer_roles(grouped)["qkv.weight"].parts == ()
    grouped.num_kv_heads = 1
    assert [part.size for part in infer_roles(grouped)["qkv.weight"].parts] == [12, 4, 4]
    # Thirds, or head by head? The name is used for both: no guess.
    model = CausalSelfAttention("query_key_value")
    with pytest.warns(UserWarning, match=r"query_key_value\.weight 36x12 \(fused\)"):
        unclaimed_by_adam_mini(infer_roles(model), shapes_of(model))


# -- what is not understood -------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Linear(3, 4)
        self.codebook = nn.Parameter(torch.zeros(5, 6))
        self.cores = nn.Parameter(torch.zeros(2, 3, 4))
        self.temperature = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.zeros(1, 8, 1))


def test_unknown_matrices_get_a_block_per_row_and_one_warning_that_names_all() -> None:
    model = Unknown()
    roles, shapes = infer_roles(model), shapes_of(model)
    with pytest.warns(UserWarning, match="2 parameter") as caught:
        assert unclaimed_by_adam_mini(roles, shapes) == ["codebook", "cores"]
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "codebook 5x6" in text
    assert "cores 2x3x4" in text
    assert "known" not in text
    blocks = {name: adam_mini_blocks(roles[name], shapes[name]).num_blocks for name in roles}
    assert blocks == {"codebook": 5, "cores": 2, "temperature": 1, "scale": 1, "known.weight": 4, "known.bias": 4}


def test_queries_and_keys_without_a_known_head_are_split_by_row_and_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(6, 8), nn.Linear(6, 8)

    model = Attention()
    roles = infer_roles(model)
    assert adam_mini_blocks(roles["q_proj.weight"], (8, 6)).num_blocks == 8
    with pytest.warns(UserWarning, match=r"q_proj\.weight 8x6 \(query\), k_proj\.weight 8x6 \(key\).*roles=model"):
        unclaimed_by_adam_mini(roles, shapes_of(model))


def test_names_alone_give_kinds_but_no_heads(models: Callable[[str], nn.Module]) -> None:
    shapes = shapes_of(models("qwen3"))
    roles, inferred = resolve_roles(None, shapes), infer_roles(models("qwen3"))
    assert {name: role.kind for name, role in roles.items()} == {name: role.kind for name, role in inferred.items()}
    with pytest.warns(UserWarning, match="roles=model"):
        unclaimed = unclaimed_by_adam_mini(roles, shapes)
    assert {name.split(".")[-2] for name in unclaimed} == {"q_proj", "k_proj"}


def test_parts_of_words_are_not_names() -> None:
    names = ("qkv_proj.weight", "kiln.weight", "mlp.norm.weight", "requery.weight", "valued.weight")
    shapes = {name: (4,) if "norm" in name else (6, 4) for name in names}
    kinds = {name: role.kind for name, role in resolve_roles(None, shapes).items()}
    assert kinds == {
        "qkv_proj.weight": "fused",
        "kiln.weight": "other",
        "mlp.norm.weight": "norm",
        "requery.weight": "other",
        "valued.weight": "other",
    }


# -- what the user says -----------------------------------------------------------------------------------------------

SHAPES = {"a.query.weight": (8, 6), "b.query.weight": (8, 6), "b.up.weight": (12, 6), "b.bias": (6,), "e": (2, 6, 4)}
BASE = {name: Role("bias" if name == "b.bias" else "linear") for name in SHAPES}


def test_the_first_pattern_that_matches_wins() -> None:
    patterns = {
        "b.query.*": {"kind": "query", "head_dim": 4},
        "*.query.*": {"kind": "query", "head_dim": 2},
        "e": {"kind": "mlp", "batch_dims": 1, "output_dim": 2},
        "*.up.*": {"parts": [["mlp", 4], ["mlp", 8]]},
    }
    roles = override_roles(BASE, patterns, SHAPES)
    assert roles["a.query.weight"] == Role("query", head_dim=2, source="override")
    assert roles["b.query.weight"] == Role("query", head_dim=4, source="override")
    assert roles["b.up.weight"] == Role("fused", parts=(Part("mlp", 4), Part("mlp", 8)), source="override")
    assert adam_mini_blocks(roles["e"], SHAPES["e"]).num_blocks == 2 * 4
    assert roles["b.bias"] == BASE["b.bias"]


def test_a_pattern_changes_what_it_states_and_keeps_the_rest(models: Callable[[str], nn.Module]) -> None:
    shapes, base = shapes_of(models("gpt2")), infer_roles(models("gpt2"))
    roles = override_roles(base, {"*.c_attn.weight": "linear", "*.c_fc.weight": Role("mlp")}, shapes)
    assert roles["transformer.h.0.attn.c_attn.weight"] == Role("linear", output_dim=1, head_dim=6, source="override")
    assert roles["transformer.h.0.mlp.c_fc.weight"] == Role("mlp", source="override")


def test_every_mistake_is_listed_at_once() -> None:
    patterns = {
        "*.nothing": "mlp",
        "a.query.*": {"kind": "query", "head_dim": 3},
        "b.query.*": {"kind": "quarry"},
        "*.query.*": "value",
        "b.up.*": {"parts": [["mlp", 5], ["mlp", 8]]},
        "e": {"kind": "mlp", "output_dim": 3, "colour": "red"},
        "b.*": 7,
    }
    with pytest.raises(ValueError, match="roles cannot be used") as caught:
        override_roles(BASE, patterns, SHAPES)
    text = str(caught.value)
    for part in (
        '"*.nothing" matches no parameter',
        "head_dim 3 does not divide the 8 output rows",
        "unknown kind 'quarry'",
        '"*.query.*" matches only what earlier patterns claim',
        "parts add up to 13, the output dimension has 12",
        'unknown key "colour"',
        "not 7",
        "one of embedding, head, query",
    ):
        assert part in text, part
    with pytest.raises(ValueError, match="output_dim 3 does not exist in shape"):
        override_roles(BASE, {"e": {"output_dim": 3}}, SHAPES)
    with pytest.raises(ValueError, match=r"head_dim must be an integer, not 'four'"):
        override_roles(BASE, {"a.*": {"kind": "query", "head_dim": "four"}}, SHAPES)


def test_an_optimizer_takes_roles_in_every_form(models: Callable[[str], nn.Module]) -> None:
    model = models("llama")
    shapes, inferred = shapes_of(model), infer_roles(model)
    assert resolve_roles(inferred, shapes) == inferred
    assert resolve_roles(model, shapes) == inferred
    trained = {name: shapes[name] for name in list(shapes)[:3]}
    assert resolve_roles(inferred, trained) == {name: inferred[name] for name in trained}
    patterned = resolve_roles({"*.q_proj.weight": {"kind": "query", "head_dim": HEAD_DIM}}, shapes)
    assert patterned["model.layers.0.self_attn.q_proj.weight"].head_dim == HEAD_DIM
    assert patterned["model.layers.0.self_attn.k_proj.weight"].head_dim is None
    # With a model, parameters without names are found by identity.
    names = {parameter: f"parameter {number}" for number, parameter in enumerate(model.parameters())}
    numbered = {name: logical_shape(parameter) for parameter, name in names.items()}
    assert list(resolve_roles(model, numbered, names).values()) == list(inferred.values())


def test_roles_of_another_model_are_refused(models: Callable[[str], nn.Module]) -> None:
    shapes = shapes_of(models("llama"))
    with pytest.raises(ValueError, match="the model given as `roles` has no such parameter") as caught:
        resolve_roles(models("bert"), shapes)
    assert all(name in str(caught.value) for name in shapes)
    roles = infer_roles(models("llama"))
    shapes["model.layers.0.self_attn.q_proj.weight"] = (12, WIDTH)
    with pytest.raises(ValueError, match="head_dim 8 does not divide the 12 output rows"):
        resolve_roles(roles, shapes)
    with pytest.raises(ValueError, match="roles must be a model"):
        resolve_roles("mlp", shapes)


# -- weight decay -----------------------------------------------------------------------------------------------------


def test_param_groups_spare_norms_and_biases_and_leave_frozen_parameters_out() -> None:
    model = MODELS["qwen2_moe"]()
    model.model.embed_tokens.weight.requires_grad_(False)
    decayed, exempt = param_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {re.sub(r".*\.", "", names[p]) for p in exempt["params"]} == {"weight", "bias"}
    assert all(p.ndim == 1 for p in exempt["params"])
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names) - 1
    torch.optim.AdamW(param_groups(model, 0.1))


def test_param_groups_without_parameters_are_left_out() -> None:
    assert [group["weight_decay"] for group in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [group["weight_decay"] for group in param_groups(nn.LayerNorm(2), 0.1)] == [0.0]


# -- the document -----------------------------------------------------------------------------------------------------


def make_roles() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "make_roles.py"
    spec = importlib.util.spec_from_file_location("make_roles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(TRANSFORMERS.is_before("5.17"), reason="some modules had other names")
def test_the_tables_in_the_docs_are_what_the_code_says() -> None:
    script = make_roles()
    written = script.PAGE.read_text().split(script.MARK)[1]
    assert written == script.tables(), "run: python docs/make_roles.py"
