"""One training measured and predicted, for tests/test_estimate.py and benchmarks/memory_accuracy.py."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ds_optim.deepspeed.names import json_names
from ds_optim.known_transformers import checkpoint_activations
from ds_optim.releases import DEEPSPEED, TORCH

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "use_cache": False,
}
if TORCH.is_before("2.9"):  # on CPUs fewer keys than queries cost it a matrix of scores
    MODEL["num_key_value_heads"] = 4
OPTIMIZERS = tuple(json_names())


@dataclass(frozen=True)
class MemoryCase:
    """A few steps of a small Llama under DeepSpeed.

    Attributes:
        optimizer: as in a JSON.
        stage: of ZeRO.
        precision: fp32 or bf16.
        zero: further settings of ``zero_optimization``. DeepSpeed's own buckets would hide everything else in a model
            of this size, so they are small unless said otherwise.
        checkpointing: activations are recomputed.
        passes: micro-batches per step.
        options: further ones of the optimizer.
    """

    optimizer: str
    stage: int
    precision: str = "bf16"
    zero: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    micro_batch: int = 2
    seq_length: int = 64
    passes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        small = {"reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 1000} if self.stage else {}
        if self.stage == 3 and DEEPSPEED.is_before("0.19.8"):  # what is refused otherwise
            small["stage3_allgather_sequential"] = True
        # Predicted is the fullest step, so that every step must be that.
        often = {"precondition_frequency": 1} if self.optimizer in ("Shampoo", "SOAP") else {}
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.passes,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-3, **often, **self.options}},
            "zero_optimization": {"stage": self.stage, **small, **self.zero},
        }
        if self.precision == "bf16":
            found["bf16"] = {"enabled": True}
        return found


def measured(case: MemoryCase, model: dict[str, Any] = MODEL, **options: Any) -> str:
    """The record of a real engine's third step, all ranks, as JSON. Runs in every process of a pool."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_optim.memory.accountant import MemoryAccountant

    with MemoryAccountant(**options) as account:
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
        if case.checkpointing:
            checkpoint_activations(network)
        engine, *_ = deepspeed.initialize(model=network, config=case.config())
        account.watch(engine)
        ids = torch.randint(0, model["vocab_size"], (case.micro_batch, case.seq_length))
        for _ in range(3 * case.passes):
            # transformers 4 would make a mask, one for every layer, if it was not told that there is no padding.
            loss = engine(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
            engine.backward(loss)
            engine.step()
        record = account.gather()
    engine.destroy()
    del engine, network
    gc.collect()
    return record.model_dump_json()


def request(case: MemoryCase, ranks: int, model: dict[str, Any] = MODEL, name: str = "small Llama") -> Any:
    """What to ask the estimate for."""
    from ds_optim.memory.estimate import request_of

    asked = request_of(model, name, case.config(), ranks, case.seq_length)
    return replace(asked, checkpointing=case.checkpointing)
