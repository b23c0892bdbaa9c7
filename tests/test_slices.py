"""What AutoTP's layers say of their parameters: held against the whole weights, for models of many families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_optim.deepspeed import model_parts
from ds_optim.roles import infer_roles
from parallel import engine_alone
from pool import Pools

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OF_OLD = {"vocab_size": 40, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
FALCON = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama with biases": ("LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 6}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 6}),
    "neox": ("GPTNeoXConfig", SIZES),
    "phi": ("PhiConfig", SIZES),
    "bloom": ("BloomConfig", {"vocab_size": 40, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 24}),
    "falcon": ("FalconConfig", FALCON),
    "falcon, grouped": ("FalconConfig", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "gptj": ("GPTJConfig", {**OF_OLD, "n_embd": 24}),
    "codegen": ("CodeGenConfig", {**OF_OLD, "n_embd": 32}),
}


def model_of(family: str) -> nn.Module:
    import transformers

    name, settings = CONFIGS[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)  # no two rows alike
    return model


def cut(model: nn.Module, check: Callable[[nn.Module, int], Any]) -> Any:
    """What is found of a model that AutoTP has cut over two ranks."""
    import deepspeed.utils.groups as known

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": 2},
        "optimizer": {"type": "ds_optim.AdamW", "params": {"lr": 1e-2}},
    }
    with engine_alone(model, config) as engine:
        return check(engine.module, dist.get_rank(known.get_tensor_model_parallel_group()))


def compared(family: str) -> dict[str, Any]:
    model = model_of(family)
    whole, before = {name: one.detach().clone() for name, one in model.named_parameters()}, infer_roles(model)

    def check(module: nn.Module, rank: int) -> dict[str, Any]:
        slices, names = model_parts.slices_in(module), model_parts.names_in(module)
        wrong = []
        for parameter, name in names.items():
            its = slices.get(parameter)
            boxes = its.boxes[rank] if its else ()
            parts = [whole[name][tuple(map(slice, box.start, box.stop))].flatten() for box in boxes]
            expected = torch.cat(parts) if its else whole[name].flatten()
            if not torch.equal(expected, parameter.detach().flatten()) or (its and its.whole != whole[name].shape):
                wrong.append(name)
        after = model_parts.roles_in(module)
        others = {
            name: (role, after.get(name))
            for name, role in before.items()
            if name not in after or replace(role, source="module") != replace(after[name], source="module")
        }
        unknown = model_parts.unknown_slices(module)
        return {"wrong": wrong, "roles": others, "unknown": unknown, "cut": len(slices), "all": len(names)}

    return cut(model, check)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_slices_are_what_ranks_really_have(pool: Pools, family: str) -> None:
    """Every family's parameters are known, lie where the layers say, and have the roles of the whole model."""
    for found in pool(2).run(compared, family):
        assert found["wrong"] == []
        assert found["roles"] == {}
        assert found["unknown"] == []
        assert found["all"] / 3 < found["cut"] < found["all"]


def turned() -> list[str]:
    """A layer of AutoTP that turns its weight round, and says nothing of it; what is not known of the model."""
    from deepspeed.module_inject.layers import Conv_LinearALlreduce

    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
    model[0] = Conv_LinearALlreduce(nn.Linear(6, 6, bias=False), None, name="c_proj")
    return model_parts.unknown_slices(model)


def test_a_layer_that_interleaves_or_turns_is_not_known(pool: Pools) -> None:
    assert pool(1).run(turned) == [["0.weight"]]


def norms_of_heads(registered: bool) -> list[str]:
    """A model whose queries have a norm, cut; with or without what adds its gradients up."""

    def check(module: nn.Module, _: int) -> list[str]:
        for name, parameter in module.named_parameters():
            if "_norm" in name:
                parameter._ds_grad_allreduce_registered = registered  # type: ignore[attr-defined]
        return model_parts.partial_gradients(module)

    return cut(model_of("qwen3"), check)  # type: ignore[no-any-return]


def test_norms_whose_gradients_nobody_adds_up_are_found(pool: Pools) -> None:
    assert pool(2).run(norms_of_heads, True) == [[], []]
    for found in pool(2).run(norms_of_heads, False):
        assert "model.layers.0.self_attn.q_norm.weight" in found
        assert len(found) == 4
