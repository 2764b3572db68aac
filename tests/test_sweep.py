"""benchmark/sweep.py with small scripts in place of methods: what it lists, what it survives, how it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMON = """
class RunArgs:
    student: str
    seed: int = 1
    device: str = ""
    epochs: int = 1
class DistillArgs(RunArgs):
    teacher: str
    teacher_weights: str = ""
"""
SCRIPT = """
import os, pathlib, sys, time
sys.path.append(".")
from common import *
class Args({base}):
    own_flag: int = 0
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--bad-flag" in flags:
    sys.exit("╭─ box ─╮\\n│ Unrecognized options: --bad-flag │\\n╰───────╯")
print("device", flags.get("--device"), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
pathlib.Path(f"began-{{os.getpid()}}").touch()
time.sleep(float(flags.get("--epochs", 0.3)))
print("result      last 1.00 %")
if "--broken" in flags:
    sys.exit("error: runs/x/result.json is damaged")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of three methods; vanilla has no teacher."""
    for name, base in dict(vanilla="RunArgs", kd="DistillArgs", icd="DistillArgs").items():
        (tmp_path / "methods").mkdir(exist_ok=True)
        (tmp_path / "methods" / f"{name}.py").write_text(SCRIPT.format(base=base))
    (tmp_path / "common.py").write_text(COMMON)
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark" / "sweep.py", tmp_path / "benchmark")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "benchmark/sweep.py", "--pairs", "resnet20/resnet8", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*flags: str) -> tuple[int, list[str], list[str]]:
    process = start(*flags)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


def test_the_list_has_what_a_user_would_type(project):
    methods = ["--methods", "vanilla", "kd --own-flag 2", "--seeds", "1", "2"]
    code, out, _ = ended(*methods, "--pairs", "a/c", "b/c", "--list", "--", "--teacher-weights", "x y.pt", "--epochs", "5")
    assert code == 0
    assert out == [
        line
        for seed in (1, 2)
        for line in (
            f"python methods/vanilla.py --student c --seed {seed} --epochs 5",  # once for both pairs
            f"python methods/kd.py --teacher a --student c --own-flag 2 --seed {seed} --teacher-weights 'x y.pt' --epochs 5",
            f"python methods/kd.py --teacher b --student c --own-flag 2 --seed {seed} --teacher-weights 'x y.pt' --epochs 5",
        )
    ]


def test_two_devices_share_the_runs(project):
    begun = time.monotonic()
    code, out, err = ended("--methods", "kd", "--devices", "cpu", "cpu:1", "--", "--epochs", "1")
    assert (code, err, out[0]) == (0, [], "3 runs, 2 at a time; what they print is in runs/logs")
    assert [line.split("  ")[0] for line in out[1:]] == ["1/3", "2/3", "3/3"] and out[-1].endswith("left 0:00:00")
    assert time.monotonic() - begun < 3  # two of three at once
    said = sorted(file.read_text().splitlines()[0] for file in Path("runs/logs").glob("kd_--teacher_resnet20_*.txt"))
    threads = max(1, os.cpu_count() // 2)
    assert {*said} == {f"device cpu threads {threads}", f"device cpu:1 threads {threads}"}


def test_broken_jobs_stop_no_other(project):
    methods = ["--methods", "kdd", "kd --bad-flag 1", "kd --broken 1", "kd", "icd"]
    code, out, err = ended(*methods, "--seeds", "1", "--jobs", "2")
    assert code == 1 and len(out) == 6 and sum("result      last 1.00 %" in line for line in out) == 2
    assert err.pop() == "error: 3 of 5 runs failed"
    assert any("methods/kdd.py" in line and "can't open file" in line for line in err)
    kd = "FAILED python methods/kd.py --teacher resnet20 --student resnet8"
    assert f"{kd} --bad-flag 1 --seed 1: Unrecognized options: --bad-flag" in err
    assert f"{kd} --broken 1 --seed 1: error: runs/x/result.json is damaged" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs(project, number):
    process = start("--methods", "kd", "--jobs", "2", "--", "--epochs", "60")
    while len(found := [*project.glob("began-*")]) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == "error: interrupted: 0 of 3 runs have ended; continue with the same command\n"
    for file in found:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name.split("-")[1]), 0)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--jobs", "0"], 2, "--jobs 0 must be at least 1"),
        (["--", "--epochz", "3"], 2, "no method has --epochz"),
        (["--logs", "common.py"], 1, "common.py: File exists"),
    ],
)
def test_bad_flags_start_nothing(project, flags, code, said):
    assert ended(*flags) == (code, [], [f"error: {said}"])
    assert not [*project.glob("began-*")]


def test_a_list_that_nobody_reads_to_its_end(project):
    command = f"{sys.executable} benchmark/sweep.py --list --seeds {' '.join(map(str, range(999)))} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_the_whole_benchmark_has_every_method(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "benchmark" / "full.sh"), "--seeds", "1", "--list", "--", "--epochs", "1", "--init-epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    commands = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and len(commands) == len({*commands})
    assert {Path(command.split()[1]).name for command in commands} == {path.name for path in ROOT.glob("methods/*.py")}
