"""What every test shares: the pool of ranks, the seed of the random data, and a CI that tolerates no skipped test."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Before anything imports torch or deepspeed: the suite runs on CPU, offline, and one thread per process is what makes
# sums reproducible.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # there is no GPU to compile for; machine_code.py compiles all the same
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch finds compiled code again by a key that does not say for which vector registers it was generated.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{capability}"
    )

from hypothesis import HealthCheck, settings

from ds_optim import extension_builds
from pool import Pools

BEGUN = time.time()
BUILDS = extension_builds.use_own_folder()  # of every process that a test starts

# Examples that start engines are slow by nature; how long one takes says nothing about its correctness.
settings.register_profile(
    "ds_optim", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("ds_optim")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default=os.environ.get("DS_OPTIM_TEST_SEED", "0"),
        help="seed of all random data, hypothesis included: a number or 'random' (environment: DS_OPTIM_TEST_SEED)",
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config: pytest.Config) -> None:
    text = str(config.getoption("--seed"))  # a worker of pytest-xdist is given the number
    if text == "random":
        text = str(secrets.randbelow(2**31))
    if not text.isdecimal():
        raise pytest.UsageError(f"--seed takes a non-negative number or 'random', got {text!r}")
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has it
        stale = [lock for lock in extension_builds.locks([BUILDS]) if lock.is_stale]
        if stale:  # a test that needs the operator would wait for ever
            raise pytest.UsageError("\n".join(map(str, stale)))
    config.option.seed = int(text)
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, in the order in which they were."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """What was imported is never garbage: it need not be looked through again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return f"data seed: {config.getoption('--seed')} (repeat with --seed {config.getoption('--seed')})"


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """`pool(world_size).run(function, *args, timeout=...)` gives one result per rank; see tests/pool.py."""
    with Pools() as pools:
        yield pools


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, which depends on --seed and the test's name but not on which other tests run."""
    return zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give back the memory that DeepSpeed's engines left: 69 MB for every launch, until the machine starts anew."""
    if hasattr(session.config, "workerinput"):
        return
    mapped = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r"/dev/shm/(deepspeed_allreduce_buffer_\S+)", (process / "maps").read_text()))
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        if left.name not in mapped and left.stat().st_mtime >= BEGUN:
            left.unlink(missing_ok=True)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _in_ci() and report.skipped:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} was skipped or failed as expected, which CI does not accept: {report.longrepr}"
        )
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _in_ci() and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped as a whole, which CI does not accept: {report.longrepr}"
    return report
