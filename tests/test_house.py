"""The house: what lies where in ds_optim, who may know whom, how large a thing may get. Read from the source alone.

Every rule is a small function from sources, {module: text}, to the list of what breaks it. The first test holds the
real sources to all of them; the second shows each of them failing on a small invented violation.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

# The floors, from the ground up. A module may import what stands on lower floors and, unless it is one of `ALONE`, its
# neighbours on the same floor; imports in functions, for types alone and in tables of lazy names count like all others.
FLOORS: list[dict[str, str]] = [
    {"releases": "which releases of torch, deepspeed, transformers and accelerate work, and which were tested"},
    {
        "known_torch": "what differs between releases of torch",
        "triton_probe": "whether Triton compiles for the accelerator here",
        "known_transformers": "what differs between releases of transformers",
    },
    {
        "kernels": "fused updates: native (C++), triton (accelerators), eager (oracle and fallback)",
        "linalg": "stacked Newton-Schulz, stacked inverse roots, aligned products, jobs for single threads",
        "listing": "long lists in messages",
        "instance_methods": "methods replaced on one object",
        "latest": "the file that names the newest checkpoint",
        "json_file": "JSON files that are whole or not there",
        "extension_builds": "where operators are built, and locks that killed builds left behind",
        "trainer_callback": "transformers' callback, or a stand-in without transformers",
    },
    {"sharding": "layout, plan, schedule, assignment, boxes (pure arithmetic); exchange; dtensor (reads DTensors)"},
    {
        "stack": "equal blocks of a whole-matrix rule, and what it does with them on any device",
        "errors": "what every rank raises together",
        "roles": "what a parameter is: query, value, mlp, embedding, head, norm, bias, expert stack, conv",
    },
    {"rule": "what an optimizer is: elementwise, blockwise or whole-matrix; data and protocols"},
    {"stepping": "where a rule meets a layout: the torch.optim surface, in-place and owned steps, state that moves"},
    {"optimizers": "one file per algorithm; registry.py is the one list of them"},
    {"__init__": "the names that users import, each loaded when it is used"},
    {"deepspeed": "all that knows DeepSpeed's classes, attributes and versions"},
    {
        "ranks": "what a number of ranks means for a strategy",
        "blueprint": "models from a config, without memory",
    },
    {
        "checkpoint": "the canonical form, by parameter name; conversion; warm start",
        "memory": "record -> accountant (measured) or estimate (predicted) -> claims -> report",
        "batch_size": "gradient noise scale, critical batch size",
    },
    {
        "selftest": "what a machine does with our updates, and how fast",
        "plugin": "what follows from `import deepspeed`: names in a JSON, engines that load and save on any terms",
    },
    {"cli": "ds-optim estimate, claims, report, checkpoint, batch-size, doctor, selftest"},
]
ALONE = {"kernels", "linalg"}  # import nothing of ours but themselves and what is known of torch
KNOWS_DEEPSPEED = {"deepspeed"}  # alone imports deepspeed
KNOW_RELEASES = {"ds_optim.releases", "ds_optim.known_torch", "ds_optim.known_transformers"} | {
    "ds_optim.deepspeed.differences"
}
ENTRIES = {"ds_optim.cli", "launcher"}  # imported by nobody
LINES, FUNCTION_LINES, METHODS = 400, 60, 25  # at most

LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ROOT = Path(__file__).parents[1]
Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]


# -- reading ----------------------------------------------------------------------------------------------------------


def sources_of(*patterns: str) -> dict[str, str]:
    """All modules of the repository whose files match, by dotted name."""
    found = {}
    for file in sorted(file for pattern in patterns for file in ROOT.glob(pattern)):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found[module.removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    return found


@functools.cache
def parsed(text: str) -> ast.Module:
    """The tree of a source, parsed once for all rules."""
    return ast.parse(text)


@functools.cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """Every node of a source, in no order that matters."""
    return tuple(ast.walk(parsed(text)))


def ours(sources: Sources) -> dict[str, str]:
    """The modules of ds_optim alone."""
    return {module: text for module, text in sources.items() if module.split(".")[0] == "ds_optim"}


def room(module: str) -> str:
    """The file or folder of ds_optim in which a module lies; of the package itself, ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


@dataclass(frozen=True)
class Import:
    """Of a whole module, or of ``name`` from it; ``alias`` is what it is called from then on."""

    line: int
    module: str
    name: str = ""
    alias: str = ""


def imports(text: str, sources: Sources) -> Iterator[Import]:
    """Every import of a source, wherever it stands. Whatever names a module of ours as a string counts: it is imported
    by that string, somewhere. Modules of launcher/ lie on the path of its scripts and are imported by their bare names.
    """
    for node in nodes(text):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield Import(node.lineno, _found(one.name, sources), alias=one.asname or one.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the whole name of what is imported"
            origin = _found(node.module or "", sources)
            for one in node.names:
                if f"{origin}.{one.name}" in sources:
                    yield Import(node.lineno, f"{origin}.{one.name}", alias=one.asname or one.name)
                else:
                    yield Import(node.lineno, origin, one.name)
        elif isinstance(node, ast.Constant) and "." in str(node.value) and node.value in sources:
            yield Import(node.lineno, str(node.value))


def _found(name: str, sources: Sources) -> str:
    return f"launcher.{name}" if f"launcher.{name}" in sources else name


def private(name: str) -> bool:
    """Whether a name begins with an underscore and is not Python's own."""
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def _own(value: ast.expr) -> bool:
    """Whether an expression is the object or the class at hand: self, cls, super(), type(self)."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id == "super" or (value.func.id == "type" and all(map(_own, value.args)))
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or a class, those under ``if`` and ``try`` too."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler):
                yield from statements(getattr(statement, part, []))


def defined_in(body: list[ast.stmt]) -> set[str]:
    """Names of the functions, classes, variables and slots that a module or a class defines."""
    found: set[str] = set()
    for statement in statements(body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = assigned(statement)
            found |= names
            if "__slots__" in names and statement.value is not None:
                found |= {each.value for each in ast.walk(statement.value) if isinstance(each, ast.Constant)}
    return found


def assigned(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    """The variables that a statement sets."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def members(text: str) -> set[str]:
    """What objects of a source's classes have: methods, variables, slots, attributes that are set on self."""
    found: set[str] = set()
    for node in nodes(text):
        if isinstance(node, ast.ClassDef):
            found |= defined_in(node.body)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call):
            found.update(name for target, name in _by_string(node, ("setattr", "__setattr__")) if _own(target))
    return found


def _by_string(call: ast.Call, functions: tuple[str, ...]) -> Iterator[tuple[ast.expr, str]]:
    """(object, name) where a call such as ``getattr(object, "name")`` says an attribute by a string."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function in functions and len(call.args) > 1:
        name = call.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield call.args[0], name.value


def private_uses(text: str) -> Iterator[tuple[int, ast.expr, str]]:
    """(line, object, name) of every underscore attribute of anything but the object at hand."""
    for node in nodes(text):
        if isinstance(node, ast.Attribute):
            found = [(node.value, node.attr)]
        elif isinstance(node, ast.Call):
            found = [*_by_string(node, ("getattr", "hasattr", "setattr", "delattr", "__setattr__"))]
        else:
            continue
        for value, name in found:
            if private(name) and not _own(value):
                yield node.lineno, value, name  # type: ignore[attr-defined]


# -- the rules --------------------------------------------------------------------------------------------------------


def everything_has_a_place(sources: Sources) -> list[str]:
    """Every file and folder of ds_optim stands on a floor."""
    homeless = {room(module) for module in ours(sources)} - LEVEL.keys()
    return [f"ds_optim.{one} stands on no floor: give it a place in FLOORS" for one in sorted(homeless)]


def imports_run_downwards(sources: Sources) -> list[str]:
    """Nobody imports from a higher floor; kernels and linear algebra import none of their neighbours."""
    found = []
    for module, text in ours(sources).items():
        here = room(module)
        for one in imports(text, sources):
            there = room(one.module)
            if one.module.split(".")[0] != "ds_optim" or here == there or not {here, there} <= LEVEL.keys():
                continue
            if LEVEL[there] > LEVEL[here]:
                found.append(f"{module}:{one.line} imports {one.module}, from floor {LEVEL[here]} to {LEVEL[there]}")
            elif here in ALONE and LEVEL[there] == LEVEL[here]:
                found.append(f"{module}:{one.line} imports {one.module}, and {here} imports no neighbours")
    return found


def arithmetic_reads_no_dtensor(sources: Sources) -> list[str]:
    """In sharding/, whose other modules are arithmetic, nobody imports the reader of DTensors."""
    return [
        f"{module}:{one.line} imports {one.module}"
        for module, text in ours(sources).items()
        if room(module) == "sharding"
        for one in imports(text, sources)
        if one.module == "ds_optim.sharding.dtensor" != module
    ]


def there_are_no_circles(sources: Sources) -> list[str]:
    """Neither modules nor the rooms that they lie in import each other in circles."""
    modules: dict[str, set[str]] = {module: set() for module in ours(sources)}
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in modules.items():
        others |= {one.module for one in imports(sources[module], sources)} & modules.keys() - {module}
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    found = []
    for graph in (modules, rooms):
        while True:
            try:
                graphlib.TopologicalSorter(graph).prepare()
            except graphlib.CycleError as error:
                circle = error.args[1][::-1]  # each imports the next
                found.append(" -> ".join(circle))
                graph[circle[0]].remove(circle[1])  # on to the next circle
            else:
                break
    return found


def nobody_uses_anothers_underscore_names(sources: Sources) -> list[str]:
    """No import of an underscore name, none used of an imported module, and no underscore attribute of an object, by
    dot or by string, that classes of another module have and those of this one do not. What torch and others keep
    private is nobody's of ours.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    for module, text in sources.items():
        for name in filter(private, members(text)):
            homes[name].append(module)
    found = []
    for module, text in sources.items():
        modules = {}  # of ours, by what they are called here
        for one in imports(text, sources):
            modules[one.alias] = one.module
            if private(one.name) and one.module in sources:
                found.append(f"{module}:{one.line} imports {one.name} of {one.module}")
        for line, value, name in private_uses(text):
            imported = modules.get(ast.unparse(value), "")
            if name in defined_in(parsed(sources.get(imported, "")).body):
                found.append(f"{module}:{line} uses {name} of {imported}")
            elif name in homes and module not in homes[name]:
                found.append(f"{module}:{line} uses {name} of {' or '.join(homes[name])}")
    return found


def the_hook_knows_the_plugin_alone(sources: Sources) -> list[str]:
    """What `import torch` runs, ds_optim_autoload, imports the standard library, wrapt and the plugin."""
    return [
        f"ds_optim_autoload:{one.line} imports {one.module}"
        for one in imports(sources.get("ds_optim_autoload", ""), sources)
        if one.module.split(".")[0] not in {*sys.stdlib_module_names, "wrapt"} and one.module != "ds_optim.plugin"
    ]


def one_room_knows_deepspeed(sources: Sources) -> list[str]:
    """Only deepspeed/ imports deepspeed."""
    return [
        f"{module}:{one.line} imports {one.module}"
        for module, text in ours(sources).items()
        for one in imports(text, sources)
        if one.module.split(".")[0] == "deepspeed" and room(module) not in KNOWS_DEEPSPEED
    ]


def releases_are_compared_in_few_places(sources: Sources) -> list[str]:
    """What follows from a release of another package is known to the modules of `KNOW_RELEASES` alone; to ask torch or
    transformers whether they have something by that name is to ask for their release.
    """
    found = []
    for module, text in sources.items():
        if module in KNOW_RELEASES:
            continue
        found += [
            f"{module}:{one.line} imports {one.module}"
            for one in imports(text, sources)
            if one.module.split(".")[0] == "packaging"
        ]
        for node in nodes(text):
            if isinstance(node, ast.Attribute) and node.attr == "is_before":
                found.append(f"{module}:{node.lineno} asks whether a release is before another one")
            elif isinstance(node, ast.Compare) and any(
                isinstance(each, ast.Attribute) and each.attr == "__version__" for each in ast.walk(node)
            ):
                found.append(f"{module}:{node.lineno} compares a __version__")
            elif isinstance(node, ast.Call) and _may_lack(node) and _names_in(node.args[0]) & _of_packages(text):
                found.append(f"{module}:{node.lineno} asks whether {ast.unparse(node.args[0])} has something")
    return found


def _may_lack(call: ast.Call) -> bool:
    """Whether a call asks for an attribute that need not be there, by a name that is written down."""
    asks = {("hasattr", 2), ("getattr", 3)}
    return (getattr(call.func, "id", ""), len(call.args)) in asks and isinstance(call.args[1], ast.Constant)


def _names_in(value: ast.expr) -> set[str]:
    return {each.id for each in ast.walk(value) if isinstance(each, ast.Name)}


def _of_packages(text: str) -> set[str]:
    """What a source calls torch and transformers, their modules, and what it imports from them."""
    return {
        (one.asname or one.name).split(".")[0]
        for node in nodes(text)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for one in node.names
        if (getattr(node, "module", None) or one.name).split(".")[0] in ("torch", "transformers")
    }


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}


def every_new_tensor_names_its_device(sources: Sources) -> list[str]:
    """A tensor that is made from nothing says where: `torch.set_default_device` is the user's, not ours."""
    return [
        f"{module}:{node.lineno} makes a tensor by torch.{node.func.attr} on whatever device is the default"
        for module, text in ours(sources).items()
        for node in nodes(text)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def nobody_imports_the_entries(sources: Sources) -> list[str]:
    """The command line and launcher/ are imported by nobody; launcher's modules may import each other."""
    found = []
    for module, text in sources.items():
        for one in imports(text, sources):
            entry = next((each for each in ENTRIES if f"{one.module}.".startswith(f"{each}.")), None)
            if entry and not f"{module}.".startswith(f"{entry}."):
                found.append(f"{module}:{one.line} imports {one.module}")
    return found


def nothing_is_too_large(sources: Sources) -> list[str]:
    """Of lines per file and function, and of methods per class, there are so many at most."""
    found = []
    for module, text in ours(sources).items():
        if (lines := len(text.splitlines())) > LINES:
            found.append(f"{module} has {lines} lines, more than {LINES}")
        for node in nodes(text):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{module}:{node.lineno} {node.name} has {lines} lines, more than {FUNCTION_LINES}")
            elif isinstance(node, ast.ClassDef):
                methods = sum(isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) for one in node.body)
                if methods > METHODS:
                    found.append(f"{module}:{node.lineno} {node.name} has {methods} methods, more than {METHODS}")
    return found


def a_class_name_has_one_meaning(sources: Sources) -> list[str]:
    """No two classes, or names for types, are called the same (underscores apart), unless they say the same."""
    meanings: dict[str, dict[str, str]] = defaultdict(dict)  # {name: {what it is: where}}
    for module, text in ours(sources).items():
        for node in nodes(text):
            if isinstance(node, ast.ClassDef):
                meanings[node.name.lstrip("_")][f"{module}:{node.lineno}"] = f"{module}:{node.lineno}"
        for statement in statements(parsed(text).body):
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                for name in assigned(statement):
                    if re.match("_?[A-Z].*[a-z]", name):
                        where = f"{module}:{statement.lineno}"
                        meanings[name.lstrip("_")].setdefault(ast.unparse(statement.value), where)
    return [f"{name}: {', '.join(places.values())}" for name, places in sorted(meanings.items()) if len(places) > 1]


RULES: list[Rule] = [
    everything_has_a_place,
    imports_run_downwards,
    arithmetic_reads_no_dtensor,
    there_are_no_circles,
    nobody_uses_anothers_underscore_names,
    one_room_knows_deepspeed,
    the_hook_knows_the_plugin_alone,
    releases_are_compared_in_few_places,
    every_new_tensor_names_its_device,
    nobody_imports_the_entries,
    nothing_is_too_large,
    a_class_name_has_one_meaning,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(rule: Rule) -> None:
    found = rule(sources_of("ds_optim/**/*.py", "launcher/*.py", "ds_optim_autoload.py"))
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


# What every registered rule must state belongs here too: that the registry refuses a rule that leaves something unsaid.


# -- that the rules see what they are for -----------------------------------------------------------------------------

SOUND = {
    "ds_optim": "_HOME = {'Lion': 'ds_optim.optimizers.lion'}",
    "ds_optim_autoload": "import sys\ndef hook():\n    import ds_optim.plugin",
    "ds_optim.kernels": "from ds_optim.kernels import eager",
    "ds_optim.kernels.eager": "import torch",
    "ds_optim.linalg.polar": "",
    "ds_optim.listing": "def listed(values): ...",
    "ds_optim.roles.role": "",
    "ds_optim.rule": "",
    "ds_optim.sharding.layout": "class Layout:\n    __slots__ = ('_ranges',)\n    def same(self, other):\n"
    "        return self._ranges == other._ranges",
    "ds_optim.sharding.dtensor": "from ds_optim.sharding import layout",
    "ds_optim.stepping.shards": "from ds_optim.sharding import dtensor\n_kept = {}\n"
    "class Shards:\n    def __init__(self):\n        self._names = {}",
    "ds_optim.optimizers.lion": "from ds_optim.stepping.shards import Shards\ndef update(model):\n"
    "    return model._parameters",
    "ds_optim.deepspeed.plugin": "import deepspeed\nfrom ds_optim import Lion",
    "ds_optim.checkpoint": "from ds_optim.listing import listed",
    "ds_optim.plugin": "from ds_optim.deepspeed import plugin\nimport ds_optim.checkpoint",
    "ds_optim.cli": "import ds_optim.checkpoint",
    "launcher.settings": "def of(model): ...",
    "launcher.train": "import settings\nimport torch\ntorch.distributed._set_timeout()\n"
    "hasattr(torch.optim, settings.name), getattr(torch.optim, 'SGD'), hasattr(settings, 'name')",
}
MANY_METHODS = "class Large:\n" + "".join(f"    def method_{index}(self): ...\n" for index in range(METHODS + 1))

# (rule, module, what is written there in place of the sound source, what is said about it)
PLANTED: list[tuple[Rule, str, str, str]] = [
    (everything_has_a_place, "ds_optim.utils", "", "ds_optim.utils stands on no floor"),
    (everything_has_a_place, "ds_optim.tools.numbers", "", "ds_optim.tools stands on no floor"),
    (imports_run_downwards, "ds_optim.sharding.layout", "import ds_optim.roles.role", "floor 3 to 4"),
    (imports_run_downwards, "ds_optim.errors", "from ds_optim import rule", ":1 imports ds_optim.rule"),
    (imports_run_downwards, "ds_optim.rule", "def late():\n    from ds_optim.stepping import shards", ":2 imports"),
    (imports_run_downwards, "ds_optim.rule", "if TYPE_CHECKING:\n    from ds_optim.cli import main", ":2 imports"),
    (imports_run_downwards, "ds_optim.rule", "LATE = ['ds_optim.stepping.shards']", "imports ds_optim.stepping.shards"),
    (imports_run_downwards, "ds_optim.optimizers.lion", "from ds_optim import Role", "imports ds_optim,"),
    (imports_run_downwards, "ds_optim.linalg.polar", "from ds_optim.listing import listed", "imports no neighbours"),
    (imports_run_downwards, "ds_optim.kernels.eager", "import ds_optim.linalg.polar", "imports no neighbours"),
    (arithmetic_reads_no_dtensor, "ds_optim.sharding.plan", "from ds_optim.sharding import dtensor", "plan:1 imports"),
    (there_are_no_circles, "ds_optim.kernels.eager", "def late():\n    import ds_optim.kernels", "eager -> ds_optim"),
    (
        there_are_no_circles,
        "ds_optim.sharding.layout",
        "if TYPE_CHECKING:\n    from ds_optim.sharding.dtensor import read",
        "ds_optim.sharding.layout -> ds_optim.sharding.dtensor",
    ),
    (nobody_uses_anothers_underscore_names, "ds_optim.rule", "from ds_optim.cli import _main", "imports _main of"),
    (nobody_uses_anothers_underscore_names, "ds_optim.ranks", "shards._names = {}", "_names of ds_optim.stepping"),
    (nobody_uses_anothers_underscore_names, "ds_optim.ranks", "getattr(self.shards, '_names')", "ranks:1 uses _names"),
    (nobody_uses_anothers_underscore_names, "ds_optim.ranks", "layout._ranges", "_ranges of ds_optim.sharding.layout"),
    (
        nobody_uses_anothers_underscore_names,
        "launcher.train",
        "optimizer.shards._names",
        "launcher.train:1 uses _names",
    ),
    (
        nobody_uses_anothers_underscore_names,
        "ds_optim.ranks",
        "from ds_optim.stepping import shards\n_kept = shards._kept",
        "ranks:2 uses _kept of ds_optim.stepping.shards",
    ),
    (one_room_knows_deepspeed, "ds_optim.ranks", "from deepspeed.runtime import engine", "deepspeed.runtime"),
    (one_room_knows_deepspeed, "ds_optim.ranks", "def late():\n    import deepspeed", "ranks:2 imports deepspeed"),
    (the_hook_knows_the_plugin_alone, "ds_optim_autoload", "import torch", "imports torch"),
    (the_hook_knows_the_plugin_alone, "ds_optim_autoload", "import ds_optim.ranks", "imports ds_optim.ranks"),
    (
        releases_are_compared_in_few_places,
        "ds_optim.ranks",
        "from packaging.version import Version",
        "imports packaging",
    ),
    (
        every_new_tensor_names_its_device,
        "ds_optim.ranks",
        "x = torch.zeros(3)",
        "ranks:1 makes a tensor by torch.zeros",
    ),
    (releases_are_compared_in_few_places, "ds_optim.ranks", "TORCH.is_before('2.9')", "ranks:1 asks whether"),
    (
        releases_are_compared_in_few_places,
        "ds_optim.ranks",
        "new = torch.__version__ > '2.9'",
        "compares a __version__",
    ),
    *(
        (releases_are_compared_in_few_places, "ds_optim.ranks", text, "asks whether")
        for text in (
            "import torch\nhasattr(torch.accelerator, 'memory_allocated')",
            "import torch.distributed as dist\ngetattr(dist, 'all_gather_single', None)",
            "import torch\ngetattr(torch.get_device_module(one), 'is_initialized', bool)()",
            "from torch import nn\nhasattr(nn, 'RMSNorm')",
            "def late():\n    import transformers.trainer\n    return hasattr(transformers.trainer, 'deepspeed_init')",
        )
    ),
    (nobody_imports_the_entries, "ds_optim.checkpoint", "def late():\n    from ds_optim import cli", ":2 imports"),
    (nobody_imports_the_entries, "launcher.train", "from ds_optim.cli import main", "launcher.train:1 imports"),
    (nobody_imports_the_entries, "ds_optim.ranks", "import launcher.train", "imports launcher.train"),
    (nobody_imports_the_entries, "ds_optim.ranks", "import settings", "imports launcher.settings"),
    (nothing_is_too_large, "ds_optim.ranks", "\n" * (LINES + 1), f"has {LINES + 1} lines"),
    (
        nothing_is_too_large,
        "ds_optim.ranks",
        f"def f():{FUNCTION_LINES * chr(10)}    return 1",
        f"f has {FUNCTION_LINES + 1} lines",
    ),
    (nothing_is_too_large, "ds_optim.ranks", MANY_METHODS, f"Large has {METHODS + 1} methods"),
    (a_class_name_has_one_meaning, "ds_optim.ranks", "class _Layout: ...", "Layout: ds_optim.sharding.layout:1, "),
    (a_class_name_has_one_meaning, "ds_optim.ranks", "Shards = dict[str, int]", "Shards: ds_optim.stepping.shards:"),
]


def test_a_sound_house_is_one() -> None:
    assert [found for rule in RULES for found in rule(SOUND)] == []


@pytest.mark.parametrize(("rule", "module", "text", "said"), PLANTED, ids=[each[0].__name__ for each in PLANTED])
def test_a_planted_violation_is_found(rule: Rule, module: str, text: str, said: str) -> None:
    found = rule({**SOUND, module: text})
    assert len(found) == 1, found
    assert said in found[0]


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule.__name__ for rule in RULES} == {rule.__name__ for rule, *_ in PLANTED}
