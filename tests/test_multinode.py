"""Several hosts: the cluster on one machine, the preflight, `deepspeed --hostfile` over ssh, faults during a run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launcher"
sys.path.insert(0, str(LAUNCHER))

import host_report  # noqa: E402
import job_files  # noqa: E402
import local_cluster  # noqa: E402
import preflight  # noqa: E402
import rank_logs  # noqa: E402

import forked  # noqa: E402
import multinode_job  # noqa: E402
from pool import Pools  # noqa: E402

MULTINODE = ["bash", str(LAUNCHER / "multinode.sh")]


@pytest.fixture
def cluster() -> Iterator[local_cluster.LocalCluster]:
    """Three hosts."""
    with _cluster(3) as made:
        yield made


def _quickly(cluster: local_cluster.LocalCluster) -> dict[str, str]:
    """The environment of a cluster on whose hosts interpreters are forks."""
    return {**cluster.environment, "PATH": forked.environment()["PATH"]}


def _cluster(hosts: int) -> local_cluster.LocalCluster:
    problems = local_cluster.problems_here(hosts)
    if problems:
        pytest.skip("; ".join(problems))
    return local_cluster.LocalCluster(hosts)


# --------------------------------------------------------------------------------------------- a cluster on one machine


def test_hosts_have_names_addresses_and_ssh_servers_of_their_own(cluster: local_cluster.LocalCluster) -> None:
    script = "hostname; hostname -I; ssh host2 hostname; pdsh -R ssh -w host1,host2,host3 'ls /dev/shm; hostname'"
    lines = cluster.hosts[0].run(["sh", "-c", script], env=cluster.environment).stdout.split()
    assert lines[:3] == ["host1", "10.77.0.1", "host2"]
    assert sorted(lines[3:]) == sorted(["host1:", "host1", "host2:", "host2", "host3:", "host3"])
    assert job_files.read_hostfile(cluster.hostfile) == {"host1": 1, "host2": 1, "host3": 1}


def test_a_cut_cable_and_a_lost_host_are_silent_and_a_mended_one_is_back(cluster: local_cluster.LocalCluster) -> None:
    first, second, third = cluster.hosts

    def ask(seconds: int) -> subprocess.CompletedProcess[str]:
        """A host that is there may take long to answer where others want the cores."""
        return first.run(["ssh", "-o", f"ConnectTimeout={seconds}", second.name, "true"])

    cluster.cut(second)
    answer = ask(1).stdout
    assert "timed out" in answer or "No route" in answer
    cluster.mend(second)
    assert ask(60).returncode == 0
    sleeper = third.start(["sleep", "1000"])
    cluster.lose(third)
    assert sleeper.wait(60) != 0
    assert not third.is_alive
    assert ask(60).returncode == 0


@pytest.mark.parametrize("end", ["failure", "kill -9", "terminate"])
def test_nothing_is_left_of_a_cluster(end: str, tmp_path: Path) -> None:
    _cluster(2)
    pids = tmp_path / "pids"
    command = f"echo $$ > {pids}; readlink /proc/self/ns/net >> {pids}; " + (
        "exit 7" if end == "failure" else "sleep 60"
    )
    up = [sys.executable, str(LAUNCHER / "local_cluster.py"), "up", "--hosts", "2", "--", "sh", "-c", command]
    interfaces = set(os.listdir("/sys/class/net"))
    with subprocess.Popen(up, stderr=subprocess.PIPE, text=True) as process:
        if end == "failure":
            assert process.wait(60) == 7
        else:
            _until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
            process.send_signal(signal.SIGKILL if end == "kill -9" else signal.SIGTERM)
            assert process.wait(20) != 0
    namespace = pids.read_text().split()[1]
    _until(lambda: namespace not in _network_namespaces())
    assert set(os.listdir("/sys/class/net")) == interfaces


def _network_namespaces() -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(process / "ns" / "net"))
    return found


def _until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_root_every_reason_is_given_and_the_way_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(local_cluster, "_path_of", lambda program: "" if program == "pdsh" else "/bin/true")
    with pytest.raises(local_cluster.ClusterError) as refused:
        local_cluster.LocalCluster(0)
    said = str(refused.value)
    for words in ("--hosts is 0", "apt-get install --no-install-recommends pdsh", "need root", "loopback --hosts 0"):
        assert words in said


# -------------------------------------------------------------------------------------------- the same weights anywhere


@pytest.mark.parametrize("hosts", [2, 3])
def test_all_end_bitwise_where_one_host_does(hosts: int, pool: Pools, tmp_path: Path) -> None:
    """Started by `deepspeed --hostfile` over pdsh and ssh; ZeRO 1, 2 and 3 in turn, shifted between 2 and 3 hosts."""
    output, first_stage = tmp_path / "result.json", hosts - 1
    with _cluster(hosts) as cluster:
        launch = [*MULTINODE, "--hostfile", str(cluster.hostfile), "--interface", "eth0"]
        script = [str(ROOT / "tests" / "multinode_job.py"), "--output", str(output), "--first-stage", str(first_stage)]
        command = [*launch, "--logs", str(tmp_path / "logs"), *script]
        done = cluster.hosts[0].run(command, env=_quickly(cluster), timeout=900)
    assert done.returncode == 0, done.stdout
    assert f"preflight: {hosts} hosts, {hosts} ranks, no problem found" in done.stdout
    assert "host2: " in done.stdout  # pdsh's mark
    assert len(list((tmp_path / "logs").glob("*_rank*.log"))) == hosts
    result = json.loads(output.read_text())
    assert result["hosts"] == [f"host{i + 1}" for i in range(hosts)]
    assert set(result["parameters"]) == set(multinode_job.OPTIMIZERS)
    for optimizer, parameters in result["parameters"].items():
        assert len(parameters) == 21
        stage = multinode_job.stage_of(optimizer, first_stage)
        assert [parameters] * hosts == pool(hosts).run(multinode_job.trained, optimizer, stage), optimizer


def test_without_ssh_and_without_root_the_same_over_loopback(pool: Pools, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    job = [str(ROOT / "tests" / "multinode_job.py"), "--output", str(output), "--optimizers", "AdamMini"]
    command = [forked.python(), str(LAUNCHER / "local_cluster.py"), "loopback", "--hosts", "2", "--", *job]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = multinode_job.stage_of("AdamMini", 1)
    [expected, _] = pool(2).run(multinode_job.trained, "AdamMini", stage)
    assert json.loads(output.read_text())["parameters"] == {"AdamMini": expected}


def test_slurm_starts_one_launcher_per_node(pool: Pools, tmp_path: Path) -> None:
    """With stand-ins for `srun` and `scontrol`: two nodes that are addresses of this machine."""
    programs, output = tmp_path / "bin", tmp_path / "result.json"
    programs.mkdir()
    for name, script in {
        "scontrol": "printf '127.0.0.1\\n127.0.0.2\\n'",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" && wait $!',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PORT": str(local_cluster.free_port()),
        "SLOTS": "1",
    }
    inherited = forked.environment()
    job = [str(ROOT / "tests" / "multinode_job.py"), "--output", str(output), "--optimizers", "SWAN"]
    done = subprocess.run(
        ["bash", str(LAUNCHER / "multinode.sbatch"), *job],
        env={**inherited, **given, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{programs}:{inherited['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("preflight: 2 hosts, 2 ranks, no problem found") == 2
    assert len(list((tmp_path / "runs" / "logs-7").glob("*_rank*.log"))) == 2
    [expected, _] = pool(2).run(multinode_job.trained, "SWAN", multinode_job.stage_of("SWAN", 1))
    assert json.loads(output.read_text())["parameters"] == {"SWAN": expected}


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.long
def test_a_lost_host_is_left_out_and_the_run_goes_on(cluster: local_cluster.LocalCluster, tmp_path: Path) -> None:
    """The preflight finds nothing, a host loses its power, torchrun restarts with two, and they reach the end."""
    model = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
    }
    (tmp_path / "model.json").write_text(json.dumps({**model, "num_attention_heads": 4, "max_position_embeddings": 64}))
    training = f"--model {tmp_path}/model.json --text {ROOT}/docs --micro-batch 1 --seq-length 32 --eval-sequences 2"
    training += f" --steps 24 --save-every 4 --save {tmp_path}/saved --autoresume --fallback --timeout 15 --log-every 5"
    training += f" --output {tmp_path}/log --memory-report {tmp_path}/memory"
    options = ["--interface", "eth0", "--silence", "6", "--elastic", "2", "--logs", str(tmp_path / "logs")]
    command = [*MULTINODE, *options, str(LAUNCHER / "train.py"), *training.split()]
    log, said = tmp_path / "log" / "log.jsonl", tmp_path / "said"
    with said.open("w") as output:
        running = cluster.hosts[0].start(command, env=_quickly(cluster), stdout=output, stderr=subprocess.STDOUT)
    _until(lambda: running.poll() is not None or (log.exists() and '"step": 14,' in log.read_text()), 300)
    cluster.lose(cluster.hosts[2])
    status = running.wait(600)  # how fast it recovers is for benchmarks/host_faults.py
    text = said.read_text()
    assert status == 0, text[-6000:]
    assert "preflight: 3 hosts, 3 ranks, no problem found" in text
    assert "finished by 2 of 3 hosts; 1 lost on the way" in text
    resumed = re.findall(r"(\d+) steps done; a step took 3 sequences and takes 2 from here on", text)
    assert int(resumed[-1]) >= 12
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 24
    measured = json.loads((tmp_path / "memory" / "measured.json").read_text())
    assert [(rank["rank"], rank["host"]) for rank in measured["ranks"]] == [(0, "host1"), (1, "host2")]
    page = (tmp_path / "memory" / "report.html").read_text()
    assert "Hosts and their ranks" in page
    # "forkserver": ranks that have outlived their stand-ins.
    left = ("train.py", "forkserver")
    assert not any(host.processes(one) for host in cluster.hosts if host.is_alive for one in left)


SLEEPER = "import os, sys, time\nif os.environ['RANK'] == sys.argv[-1]:\n    sys.exit(3)\ntime.sleep(1000)\n"


@pytest.mark.parametrize(
    ("options", "number"),
    [([], signal.SIGHUP), (["--elastic", "2"], signal.SIGTERM)],
    ids=["deepspeed-HUP", "torchrun-TERM"],
)
def test_a_stopped_job_leaves_no_rank_behind(options: list[str], number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    with _cluster(2) as cluster:
        command = [*MULTINODE, "--no-preflight", "--interface", "eth0", "--logs", str(tmp_path / "logs"), *options]
        # What its parent ignores (under nohup: SIGHUP) a shell ignores, too.
        before = signal.signal(number, signal.SIG_DFL)
        with (tmp_path / "said").open("w") as said:
            running = cluster.hosts[0].start([*command, str(script), "none"], env=cluster.environment, stdout=said)
        signal.signal(number, before)
        _until(lambda: all(_ranks(host, script) for host in cluster.hosts), 120)
        [shell] = [process for process in cluster.hosts[0].processes("multinode.sh") if process.name() == "bash"][:1]
        shell.send_signal(number)
        assert running.wait(60) != 0
        _until(lambda: not any(host.processes(str(script)) for host in cluster.hosts), 30)


def _ranks(host: local_cluster.Host, script: Path) -> bool:
    for process in host.processes(str(script)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            if process.cmdline()[1:3] == ["-u", str(script)]:
                return True
    return False


def test_over_loopback_a_host_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    command = [sys.executable, str(LAUNCHER / "local_cluster.py"), "loopback", "--hosts", "2", "--", str(script), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    _until(lambda: subprocess.run(["pgrep", "-f", str(script)], check=False).returncode != 0, 10)


# ------------------------------------------------------------------------------------------------------------ preflight


def _report(**changes: object) -> host_report.Report:
    same = {
        "versions": {"torch": "2.13.0"},
        "package": "p" * 64,
        "script": "s" * 64,
        "layout": "l" * 64,
    }
    return host_report.Report(**{**same, "interfaces": {"eth0": "10.0.0.1"}, "devices": 0, **changes})  # type: ignore[arg-type]


def _plan(hosts: dict[str, int], **changes: object) -> preflight.Plan:
    return preflight.Plan(hosts, "train.py", interface="eth0", **changes)  # type: ignore[arg-type]


def test_equal_hosts_have_no_problem() -> None:
    answers = [preflight.Answer(name, 1, _report(), clock=(40.0 + i, 0.1)) for i, name in enumerate("ab")]
    assert preflight.judge(_plan({"a": 1, "b": 1}), answers) == []


def test_all_problems_of_all_hosts_are_listed_at_once() -> None:
    answers = [
        preflight.Answer("a", 8, _report(devices=4), clock=(0.0, 0.1)),
        preflight.Answer("b", 1, _report(versions={"torch": "2.12.0"}, layout="x" * 64, devices=1), clock=(7.5, 0.1)),
        preflight.Answer(
            "c", 1, _report(interfaces={"ib0": "10.1.0.3"}, package="q" * 64, script=None), clock=(-0.5, 3.0)
        ),
        preflight.Answer(
            "d", 1, _report(problems=["port 29500 cannot be used here"], devices=1, layout=None), clock=None
        ),
        preflight.Answer("e", 1, problem="e cannot be reached over ssh: Connection refused", is_reachable=False),
    ]
    problems = preflight.judge(_plan({"a": 8, "b": 1, "c": 1, "d": 1, "e": 1}), answers)
    expected = [
        "e cannot be reached",
        "a: 8 slots, but 4 accelerators",
        "c has no interface eth0 with an IPv4 address (it has ib0 10.1.0.3)",
        "c: 1 slots, but 0 accelerators",
        "d: port 29500",
        "hosts differ in the version of torch: 2.13.0 on a, c, d; 2.12.0 on b",
        "hosts differ in the files of ds_optim: pppppppppppp on a, b, d; qqqqqqqqqqqq on c",
        "hosts differ in the training script and its modules: ssssssssssss on a, b, d; missing on c",
        "hosts differ in the layout of parameters over ranks: llllllllllll on a, c; xxxxxxxxxxxx on b",
        "the clock of b is +7.5 s from that of a",
    ]
    assert len(problems) == len(expected)
    for words, problem in zip(expected, problems, strict=True):
        assert words in problem


def test_another_layout_is_found() -> None:
    answers = [preflight.Answer(name, 1, _report(layout=name * 64), clock=None) for name in "ab"]
    [problem] = preflight.judge(_plan({"a": 1, "b": 1}), answers)
    assert problem.startswith("hosts differ in the layout of parameters over ranks: aaaaaaaaaaaa on a")


def test_a_report_names_what_is_wrong_here(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        question = host_report.Question(
            script=str(LAUNCHER / "train.py"),
            arguments=["--micro-batch", "0"],
            shared=(str(tmp_path / "token"), "content"),
            port=busy.getsockname()[1],
        )
        found = host_report.report(question)
    said = "\n".join(found.problems)
    assert "SettingsError: - the micro-batch is 0" in said
    assert f"it does not see {tmp_path}" in said
    assert f"port {question.port} cannot be used here" in said
    assert found.versions["torch"].startswith("2.")
    assert found.package != found.script is not None


def test_the_layout_follows_model_stage_and_ranks() -> None:
    def of(*arguments: str, ranks: int = 2) -> str | None:
        return host_report.layout_hash(
            host_report.Question(script=str(LAUNCHER / "train.py"), arguments=list(arguments), world_size=ranks)
        )

    hashes = [of(), of("--zero-stage", "3"), of(ranks=3), of("--model", str(ROOT / "configs/models/llama_60m.json"))]
    assert of() == hashes[0]
    assert None not in hashes
    assert len(set(hashes)) == 4
    assert host_report.layout_hash(host_report.Question(script=__file__)) is None


def test_every_fault_of_the_files_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts, environment = tmp_path / "hosts", tmp_path / "env"
    hosts.write_text("# mine\na slots=2\n\nb\na slots=1\nc slots=0\n")
    environment.write_text("# mine\nGOOD=a=b\nBAD\nQUOTED='x'\n")
    arguments = ["--hostfile", str(hosts), "--env-file", str(environment), "--no-ssh", str(tmp_path / "none.py")]
    assert preflight.main(arguments) == 1
    said = capsys.readouterr().err
    for words in (
        'line 4: "b"',
        "line 5: a was",
        "line 6: c has no",
        'line 3: "BAD"',
        "line 4: DeepSpeed",
        "none.py: no such",
        "--node-rank is -1",
        "--no-ssh needs --master-addr",
    ):
        assert words in said
    assert "8 problems; nothing was started" in said  # --node-rank and --master-addr are missing, too
    hosts.write_text("# nobody\n")
    with pytest.raises(job_files.JobFilesError, match="names no host"):
        job_files.read_hostfile(hosts)
    with pytest.raises(job_files.JobFilesError, match="No such file"):
        job_files.read_hostfile(tmp_path / "missing")


def test_what_a_remote_shell_would_change_is_refused() -> None:
    plain = ["--text", "a b", "--name=x_1.2,3:4@5%6+7", "/data/runs"]
    assert job_files.unpassable(["/data/checkout"], plain) == []
    problems = job_files.unpassable(["/my data"], ["$HOME", "a $b", "(q)", "a;b", "'x'", ""])
    assert len(problems) == 7
    assert "'/my data'" in problems[0]


def test_the_environment_is_inherited_then_read_then_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in job_files.INHERITED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONPATH", "/here")
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("TOKEN=abc=\nPYTHONPATH=/there\nA=1\n")
    second.write_text("A=2\n")
    found = job_files.environment([first, second], "eth7")
    sockets = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7"}
    assert found == {"OMP_NUM_THREADS": "3", "PYTHONPATH": "/there", "TOKEN": "abc=", "A": "2", **sockets}
    with pytest.raises(job_files.JobFilesError, match=r"environment file .*none: No such file"):
        job_files.environment([tmp_path / "none"], "")


def test_the_masters_address_is_the_one_its_name_stands_for() -> None:
    has = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.1.0.1"}
    assert preflight._address(preflight.Answer("10.1.0.1", 1, _report(interfaces=has)), "") == "10.1.0.1"
    assert preflight._address(preflight.Answer("localhost", 1, _report(interfaces=has)), "eth0") == "10.1.0.1"
    assert preflight._address(preflight.Answer("10.9.9.9", 1, _report(interfaces=has)), "") == "172.17.0.1"
    assert preflight._address(preflight.Answer("node", 1), "") == "node"


def test_options_that_the_script_does_not_take_are_said_before_any_host_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    train = ["--no-ssh", "--node-rank", "0", "--master-addr", "127.0.0.1", str(LAUNCHER / "train.py")]
    for options, words in ((["--optimiser", "adan"], "does not take these options"), (["--lr", "x"], "does not take")):
        assert preflight.main(["--hostfile", str(tmp_path / "hosts"), *train, *options]) == 1
        assert words in capsys.readouterr().err
    assert preflight.main(["--hostfile", str(tmp_path / "hosts"), *train, "--steps", "0"]) == 1
    assert "asks for no step at all" in capsys.readouterr().err


def test_nothing_but_assignments_reaches_the_shell(tmp_path: Path) -> None:
    """Without DS_ACCELERATOR DeepSpeed logs to standard output when it is imported."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n")
    options = ["--no-ssh", "--node-rank", "0", "--master-addr", "127.0.0.1", "--port", str(local_cluster.free_port())]
    command = [*MULTINODE, "--hostfile", str(tmp_path / "hosts"), *options, "--preflight-only"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [*command, str(LAUNCHER / "train.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 hosts, 1 ranks, no problem found" in done.stderr


def test_a_shared_path_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    plan = preflight.Plan({"a": 1}, __file__, port=local_cluster.free_port(), shared=Path(__file__))
    with pytest.raises(preflight.SharedPathError, match="cannot be written here: File exists"):
        preflight.ask_at_the_master(plan, 0, "127.0.0.1", 5)


def test_without_ssh_hosts_meet_at_the_master_and_compare(tmp_path: Path) -> None:
    script, port = tmp_path / "script.py", local_cluster.free_port()
    script.write_text("print()")
    plan = preflight.Plan({"a": 1, "b": 1}, str(script), port=port, shared=tmp_path / "shared")
    found: dict[int, object] = {}

    def ask(rank: int) -> None:
        found[rank] = preflight.ask_at_the_master(plan, rank, "127.0.0.1", 60)

    other = threading.Thread(target=ask, args=(1,))
    other.start()
    ask(0)
    other.join()
    for answers in found.values():
        assert isinstance(answers, list), answers
        assert [answer.name for answer in answers] == ["a", "b"]
        assert preflight.judge(plan, answers) == []


def test_without_ssh_a_missing_host_is_said(tmp_path: Path) -> None:
    plan = preflight.Plan({"a": 1, "b": 1}, __file__, port=local_cluster.free_port())
    said = preflight.ask_at_the_master(plan, 0, "127.0.0.1", 1)
    assert isinstance(said, str)
    assert "not all of a, b met at 127.0.0.1" in said


# ----------------------------------------------------------------------------------------------- logs of ranks, options


def test_the_last_error_of_every_rank_is_found(tmp_path: Path) -> None:
    trace = 'Traceback (most recent call last):\n  File "x"\nRuntimeError: Connection closed by peer\n'
    (tmp_path / "20261122_rank0.log").write_text("step 1\n" + trace.replace("Runt", "[rank0]: Runt"))
    (tmp_path / "20261122_rank1.log").write_text("step 1\n")
    attempt = tmp_path / "job" / "attempt_0" / "2"
    attempt.mkdir(parents=True)
    (attempt / "stderr.log").write_text("train.py stopped: disk full\n")
    assert rank_logs.reasons(tmp_path) == {
        "rank 0": "RuntimeError: Connection closed by peer",
        "local rank 2 in job/attempt_0": "train.py stopped: disk full",
    }
    assert rank_logs.reasons(tmp_path, newer_than=time.time() + 60) == {}


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--bogus"], "unknown option --bogus"), ([], "which training script")]
)
def test_wrong_use_of_the_script_is_said(arguments: list[str], said: str) -> None:
    done = subprocess.run([*MULTINODE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
