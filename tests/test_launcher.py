"""The main job and what ships with it: text and batches, settings, configs, log and memory table, a real run."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launcher"
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(LAUNCHER))  # as `deepspeed launcher/train.py` does

import corpus  # noqa: E402
import local_cluster  # noqa: E402
import settings  # noqa: E402
from progress import OptimizerClock, Progress  # noqa: E402
from state_table import ModelStates, StateMeter, table  # noqa: E402

import forked  # noqa: E402

PARAMETERS = {
    "llama_small": 4_273_920,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1.3b": 1_339_082_752,
    "tinyllama_1.1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "gpt2_xl": 1_557_611_200,
    "mixtral_8x7b": 46_702_792_704,
}
WORDS = ("loss", "model", "falls", "while", "its", "optimizer", "moves", "the", "weights", "along", "gradients")


def prose(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty small files: enough for some of them to be held out whole."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for i in range(40):
        (directory / f"{i}.txt").write_text(prose(i, 200))
    return directory


# ---------------------------------------------------------------------------------------------------- text and batches


def test_the_default_text_is_source_and_documentation_of_this_interpreter() -> None:
    documents = {d.name: d.text for d in corpus.interpreter_documents()}
    assert documents["stdlib/json/decoder.py"] == (Path(json.__file__).parent / "decoder.py").read_text()
    assert documents["reference/while"].startswith('The "while" statement')
    assert not [name for name in documents if "/test/" in name or "/tests/" in name]
    assert 5e6 < sum(map(len, documents.values())) < 30e6


def test_a_text_is_encoded_once_and_found_again(texts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = corpus.prepare([texts], 300, tmp_path / "cache", said.append)
    second = corpus.prepare([texts], 300, tmp_path / "cache", said.append)
    assert first == second
    assert len(said) == 1
    loaded = corpus.load(first)
    assert corpus.END_OF_TEXT not in loaded.tokenizer().decode(loaded.train[:50].tolist())
    assert loaded.tokenizer().decode(loaded.train[:20].tolist()) in "".join(p.read_text() for p in texts.iterdir())


def test_encoding_is_deterministic_and_follows_text_and_vocabulary(texts: Path, tmp_path: Path) -> None:
    here, there = (corpus.prepare([texts], 300, tmp_path / name) for name in ("here", "there"))
    assert here.name == there.name
    assert corpus.fingerprint(here) == corpus.fingerprint(there)
    assert corpus.prepare([texts], 301, tmp_path / "here").name != here.name
    (texts / "0.txt").write_text("another text")
    assert corpus.prepare([texts], 300, tmp_path / "here").name != here.name


def test_a_failed_encoding_leaves_nothing_behind(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.np, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        corpus.prepare([texts], 300, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_held_out_files_stay_held_out_when_files_are_added() -> None:
    documents = [corpus.Document(f"{i}.txt", "x" * 100) for i in range(200)]
    train, held_out = corpus.split(documents)
    assert sorted(d.name for d in train + held_out) == sorted(d.name for d in documents)
    assert 2 <= len(held_out) <= 30
    _, later = corpus.split([*documents, corpus.Document("new.txt", "y" * 100)])
    assert {d.name for d in held_out} <= {d.name for d in later}


def test_one_file_is_split_at_its_end() -> None:
    train, held_out = corpus.split([corpus.Document("book.txt", "a" * 95 + "b" * 5)])
    assert (train[0].text, held_out[0].text) == ("a" * 95, "b" * 5)


def test_every_unusable_text_path_is_named(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(corpus.TextError, match=r"missing\.txt: no such.*image\.png: empty, or not UTF-8"):
        corpus.user_documents([texts, tmp_path / "missing.txt", tmp_path / "image.png"])
    with pytest.raises(corpus.TextError, match="no UTF-8 text below"):
        corpus.user_documents([tmp_path / "empty"])
    with pytest.raises(corpus.TextError, match="257 tokens or more"):
        corpus.prepare([texts], 100, tmp_path / "cache")


def test_batches_are_functions_of_their_number_and_disjoint_within_an_epoch() -> None:
    windows = corpus.Windows(np.arange(1003, dtype=np.uint16), 10, seed=3)
    epoch = np.concatenate([windows.global_batch(i, 8) for i in range(12)] + [windows.global_batch(24, 4)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 1000, 10))
    assert (np.diff(epoch) == 1).all()
    again = corpus.Windows(windows.tokens, 10, seed=3)
    assert (again.global_batch(7, 8) == windows.global_batch(7, 8)).all()
    # Four batches of 8 are two of 16: the sequences of a step do not depend on how it is shared out.
    assert (np.concatenate([windows.global_batch(i, 8) for i in (2, 3)]) == windows.global_batch(1, 16)).all()
    across = windows.global_batch(12, 8)  # four windows of the first epoch, four of the second
    assert set(across[:4, 0]) <= set(range(0, 1000, 10)) - set(epoch[:96, 0])


def test_ranks_share_a_batch_out_without_overlap() -> None:
    import train

    windows = corpus.Windows(np.arange(4000, dtype=np.uint16), 10, seed=0)
    chosen: Any = SimpleNamespace(micro_batch=2, accumulation=3, seq_length=10)
    ranks = [list(train.Batches(windows, chosen, rank, 4, "cpu").of_step(5)) for rank in range(4)]
    assert all(ids.shape == (2, 10) and ids.dtype == torch.int64 for own in ranks for ids in own)
    everything = torch.cat([ids for own in ranks for ids in own])
    assert sorted(everything[:, 0].tolist()) == sorted(windows.global_batch(5, 24)[:, 0].tolist())


def text_of_this_rank(arguments: list[str], broken: bool) -> str:
    import train

    failure = mock.patch.object(corpus, "prepare", side_effect=ZeroDivisionError("division by zero"))
    with failure if broken else nullcontext():
        try:
            local_rank = int(os.environ["LOCAL_RANK"])
            return str(train.shared_text(settings.read(arguments, world_size=2), local_rank).directory)
        except corpus.TextError as error:
            return f"refused: {error}"


def test_all_ranks_get_the_text_or_hear_why_there_is_none(pool: Any, texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    arguments = ["--model", str(model), "--cache", str(tmp_path / "cache"), "--seq-length", "16", "--text", str(texts)]
    made = pool(2).run(text_of_this_rank, arguments, False)
    assert made[0] == made[1]
    assert (Path(made[0]) / "tokenizer.json").exists()
    too_long = [*arguments, "--seq-length", "100000"]
    assert all("are needed" in said for said in pool(2).run(text_of_this_rank, too_long, False))
    failed = pool(2).run(text_of_this_rank, arguments, True)
    assert failed == ["refused:   - ZeroDivisionError: division by zero"] * 2


# ------------------------------------------------------------------------------------------------- settings and configs


def test_the_command_line_prevails_over_the_file() -> None:
    chosen = settings.read(["--optimizer", "lion", "--lr", "0.5", "--micro-batch", "3", "--zero-stage", "1"])
    assert chosen.optimizer_name == "ds_optim.Lion"
    assert chosen.deepspeed["optimizer"]["params"]["lr"] == 0.5
    assert (chosen.micro_batch, chosen.accumulation, chosen.zero_stage) == (3, 1, 1)
    mixed = settings.read(["--deepspeed", str(CONFIGS / "adam_mini_zero3.json"), "--optimizer", "adan"])
    assert (mixed.optimizer_name, mixed.zero_stage) == ("Adan", 3)
    assert settings.read([]).optimizer_name == "AdamMini"
    tokens = settings.read(["--tokens", "1e5", "--micro-batch", "4", "--seq-length", "50"], world_size=2)
    assert tokens.steps == 250


def test_every_wrong_setting_is_listed_in_one_error(tmp_path: Path) -> None:
    config, model = tmp_path / "ds.json", tmp_path / "model.json"
    config.write_text(json.dumps({"optimizer": {"params": {"lr": "auto"}}}))
    model.write_text(json.dumps({"max_position_embeddings": 64}))
    arguments = f"--deepspeed {config} --model {model} --seq-length 128 --steps 0 --warmup 1.5 --save-every 3".split()
    arguments += f"--log-every 0 --keep 0 --checkpoint-form deepspeed --resume {tmp_path / 'nowhere'}".split()
    with pytest.raises(settings.SettingsError) as error:
        settings.read(arguments)
    wanted = (
        "names no optimizer",
        'no "train_micro_batch_size_per_gpu"',
        'optimizer.params.lr to "auto"',
        'no "model_type"',
        "--seq-length is 128",
        "no step at all",
        "--warmup is 1.5",
        "--save-every needs --save",
        "--keep needs --save",
        "--keep is 0; it must be 1 or more",
        "--keep removes canonical checkpoints only",
        "--log-every is 0",
        "nowhere: no such directory",
    )
    assert [text for text in wanted if text not in str(error.value)] == []
    assert str(error.value).count("\n  - ") + 1 == len(wanted)
    with pytest.raises(settings.SettingsError, match=r"--autoresume needs --save DIR"):
        settings.read(["--autoresume"])
    with pytest.raises(settings.SettingsError, match=r"--fallback needs --resume DIR or --autoresume"):
        settings.read(["--fallback"])


def test_a_config_that_is_no_json_is_named_with_the_place(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"optimizer": }')
    with pytest.raises(settings.SettingsError, match=r"broken\.json is not JSON.*line 1 column 15"):
        settings.read(["--deepspeed", str(broken)])
    with pytest.raises(settings.SettingsError, match=r"absent\.json: No such file"):
        settings.read(["--deepspeed", str(tmp_path / "absent.json")])


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.json")))
def test_a_deepspeed_config_is_what_its_name_says(name: str) -> None:
    import deepspeed  # noqa: F401  (its import registers the names)
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads((CONFIGS / f"{name}.json").read_text())
    if name.startswith("hf_trainer"):
        assert {"lr", "betas", "eps", "weight_decay"} == set(content["optimizer"]["params"])
        assert set(content["optimizer"]["params"].values()) == {"auto"}
        content = json.loads(json.dumps(content).replace('"auto"', "1"))
        content["bf16"]["enabled"] = True
        content["optimizer"]["params"]["betas"] = [0.9, 0.999]
    parsed = DeepSpeedConfig(content)
    assert parsed.gradient_clipping == 1.0
    assert parsed.bfloat16_config.enabled
    if "zero" in name:
        assert parsed.zero_optimization_stage == int(name.partition("zero")[2][0])
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == name.endswith("offload")

    cls = getattr(torch.optim, content["optimizer"]["type"])
    assert cls.__module__.startswith("ds_optim.")
    wanted = name.split("_zero")[0].replace("_", "") if "zero" in name else "adammini"
    assert cls.__name__.lower() == wanted
    assert set(content["optimizer"]["params"]) <= set(inspect.signature(cls).parameters)
    cls([nn.Parameter(torch.zeros(4))], **content["optimizer"]["params"])  # refuses values out of range


def test_every_optimizer_of_the_command_line_has_its_config() -> None:
    assert all((CONFIGS / f"{name}_zero2.json").exists() for name in settings.OPTIMIZERS)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "models").glob("*.json")))
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    import transformers

    content = json.loads((CONFIGS / "models" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content))
    assert type(model).__name__ == content["architectures"][0]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_configs_are_explained_key_by_key() -> None:
    explained = (ROOT / "docs" / "configs.md").read_text()

    def keys(content: Any) -> set[str]:
        return set(content) | {k for v in content.values() if isinstance(v, dict) for k in keys(v)}

    for path in CONFIGS.glob("*.json"):
        assert path.name in explained
        assert [k for k in keys(json.loads(path.read_text())) if f"`{k}`" not in explained] == []
    assert [name for name in PARAMETERS if f"`models/{name}.json`" not in explained] == []


def test_the_training_job_does_not_name_the_package() -> None:
    """Reports, the noise scale, canonical checkpoints, builds and the preflight do, and import it when asked for."""
    named = {path.name: path.read_text() for path in LAUNCHER.glob("*.py") if "ds_optim" in path.read_text()}
    naming = ["builds.py", "checkpoints.py", "host_report.py", "memory_report.py", "noise_watch.py", "preflight.py"]
    assert sorted(named) == naming
    assert not [text for text in named.values() if re.search(r"^(import|from) ds_optim", text, re.MULTILINE)]


# ------------------------------------------------------------------------------------------------------ log and memory


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    import train

    shares = [train.learning_rate_share(step, 100, 10) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0
    assert shares[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(shares[10:]))
    assert train.learning_rate_share(0, 1, 0) == 1.0


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(0.05)
        return super().step(closure)


def test_the_clock_sums_the_optimizers_calls_and_nothing_else() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(3))])  # from now on hooks are called in SGD's own step too
    optimizer = SlowSGD([nn.Parameter(torch.zeros(3))])
    clock = OptimizerClock(optimizer, lambda: None)
    optimizer.step()
    time.sleep(0.2)
    optimizer.step()
    assert 0.1 <= clock.take() < 0.19
    assert clock.take() == 0.0


def test_measured_bytes_count_every_storage_once() -> None:
    weight = nn.Parameter(torch.zeros(10, 10))
    optimizer = torch.optim.AdamW([weight])
    meter = StateMeter(nn.ParameterList([weight]), optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    meter.step_done()
    state = optimizer.state[weight]
    state["alias"] = state["exp_avg"].view(-1)[5:]
    states = meter.read()
    assert states == ModelStates(weights=400, master=0, gradients=400, state=804, elements=100)  # 4 bytes of "step"
    assert states.adamw_state == 800


def test_the_table_states_bytes_and_both_denominators() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table("Lion", [ModelStates(2_000_000, 2_000_000, 2_000_000, 2_000_000, 500_000)]))
    text = console.export_text()
    for wanted in ("2,000,000 B", "2.00 MB (1.91 MiB)", "4,000,000 B", "50.00 %", "8,000,000 B", "80.00 %"):
        assert wanted in text


def test_the_log_has_every_step_and_a_line_per_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 0, 6, 3, tmp_path) as progress:
        for step in range(1, 7):
            progress.step(step, 7.0 - step, 1e-3, 0.5, 1000, 2.0, 0.1 * step)
        progress.held_out(6, 1.25)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 6]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "6/6", "6/6"]
    assert lines[2] == (
        "step 6/6  loss 2.0000  lr 1.00e-03  grad norm 0.500  500 tokens/s  optimizer 25.00 % of the step"
    )


# -------------------------------------------------------------------------------------------------------- the real run


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    port = local_cluster.free_port()
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, LAUNCHER / "train.py"]
    return subprocess.run(
        [forked.python(), *map(str, (*command, *arguments))], capture_output=True, text=True, timeout=600
    )


def train_in_pool(arguments: list[str]) -> None:
    import train

    train.run(settings.read(arguments, world_size=int(os.environ["WORLD_SIZE"])))


@pytest.fixture
def short(texts: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run of six steps of a tiny Llama, eight sequences each on two ranks."""
    model = tmp_path / "model.json"
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    small = json.loads((CONFIGS / "models" / "llama_small.json").read_text())
    model.write_text(json.dumps({**small, **shape, "num_attention_heads": 4, "num_key_value_heads": 2}))
    text = ["--model", model, "--text", texts, "--cache", tmp_path / "cache", "--seq-length", 32]
    return [*map(str, text), "--steps", "6", "--micro-batch", "4", "--eval-sequences", "8", "--log-every", "1"]


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}


def from_step(step: int, values: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    return {number: value for number, value in values.items() if number > step}


def test_two_ranks_train_under_the_deepspeed_launcher_and_resume(pool: Any, short: list[str], tmp_path: Path) -> None:
    saving = ["--save", str(tmp_path / "saved"), "--save-every", "3"]
    launched = launch(*short, *saving, "--output", tmp_path / "whole")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "AdamMini (ds_optim.optimizers.adam_mini), ZeRO-2, 2 ranks" in launched.stdout
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert 0 < summary["optimizer_share"] < 1
    assert len(summary["bytes_per_rank"]) == 2
    assert all(0.5 < r["state"] / r["adamw_state"] < 0.56 for r in summary["bytes_per_rank"])
    whole = losses(tmp_path / "whole")
    assert all(math.isfinite(value) for pair in whole.values() for value in pair)

    there = ["--resume", str(tmp_path / "saved" / "global_step3")]
    pool(2).run(train_in_pool, [*short, *there, "--output", str(tmp_path / "same")])
    assert losses(tmp_path / "same") == from_step(3, whole)

    # Four ranks under ZeRO-3 see the same sequences; their gradients are added up in another order, in bf16.
    elsewhere = [*short, *there, "--micro-batch", "2", "--zero-stage", "3", "--output", str(tmp_path / "four")]
    pool(4).run(train_in_pool, elsewhere)
    for step, pair in from_step(3, whole).items():
        assert losses(tmp_path / "four")[step] == pytest.approx(pair, rel=1e-2)


def test_a_run_goes_on_in_the_text_with_another_batch() -> None:
    import checkpoints
    import train

    windows = corpus.Windows(np.arange(4000, dtype=np.uint16), 10, seed=0)
    chosen: Any = SimpleNamespace(micro_batch=4, accumulation=1, seq_length=10)
    two = train.Batches(windows, chosen, 0, 2, "cpu")
    assert (two.taken(3), train.Batches(windows, chosen, 0, 3, "cpu", checkpoints.Start(3, 24)).taken(4)) == (24, 36)
    before = [train.Batches(windows, chosen, rank, 2, "cpu").of_step(step) for step in range(3) for rank in range(2)]
    start = checkpoints.Start(3, two.taken(3))
    after = [
        train.Batches(windows, chosen, rank, 3, "cpu", start).of_step(step) for step in (3, 4) for rank in range(3)
    ]
    seen = [ids for part in (*before, *after) for ids in part]
    assert sorted(torch.cat(seen)[:, 0].tolist()) == sorted(windows.sequences(0, 24 + 24)[:, 0].tolist())


def test_one_command_starts_and_restarts_a_run(pool: Any, short: list[str], tmp_path: Path) -> None:
    saved, cut, logs = tmp_path / "saved", tmp_path / "cut", tmp_path / "logs"

    def run(directory: Path, output: str, *more: str) -> None:
        arguments = [*short, "--save", str(directory), "--autoresume", "--output", str(logs / output), *more]
        pool(2).run(train_in_pool, arguments)

    def tags(directory: Path) -> list[str]:
        return sorted(path.name for path in directory.iterdir())

    run(saved, "whole", "--save-every", "1", "--keep", "3")
    assert sorted(losses(logs / "whole")) == [1, 2, 3, 4, 5, 6]
    assert tags(saved) == ["global_step4", "global_step5", "global_step6", "latest"]

    # A run that was cut after its fifth step, its last checkpoint damaged.
    shutil.copytree(saved, cut, ignore=shutil.ignore_patterns("global_step6"))
    (cut / "latest").write_text("global_step5")
    (cut / "global_step5" / "about.json").write_text("")
    for said in pool(2).run(refusal_in_pool, [*short, "--save", str(cut), "--autoresume"]):
        assert "about.json has 0 bytes" in said
        assert "fallback" in said
    run(cut, "rest", "--fallback", "--keep", "1")
    assert losses(logs / "rest") == from_step(4, losses(logs / "whole"))
    assert tags(cut) == ["global_step5", "global_step6", "latest"]  # what is not whole is not for us to remove
    run(cut, "done")
    assert not (logs / "done").exists()

    # The first save of all was killed before `latest` was written.
    shutil.rmtree(cut)
    shutil.copytree(saved, cut, ignore=shutil.ignore_patterns("global_step5", "global_step6", "latest"))
    run(cut, "first")
    assert losses(logs / "first") == from_step(4, losses(logs / "whole"))


def test_a_resumed_run_keeps_its_plan(pool: Any, short: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text.txt").write_text(prose(1, 20000))
    pool(2).run(train_in_pool, [*short, "--save", str(saved), "--save-every", "3"])
    other = ["--steps", "7", "--seed", "3", "--seq-length", "16", "--text", str(tmp_path / "other")]
    for said in pool(2).run(refusal_in_pool, [*short, *other, "--resume", str(saved)]):
        assert "that run had --steps 6 and this one has 7; give --steps 6" in said
        assert "give --seed 0" in said
        assert "give --seq-length 32" in said
        assert "that run read another text" in said
    for said in pool(2).run(refusal_in_pool, [*short, "--resume", str(saved)]):
        assert "all of its 6 steps are done" in said
    for said in pool(2).run(refusal_in_pool, [*short, "--optimizer", "lion", "--resume", str(saved)]):
        assert "it is of AdamMini, not of Lion" in said
    for said in pool(2).run(refusal_in_pool, [*short, "--resume", str(tmp_path / "other")]):
        assert "there is no checkpoint" in said


def test_deepspeeds_own_form_serves_any_optimizer(pool: Any, short: list[str], tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "adam_mini_zero2.json").read_text())
    config |= {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}, "zero_allow_untested_optimizer": True}
    (tmp_path / "adagrad.json").write_text(json.dumps(config))
    common = [*short, "--deepspeed", str(tmp_path / "adagrad.json"), "--save", str(tmp_path / "saved")]
    for said in pool(2).run(refusal_in_pool, common):
        assert "--save: Adagrad is not an optimizer of ds_optim" in said
        assert "--checkpoint-form deepspeed" in said
    common += ["--checkpoint-form", "deepspeed", "--save-every", "4"]
    pool(2).run(train_in_pool, [*common, "--output", str(tmp_path / "whole")])
    (tmp_path / "saved" / "latest").write_text("global_step4")
    pool(2).run(train_in_pool, [*common, "--autoresume", "--output", str(tmp_path / "rest")])
    assert losses(tmp_path / "rest") == from_step(4, losses(tmp_path / "whole"))


def test_a_wrong_config_gives_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import train

    config = json.loads((CONFIGS / "adam_mini_zero2.json").read_text())
    config["optimizer"]["type"] = "AdamMinni"
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    assert train.main(["--deepspeed", str(tmp_path / "wrong.json")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "'AdamMinni' is known neither to DeepSpeed nor to torch.optim" in said[1]


def refusal_in_pool(arguments: list[str]) -> str:
    import train

    with pytest.raises(settings.SettingsError) as error:
        train.run(settings.read(arguments, world_size=2))
    return str(error.value)


def test_an_optimizers_own_refusal_is_passed_on(pool: Any, texts: Path, tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "adam_mini_zero2.json").read_text())
    config["optimizer"]["params"] |= {"betas": [0.9, 1.5], "momentum": 0.9}
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    arguments = ["--deepspeed", tmp_path / "wrong.json", "--text", texts, "--cache", tmp_path, "--seq-length", "16"]
    for said in pool(2).run(refusal_in_pool, list(map(str, arguments))):
        assert "momentum" in said
        assert "1.5" in said
