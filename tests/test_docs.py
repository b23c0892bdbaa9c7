"""Every code block in README, CONTRIBUTING and docs runs, links lead somewhere, JSON and defaults are what they say."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ds_optim
import forked
from ds_optim import cli
from ds_optim.memory import estimate_command
from ds_optim.optimizers.registry import optimizers
from pool import ALONE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands whose full length belongs elsewhere: what is run in their place, and why that is enough.
INSTEAD = {
    # Its whole length is what the README reports.
    "bash launcher/quickstart.sh": "bash launcher/quickstart.sh --steps 3 --eval-sequences 8",
    # tests/test_claims.py runs it whole.
    "ds-optim claims": "ds-optim claims --help",
    # tests/test_multinode.py does the same on hosts of a local cluster.
    "bash launcher/multinode.sh --hostfile hosts --preflight-only launcher/train.py --optimizer adan "
    "--save runs/adan": "bash launcher/multinode.sh --help",
    "bash launcher/multinode.sh --hostfile hosts launcher/train.py --optimizer adan --save runs/adan --save-every 200 "
    "--autoresume": "bash launcher/multinode.sh --help",
    "python launcher/local_cluster.py up --hosts 2 -- bash launcher/multinode.sh --interface eth0 launcher/train.py "
    "--steps 20": "python launcher/local_cluster.py up --hosts 2 -- bash launcher/multinode.sh --interface eth0 "
    "--preflight-only launcher/train.py --steps 20",
    "python launcher/local_cluster.py loopback --hosts 2 -- launcher/train.py "
    "--steps 20": "python launcher/local_cluster.py loopback --help",
    # tests/test_batch_size.py runs it for a tiny model.
    "ds-optim batch-size measure --checkpoint runs/base/global_step500 --batches 8,16,32,64,128 --tokens 4e5 "
    "--output runs/critical -- deepspeed --num_gpus 2 launcher/train.py --optimizer lion "
    "--micro-batch 8": "ds-optim batch-size measure --help",
    # tests/test_batch_size.py runs it for a small device; finding what fits takes a minute.
    "ds-optim batch-size advise --batch 64 --noise-scale 213 --ranks 2 --micro-batch 4 --seq-length 128 "
    "--model configs/models/llama_60m.json --deepspeed configs/adamw_zero2.json "
    "--device-memory 8GB": "ds-optim batch-size advise --help",
    # Half a minute for a larger model.
    "python benchmarks/scaling.py --only planned --planned-model llama2_7b --planned-ranks 8 64 --matrix-tflops 400 "
    "--tokens 4096": "python benchmarks/scaling.py --only planned --planned-model llama_60m --planned-ranks 8 "
    "--matrix-tflops 400 --tokens 4096",
    # It is what runs this, and these tests.
    "bash tests/run.sh": "bash tests/run.sh --collect-only -q tests/test_docs.py",
    "bash tests/run.sh tests/test_boxes.py tests/test_schedule.py": "bash tests/run.sh --help",
    "bash tests/run.sh tests/test_vectors.py -k adam_mini --seed 17": "bash tests/run.sh --help",
    "bash tests/run.sh -n 0 tests/test_layout.py": "bash tests/run.sh --help",
    # A minute; a check of its own in .ci/run.
    "mypy --strict": "mypy --help",
    # Minutes each; tests/test_invariance.py runs a part of the matrix, tests/test_digests.py what compares.
    "python benchmarks/full_matrix.py --digests before.json": "python benchmarks/full_matrix.py --help",
    "python benchmarks/full_matrix.py --digests after.json "
    "--compare before.json": "python benchmarks/full_matrix.py --help",
}

# Commands that other tests run, on the pool's ranks or on a tiny model; here only that these tests exist.
ELSEWHERE = {
    # In environments of their own, by benchmarks/tools.py.
    **dict.fromkeys(
        (
            "deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/trl_train.py sft "
            "--deepspeed examples/tools/zero2.json --output runs/trl",
            "python examples/tools/llamafactory_data.py",
            "deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/llamafactory_train.py "
            "examples/tools/llamafactory_sft.yaml",
            "deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/axolotl_train.py examples/tools/axolotl_sft.yaml",
            "torchrun --nproc_per_node 2 examples/tools/lightning_train.py examples/tools/lightning.json runs/lit",
            "torchrun --nproc_per_node 1 examples/tools/lightning_train.py examples/tools/lightning.json runs/lit "
            "--resume",
            "torchrun --nproc_per_node 2 examples/tools/torchtitan_train.py",
        ),
        "test_tools.test_every_command_was_run_and_passed",
    ),
    # Another port, other sizes: the same measurement.
    "deepspeed --num_gpus 2 --master_port 29611 benchmarks/scaling.py --measure --stage 3 "
    "--optimizer AdamMini": "test_scaling.test_real_engines_send_multiply_and_keep_what_was_predicted",
    "torchrun --nproc_per_node 2 examples/add_an_optimizer.py --save runs/added": "test_registry."
    "test_optimizers_from_outside_do_all_that_ours_do",
    "torchrun --nproc_per_node 1 examples/add_an_optimizer.py --resume runs/added": "test_registry."
    "test_optimizers_from_outside_do_all_that_ours_do",
    # Here it might find the machine slow, beside other tests.
    "ds-optim selftest": "test_selftest.test_the_command_with_two_ranks_prints_one_table_and_writes_what_both_found",
    "torchrun --no-python --nproc-per-node 2 ds-optim selftest": "test_selftest."
    "test_the_command_with_two_ranks_prints_one_table_and_writes_what_both_found",
    "deepspeed --num_gpus 2 examples/on_cpu.py examples/trainer_deepspeed.py "
    "--deepspeed examples/adan_auto.json": "test_integrations."
    "test_the_trainer_takes_adan_and_its_three_betas_from_the_json",
    "torchrun --nproc_per_node 2 examples/on_cpu.py examples/trainer_torch.py --fsdp": "test_integrations."
    "test_the_trainer_on_one_device_under_ddp_and_fsdp2_trains_the_same_model",
    "python examples/lora.py Shampoo": "test_integrations.test_lora",
    "accelerate launch --num_processes 2 examples/on_cpu.py examples/accelerate_fsdp2.py": "test_integrations."
    "test_accelerate_with_fsdp2_a_compiled_model_and_torchs_schedule",
    "deepspeed --num_gpus 2 launcher/train.py --optimizer adan --noise-scale --output runs/mine": "test_noise_scale."
    "test_the_launcher_and_the_monitors_show_it",
    "deepspeed --num_gpus 2 launcher/train.py --optimizer lion --tokens 4e6 --save runs/base "
    "--save-every 500": "test_batch_size.test_branches_of_the_real_training_job",
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


BLOCKS = blocks()


def commands(block: Block) -> list[str]:
    """Of a bash block: one per line that is no comment, continuation lines joined, single spaces."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return list(filter(None, (" ".join(line.split("#")[0].split()) for line in lines)))


@functools.cache  # several pages show a command, and several commands have one that is run in their place
def run(command: str, folder: Path) -> None:
    """Run a line; a script on its own, as the only rank there is."""
    words = command.split()
    is_script = len(words) == 2 and words[0] == "python"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=forked.environment(**(ALONE if is_script else {})),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_there_are_blocks_and_all_have_a_language() -> None:
    assert {"bash", "json", "python"} <= {block.language for block in BLOCKS}
    assert not [str(block) for block in BLOCKS if block.language not in ("bash", "json", "python")]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_a_python_block_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    run(f"python {shlex.quote(str(script))}", tmp_path)


IN_BASH = [
    pytest.param(block, marks=[pytest.mark.long] if "quickstart" in block.text else [])
    for block in BLOCKS
    if block.language == "bash"
]


@pytest.mark.parametrize("block", IN_BASH, ids=str)
def test_a_bash_block_runs(block: Block) -> None:
    for command in commands(block):
        if command in ELSEWHERE:
            module, _, name = ELSEWHERE[command].partition(".")
            assert f"\ndef {name}(" in (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        else:
            run(INSTEAD.get(command, command), ROOT)


def test_no_command_is_replaced_that_no_page_has() -> None:
    shown = {command for block in BLOCKS if block.language == "bash" for command in commands(block)}
    assert INSTEAD.keys() | ELSEWHERE.keys() <= shown


def examples_of_the_help() -> list[str]:
    told = f"{cli.EXAMPLES}{estimate_command.EXAMPLES}"
    return [line.strip() for line in told.splitlines() if line.strip().startswith("ds-optim ")]


@pytest.mark.parametrize("line", examples_of_the_help())
def test_the_helps_examples_have_known_commands_and_options(line: str) -> None:
    _, *words = shlex.split(line)
    wanted = [str(ROOT / "configs" / "models" / "llama_60m.json") if word == "config.json" else word for word in words]
    given = [str(ROOT / "configs" / "swan_zero2.json") if word == "ds.json" else word for word in wanted]
    assert CliRunner().invoke(cli.app, [*given, "--help"]).exit_code == 0
    assert CliRunner().invoke(cli.app, [*given, "--unknown", "--help"]).exit_code != 0


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=str)
def test_a_json_block_names_an_optimizer_with_options_it_has(block: Block) -> None:
    from ds_optim.deepspeed.configuration import DsOptimObject
    from ds_optim.deepspeed.names import names

    text = block.text if block.text.lstrip().startswith("{") else f"{{{block.text}}}"
    config = json.loads(text)
    if "optimizer" in config:
        cls = names()[config["optimizer"]["type"]]
        given = {**config["optimizer"].get("params", {}), **DsOptimObject.of(config).options}
        numbers = {key: value for key, value in given.items() if value != "auto"}
        assert cls.setting_problems(numbers) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    """But rows of tables."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.lstrip().startswith("|")] == []


def test_what_benchmarks_write_is_wrapped(tmp_path: Path) -> None:
    words = "word " * 29 + "word"
    kept = f"| {words} |\n\n```bash\n{words}\n\n- {words}\n```\n"
    text = f"# {words}\n\n{words} and\nmore.\n\n- one\n- {words}\n  more\n\n{kept}"
    pages.write(tmp_path / "new" / "page.md", text)
    written = (tmp_path / "new" / "page.md").read_text(encoding="utf-8")
    assert written.endswith(kept)
    assert written.split() == text.split()
    assert [line[:3] for line in written.removesuffix(kept).splitlines() if len(line) > 120] == ["# w"]
    assert "word and more.\n\n- one\n- word" in written
    assert re.search(r"word\n  word[a-z ]* more\n", written)


def test_the_readme_is_for_a_reader_in_a_hurry() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", optimizers())
def test_an_optimizers_page_has_every_option_with_its_default(name: str) -> None:
    cls = getattr(ds_optim, name)
    page = ROOT / "docs" / "optimizers" / f"{cls.__module__.rpartition('.')[2]}.md"
    assert {block.language for block in BLOCKS if block.page == page} >= {"json", "python"}
    text = page.read_text(encoding="utf-8")
    options = text[text.index("## Options") : text.index("## State and cost")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", options, re.MULTILINE))
    stated = {key: torch.float32 if value == "fp32" else ast.literal_eval(value) for key, value in rows.items()}
    assert stated == {key: one.default for key, one in inspect.signature(cls).parameters.items() if key != "params"}
