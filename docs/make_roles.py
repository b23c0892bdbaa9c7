"""Writes the tables of docs/roles.md: role and Adam-mini blocks of every parameter, model family by model family.

    python docs/make_roles.py

The models have the shapes of well-known releases, with one layer each, on the meta device: nothing is downloaded or
allocated. tests/test_roles.py fails when the tables are not what this writes.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from ds_optim.known_transformers import tied
from ds_optim.optimizers.adam_mini import adam_mini_blocks
from ds_optim.roles import infer_roles, logical_shape
from ds_optim.roles.role import Role

PAGE = Path(__file__).with_name("roles.md")
MARK = "<!-- everything below is written by docs/make_roles.py -->\n"


def causal_lm(family: str, **shapes: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(num_hidden_layers=1, **shapes)
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def lora() -> nn.Module:
    model = causal_lm("Llama", **LLAMA_3_8B)()
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=1))


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_heads=6,
        num_layers=1,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=1))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))


LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
FAMILIES: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
    ("Llama (Llama-3-8B)", causal_lm("Llama", **LLAMA_3_8B)),
    (
        "Qwen2 (Qwen2-0.5B)",
        causal_lm(
            "Qwen2",
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    (
        "Qwen3 (Qwen3-0.6B)",
        causal_lm(
            "Qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    (
        "Mistral (Mistral-7B)",
        causal_lm(
            "Mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    (
        "Gemma 2 (Gemma-2-2B)",
        causal_lm(
            "Gemma2",
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        ),
    ),
    (
        "Gemma 3 (Gemma-3-1B)",
        lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                num_hidden_layers=1,
                vocab_size=262144,
                hidden_size=1152,
                intermediate_size=6912,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
            )
        ),
    ),
    ("GPT-2 (small; Conv1D keeps weights as (in, out))", gpt2),
    (
        "GPT-NeoX (Pythia-160M; query, key and value head by head)",
        causal_lm("GPTNeoX", vocab_size=50304, hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    ),
    (
        "Phi-3 (mini)",
        causal_lm(
            "Phi3",
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
    ),
    (
        "Mixtral (8x7B)",
        causal_lm(
            "Mixtral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
        ),
    ),
    (
        "Qwen2-MoE (Qwen1.5-MoE-A2.7B)",
        causal_lm(
            "Qwen2Moe",
            vocab_size=151936,
            hidden_size=2048,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=60,
        ),
    ),
    (
        "Qwen3-MoE (Qwen3-30B-A3B)",
        causal_lm(
            "Qwen3Moe",
            vocab_size=151936,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
        ),
    ),
    (
        "GPT-OSS (20b; experts are (expert, in, out), gate and up alternate)",
        causal_lm(
            "GptOss",
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=32,
        ),
    ),
    ("BERT (base, classifier)", bert),
    ("T5 (v1.1 small: 6 heads of 64 in a width of 512)", t5),
    ("ViT (base, classifier)", vit),
    ("LoRA on Llama-3-8B (PEFT; what it trains, and the weights beside it)", lora),
)


def block_text(role: Role, shape: tuple[int, ...]) -> str:
    """One Adam-mini block in words."""
    grid = adam_mini_blocks(role, shape)
    if role.kind == "bias":
        return "element"
    if grid.num_blocks == 1 and grid.numel == shape[-1]:
        return "whole tensor"
    unit = (
        "token"
        if role.kind == "embedding"
        else "column"
        if grid.inner == 1
        else "channel"
        if len(shape) == 4
        else "row"
    )
    runs = [
        f"{width} {unit}s" if width > 1 else unit for _, width in dict.fromkeys((0, width) for _, width in grid.runs)
    ]
    of = " of an expert" if role.batch_dims and role.kind != "embedding" else ""
    if role.kind in ("query", "key"):
        return f"head: {runs[0]}"
    if role.head_dim and len(runs) > 1:
        return f"q and k head: {runs[0]}; v: {runs[1]}"
    return runs[0] + of


def rows_of(model: nn.Module) -> Iterator[tuple[str, str, str, str, str]]:
    """``(parameters, shape, role, block, blocks)``, parameters that agree in all else in one row."""
    roles = infer_roles(model)
    shapes = dict(zip(roles, (logical_shape(p) for _, p in model.named_parameters()), strict=True))
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for name, role in roles.items():
        parts = f" ({' '.join(dict.fromkeys(part.kind for part in role.parts))})" if role.parts else ""
        blocks = adam_mini_blocks(role, shapes[name]).num_blocks
        size = " x ".join(map(str, shapes[name]))
        row = (size, role.kind + parts, block_text(role, shapes[name]), f"{blocks:,}")
        any_layer = re.sub(r"(layers?|h|block)[.]0[.]", r"\1.*.", name, count=1)
        rows.setdefault(row, []).append(f"`{any_layer}`")
    for row, names in rows.items():
        yield (", ".join(dict.fromkeys(names)), *row)


def tables() -> str:
    transformers.utils.logging.set_verbosity_error()
    text = []
    for title, build in FAMILIES:
        with torch.device("meta"):
            model = tied(build())
        text.append(f"\n### {title}\n\n| parameter | shape | role | one block | blocks |\n|---|---|---|---|---:|\n")
        text += [f"| {' | '.join(row)} |\n" for row in rows_of(model)]
    return "".join(text)


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().split(MARK)[0] + MARK + tables())
