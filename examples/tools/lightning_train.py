"""Lightning under DeepSpeed: the JSON names the optimizer, and `configure_optimizers` returns nothing of it.

    torchrun --nproc_per_node 2 examples/tools/lightning_train.py examples/tools/lightning.json runs/lit
    torchrun --nproc_per_node 1 examples/tools/lightning_train.py examples/tools/lightning.json runs/lit --resume

The second goes on from the first one's checkpoint on another number of ranks. Lightning 2.6 lets DeepSpeed run on CUDA
alone: without accelerators `OnCpu` pretends.
"""

import argparse
import json
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class OnCpu(CUDAAccelerator):
    """Ranks without accelerators."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def is_available() -> bool:
        return True


class Regression(lightning.LightningModule):
    """Learns a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> None:
        """The JSON names it."""


parser = argparse.ArgumentParser()
parser.add_argument("config")
parser.add_argument("folder")
parser.add_argument("--resume", action="store_true")
given = parser.parse_args()

torch.manual_seed(0)
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs @ torch.randn(8, 4))
ranks = TorchElasticEnvironment().world_size()
pretends = {} if torch.accelerator.is_available() else {"process_group_backend": "gloo"}
trainer = lightning.Trainer(
    accelerator=OnCpu() if pretends else "auto",
    devices=ranks,
    strategy=DeepSpeedStrategy(config=given.config, **pretends),
    max_steps=12 if given.resume else 6,
    default_root_dir=given.folder,
    callbacks=[ModelCheckpoint(dirpath=given.folder, filename="last", save_on_train_epoch_end=True)],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
module = Regression()
loader = DataLoader(data, batch_size=32 // ranks)  # the same global batch on any number of ranks
trainer.fit(module, loader, ckpt_path=f"{given.folder}/last.ckpt" if given.resume else None)
engine = trainer.strategy.deepspeed_engine
if trainer.is_global_zero:
    found = {"optimizer": type(engine.basic_optimizer).__name__, "steps": engine.global_steps, "loss": module.losses}
    print(json.dumps(found))
