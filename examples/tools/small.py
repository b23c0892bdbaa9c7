"""What the examples of other tools train: a Llama of 36,000 parameters, bytes for tokens, sentences. No download."""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    named.chat_template = "{% for one in messages %}{{ one['role'] + ': ' + one['content'] + '\\n' }}{% endfor %}"
    return named


def model(seed: int = 0) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def sentences(count: int = 64, length: int = 60) -> list[str]:
    """Pieces of Python's language reference."""
    text = " ".join("".join(topics[name] for name in sorted(topics)).split())
    return [text[index * length : (index + 1) * length] for index in range(count)]


def texts(count: int = 64) -> Dataset:
    """For supervised fine-tuning."""
    return Dataset.from_dict({"text": sentences(count)})


def preferences(count: int = 32) -> Dataset:
    """For DPO: the sentence as it goes on, and backwards."""
    whole = sentences(count)
    return Dataset.from_dict(
        {
            "prompt": [one[:30] for one in whole],
            "chosen": [one[30:] for one in whole],
            "rejected": [one[30:][::-1] for one in whole],
        }
    )


def prompts(count: int = 32) -> Dataset:
    """For GRPO."""
    return Dataset.from_dict({"prompt": [one[:20] for one in sentences(count)]})
