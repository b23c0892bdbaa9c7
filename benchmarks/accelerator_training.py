"""The convergence study of benchmarks/accelerator.py: what all optimizers make of the minutes that are left.

Every optimizer trains the small Llama with its three learning rates, from the same weights on the same windows. All
runs of a batch size have the same tokens: ten steps of each are timed first, and all together get what they can end
with in the time that is left, 20 tokens per parameter at most. Further batch sizes follow where that leaves time for
them. Of the runs with one learning rate the slowest come first, and a run that time overtakes is dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerator_bench import Bench, TimeIsUpError
from convergence import RECIPES, TEXT_CACHE, Setting, corpus, llama, next_token_loss
from torch import nn

import ds_optim
from ds_optim.selftest import checks
from ds_optim.selftest.result import CheckResult, judged, not_here

TIMED = 10  # steps, after as many that are not: Shampoo takes its roots anew once in them
PLANNED = 0.85  # of the time that is left: models are made, and losses taken, between the steps
LEAST = 0.05  # of the tokens that are wanted: fewer show nothing
ORDER = (1, 0, 2)  # of the learning rates: the middle one first


def convergence(bench: Bench) -> Iterator[CheckResult]:
    """Held-out losses after as many tokens as there is time for."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TEXT_CACHE if bench.sizes.text is None else Path(folder)
        text = corpus.load(corpus.prepare(bench.sizes.text, bench.sizes.setting.vocab_size, cache))
        for batch in bench.sizes.batches:
            yield from with_batch(bench, text, batch)


def with_batch(bench: Bench, text: Any, batch: int) -> Iterator[CheckResult]:
    """All runs of a batch size.

    Raises:
        TimeIsUpError: the last one was dropped.
    """
    setting = dataclasses.replace(bench.sizes.setting, batch_size=batch)
    seconds = {name: seconds_per_step(bench, text, name, setting) for name in RECIPES}
    wanted = bench.sizes.tokens_per_parameter * sum(one.numel() for one in llama(setting).parameters())
    tokens = affordable(seconds, setting, bench.seconds_left, wanted)
    if tokens < LEAST * wanted:
        said = f"{bench.seconds_left:.0f} s are left, {tokens:,} tokens for each run: it takes more --minutes"
        yield not_here(f"{batch} sequences", said)
        return
    setting = dataclasses.replace(setting, tokens=tokens)
    slowest_first = sorted(RECIPES, key=seconds.__getitem__, reverse=True)
    for index, name in itertools.product(ORDER, slowest_first):
        lr = RECIPES[name].learning_rates[index] * math.sqrt(batch / 16)
        what = f"{name}, {batch} sequences, learning rate {lr:.1e}"
        begin = time.monotonic()
        try:
            loss = trained(bench, text, name, lr, setting)
        except TimeIsUpError as error:
            yield not_here(what, f"dropped: {error}")
            raise
        took, done = time.monotonic() - begin, setting.steps * setting.tokens_per_step
        said = f"held-out loss {loss:.4f} after {done:,} tokens, {took:.0f} s"
        yield judged(what, math.isfinite(loss), said, loss=loss, tokens=done, lr=lr, seconds=took)


def affordable(seconds: Mapping[str, float], setting: Setting, left: float, wanted: float) -> int:
    """Tokens of each run, so that all end in the time that is left.

    Args:
        seconds: of a step, by optimizer; each runs once for every learning rate.
        setting: of the runs.
        left: seconds.
        wanted: tokens, at most.
    """
    steps = int(PLANNED * max(left, 0) / (len(ORDER) * sum(seconds.values())))
    return min(round(wanted), steps * setting.tokens_per_step)


def seconds_per_step(bench: Bench, text: Any, name: str, setting: Setting) -> float:
    """The mean of ten."""
    setting = dataclasses.replace(setting, tokens=2 * TIMED * setting.tokens_per_step)
    steps = training(bench, text, name, RECIPES[name].learning_rates[0], setting)
    begin = 0.0
    for _ in range(2):
        checks.synchronize(bench.device)
        begin = time.monotonic()
        for _ in itertools.islice(steps, TIMED):
            pass
    checks.synchronize(bench.device)
    return (time.monotonic() - begin) / TIMED


def trained(bench: Bench, text: Any, name: str, lr: float, setting: Setting) -> float:
    """The held-out loss at the end of a run.

    Raises:
        TimeIsUpError: before that.
    """
    *_, model = training(bench, text, name, lr, setting)
    windows = corpus.Windows(text.held_out, setting.seq_length, 0).global_batch(0, setting.held_out_sequences)
    with torch.no_grad():
        parts = torch.from_numpy(windows).split(setting.batch_size)
        losses = [next_token_loss(model, ids.to(bench.device)) for ids in parts]
        return float(torch.stack(losses).mean())


def training(bench: Bench, text: Any, name: str, lr: float, setting: Setting) -> Iterator[Any]:
    """The model after every step.

    Raises:
        TimeIsUpError: before the last one.
    """
    torch.manual_seed(0)
    model = llama(setting).to(bench.device)
    groups = ds_optim.param_groups(model, RECIPES[name].weight_decay)
    optimizer = getattr(ds_optim, name)(groups, lr=lr, roles=model, **RECIPES[name].options)
    windows = corpus.Windows(text.train, setting.seq_length, 0)
    for step in range(setting.steps):
        bench.look(f"{step:,} of {setting.steps:,} steps")
        for group in optimizer.param_groups:
            group["lr"] = lr * setting.learning_rate_share(step)
        ids = torch.from_numpy(windows.global_batch(step, setting.batch_size)).to(bench.device, non_blocking=True)
        next_token_loss(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield model
