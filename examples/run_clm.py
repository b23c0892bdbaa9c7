"""Pre-trains a causal language model on text files, as such scripts usually go: it knows the Trainer and nothing else.

    deepspeed examples/run_clm.py --deepspeed configs/hf_trainer_auto.json --output_dir OUT --train_files FILE...

It goes on from the newest checkpoint in the output directory, if there is one.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    config_name: str = field(default="configs/models/llama_small.json", metadata={"help": "A model's config.json."})
    hidden_size: int | None = field(default=None, metadata={"help": "Overrides the config's."})


@dataclass
class DataArguments:
    train_files: list[str] = field(default_factory=list, metadata={"help": "Text to train on."})
    block_size: int = field(default=128, metadata={"help": "Tokens of one sequence."})


def blocks_of(files: list[str], block_size: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of a byte-level BPE that is trained on the text itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    text = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    whole = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
    return [{"input_ids": row, "labels": row} for row in whole]


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    overrides = {"hidden_size": model_args.hidden_size} if model_args.hidden_size else {}
    config = AutoConfig.from_pretrained(model_args.config_name, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    data = blocks_of(data_args.train_files, data_args.block_size, config.vocab_size)
    trainer = Trainer(model=model, args=training_args, train_dataset=data)
    known = Path(training_args.output_dir)
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(known)) if known.is_dir() else None)
    trainer.log_metrics("train", result.metrics)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
