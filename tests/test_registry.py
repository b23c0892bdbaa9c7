"""The registry is the one list, and what is on it leaves nothing unsaid."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
import forked
from ds_optim.deepspeed.names import json_names
from ds_optim.optimizers import registry
from ds_optim.optimizers.registry import optimizers, unstated
from ds_optim.rule import Blockwise, PackedSymmetric, WholeMatrix, bytes_of, flag
from ds_optim.stepping.sharded import ShardedOptimizer
from test_invariance import OPTIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("cls", optimizers().values(), ids=optimizers())
def test_a_registered_optimizer_states_everything(cls: type[ShardedOptimizer]) -> None:
    assert unstated(cls) == []
    assert getattr(ds_optim, cls.__name__) is cls
    assert cls.__name__ in dir(ds_optim)
    for field in dataclasses.fields(cls.rule):  # so that leaving one out cannot pass unseen
        assert field.default is field.default_factory is dataclasses.MISSING, field.name


def test_a_rule_that_leaves_something_unsaid_cannot_be_made() -> None:
    for name, cls in optimizers().items():
        stated = {field.name: getattr(cls.rule, field.name) for field in dataclasses.fields(cls.rule)}
        for left_out in stated:
            with pytest.raises(TypeError, match=f"'{left_out}'"):
                type(cls.rule)(**{key: value for key, value in stated.items() if key != left_out})
        assert type(cls.rule)(**stated) == cls.rule, name


def class_of(base: type[ShardedOptimizer], **changed: Any) -> type[ShardedOptimizer]:
    """A class like another one, with something of it changed."""
    return type("Another", (base,), {"__doc__": "Another one.", "__module__": __name__, **changed})


def takes_no_seed(self: Any, params: Any, lr: float, betas: Any, weight_decay: float, *, roles: Any) -> None: ...


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (class_of(ds_optim.AdamW, rule=None), "it has no `rule`"),
        (class_of(ds_optim.Adan, rule=dataclasses.replace(ds_optim.Adan.rule, checks={})), "no check for 'no_prox'"),
        (
            class_of(ds_optim.Lion, rule=dataclasses.replace(ds_optim.Lion.rule, checks={"nesterov": flag()})),
            "checks 'nesterov', which its constructor does not take",
        ),
        (class_of(ds_optim.SWAN, rule=dataclasses.replace(ds_optim.SWAN.rule, structure=("size",))), "names 'size'"),
        (class_of(ds_optim.Lion, __init__=takes_no_seed), "its constructor takes no 'seed'"),
        (class_of(ds_optim.Lion, __doc__=None), "no docstring"),
        (class_of(ds_optim.Lion, rule=dataclasses.replace(ds_optim.Lion.rule, element_state=())), "`element_state`"),
        (type("Lion", (ds_optim.Lion,), {"__doc__": "Another one."}), "has an optimizer of that name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_leaves_something_unsaid_is_not_registered(cls: type[ShardedOptimizer], said: str) -> None:
    before = optimizers()
    with pytest.raises(TypeError, match=f"(?s)cannot be registered:\n- .*{re.escape(said)}"):
        registry.register(cls)
    assert optimizers() == before


def test_a_registered_class_is_heard_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", optimizers())
    monkeypatch.setattr(registry, "_listeners", [])
    heard: list[int] = []
    registry.when_registered(lambda: heard.append(len(optimizers())))
    another = class_of(ds_optim.Lion)
    assert registry.register(another) is another
    assert heard == [9, 10]
    assert list(optimizers())[-1] == "Another"


@pytest.mark.parametrize("cls", optimizers().values(), ids=optimizers())
def test_the_stated_memory_is_what_is_kept(cls: type[ShardedOptimizer]) -> None:
    """The number that the documentation gives first; counts and the identity of blocks (16 bytes each) apart."""
    weight = nn.Parameter(torch.empty(1024, 1024))
    made = cls([("matrix", weight)], roles={"matrix": "linear"})
    spec = {key: one for key, one in made.stepper.spec(weight).items() if key != "blocks"}
    kept = bytes_of(spec) / weight.numel()
    stated = float(re.findall(r"\d+", cls.rule.memory)[0])
    if isinstance(cls.rule, Blockwise) or "per neuron" in cls.rule.memory:
        assert 0 < kept - stated <= 4 / 1024  # and a value per row
    else:
        per_block = cls.rule.state_of_block if isinstance(cls.rule, WholeMatrix) else lambda *_: {}
        listed = per_block({**made.defaults, "state_dtype": torch.float32}, (1024, 1024)).values()
        diagonals = sum(2 / 1024 for one in listed if isinstance(one, PackedSymmetric))  # half of each is its mirror
        assert math.isclose(kept - diagonals, stated, abs_tol=1e-4)


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_optimizers", ROOT / "docs" / "make_optimizers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_optimizer_has_a_page_a_config_and_a_line_in_every_table() -> None:
    page = (ROOT / "docs" / "optimizers" / "README.md").read_text(encoding="utf-8")
    assert maker().written() == page, "run: python docs/make_optimizers.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## Which one") :]
    files = {cls.__module__.rpartition(".")[2]: name for name, cls in optimizers().items()}
    configs = {path.name.removesuffix("_zero2.json"): path for path in (ROOT / "configs").glob("*_zero2.json")}
    assert configs.keys() == files.keys()
    for file, path in configs.items():
        named = json.loads(path.read_text(encoding="utf-8"))["optimizer"]["type"]
        assert named.rpartition(".")[2] == files[file]
        assert f"| `{named}` |" in table


def test_every_optimizer_is_held_to_an_oracle_on_every_strategy() -> None:
    assert set(OPTIONS) == set(json_names())


def test_matrix_rules_alone_have_a_plan() -> None:
    for cls in optimizers().values():
        made = cls([("matrix", nn.Parameter(torch.ones(4, 4)))], roles={"matrix": "linear"})
        assert hasattr(made, "plan") == isinstance(cls.rule, WholeMatrix)


@pytest.mark.parametrize("cls", [ds_optim.AdamW, ds_optim.AdamMini])
def test_a_rule_without_a_kernel_steps_as_written_and_says_so_before_anything_counts(
    cls: type[ShardedOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same formula by a name that no kernel has: what the eager backend computes, and one warning."""
    unknown = f"unheard_of_{cls.__name__}"
    renamed = class_of(cls, rule=dataclasses.replace(cls.rule, name=unknown))
    results, told = [], list[str]()
    for made in (renamed, cls):
        if made is cls:
            monkeypatch.setenv("DS_OPTIM_KERNELS", "eager")
        weight = nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12))
        optimizer = made([("matrix", weight)], roles={"matrix": "linear"}, lr=1e-2)

        def say(message: Any, *_: Any, optimizer: Any = optimizer, weight: Any = weight, **__: Any) -> None:
            told.append(str(message))
            assert not optimizer.state.get(weight)  # no step was counted, no state was made

        with monkeypatch.context() as context:
            context.setattr("warnings.warn", say)
            for step in range(3):
                weight.grad = torch.linspace(0, step + 1.0, 96).view(8, 12).sin()
                optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
    assert len(told) == 1
    assert unknown in told[0]


# -- optimizers from outside the package ------------------------------------------------------------------------------


def launched(ranks: int, *arguments: str) -> dict[str, Any]:
    command = [forked.python(), "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    script = str(ROOT / "examples" / "add_an_optimizer.py")
    done = subprocess.run([*command, script, *arguments], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("there is no C++ kernel for the elementwise formula 'signum'") == ranks  # once each
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def test_optimizers_from_outside_do_all_that_ours_do(tmp_path: Path) -> None:
    """As docs/add_an_optimizer.md says: ZeRO-2 and FSDP2, from AdamW, on other ranks, estimated."""
    two = launched(2, "--save", str(tmp_path))
    one = launched(1, "--resume", str(tmp_path))
    assert two == one  # the losses too: both train on the same sequences
    assert all(f"{name}_{strategy}" in two for name in ("Signum", "Spectral") for strategy in ("zero_2", "fsdp2"))
    bytes_of_state = [two[f"{name}, bytes of state over 8 ranks"] for name in ("Signum", "Spectral")]
    assert 34_900 * 4 < bytes_of_state[0] < bytes_of_state[1] < 34_900 * 8  # the model's parameters


def test_the_page_shows_the_example() -> None:
    page = (ROOT / "docs" / "add_an_optimizer.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "my_optimizers.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in page
