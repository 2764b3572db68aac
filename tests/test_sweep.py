"""benchmark/sweep.py on the synthetic data: what it lists, what it survives, what it says about failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, load

sweep = load("sweep", "benchmark")

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
SHARED = ["--dataset", "synthetic", "--device", "cpu", "--epochs", "2", "--batch-size", "500"]
PLAN = sweep.Args(methods=("kd",), pairs=("resnet8/resnet8",), seeds=(1, 2))
FLAGS = ["--methods", "kd", "--pairs", "resnet8/resnet8", "--seeds", "1", "2"]  # the same, typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all tests here: what an earlier one has trained, a later one finds finished."""
    return tmp_path_factory.mktemp("sweep")


def start(folder: Path, *flags: str, **more) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmark" / "sweep.py"), *flags, "--", *SHARED]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, start_new_session=True, **more)


def name(method: str, seed: int) -> str:
    return f"{method}__synthetic__epochs=2__batch-size=500__seed{seed}"


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


def test_a_listed_line_runs_as_it_stands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    sweep.main(sweep.Args(PLAN.methods, PLAN.pairs, PLAN.seeds, list=True), sweep.split(SHARED))
    listed = capsys.readouterr().out
    Path("commands.txt").write_text(listed)
    lines = listed.splitlines()
    assert len(lines) == 3 and not Path("runs").exists()
    assert "vanilla.py --student resnet8 --seed 1" in lines[0]
    assert all(f"kd.py --teacher resnet8 --student resnet8 --seed {seed}" in lines[seed] for seed in (1, 2))
    task = 'sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | bash'
    done = subprocess.run(task, shell=True, env=ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("runs", name("vanilla__resnet8", 1), "result.json").exists()


def test_killed_at_any_moment_it_goes_on_and_repeats_nothing(folder, monkeypatch, capsys):
    first = folder / "runs" / name("kd__resnet8__resnet8", 1)
    second = folder / "runs" / name("kd__resnet8__resnet8", 2)
    process = start(folder, *FLAGS, stdout=subprocess.DEVNULL)
    wait_for(first / ".lock")
    process.kill()  # alone: the run that it started goes on without it
    process.wait()
    process = start(folder, *FLAGS, stdout=subprocess.DEVNULL)
    wait_for(second / ".lock")
    os.killpg(process.pid, signal.SIGKILL)  # together with the run that it started
    process.wait()
    wait_for(first / "result.json")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert len(before) == 2 and second / "result.json" not in before

    (folder / "bad.pt").write_bytes(b"no checkpoint")  # and a run that fails stops no other
    methods = ["--methods", "kd --teacher-weights bad.pt", "kd", "--jobs", "2", "--seeds", "2"]
    process = start(folder, *FLAGS, *methods, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 1
    assert out.splitlines()[0] == "1 runs are finished, 2 to do, 2 at a time"
    assert len(out.splitlines()) == 3
    failed, last_line, end = err.splitlines()
    assert failed.startswith("failed: python") and "bad.pt" in failed
    assert last_line.strip().startswith("error: bad.pt")
    assert end == "error: 1 of 3 runs failed: output.txt in a run's folder says more"

    results = sorted(path.parent.name for path in folder.glob("runs/*/result.json"))
    assert results == [first.name, second.name, name("vanilla__resnet8", 1)]
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert (first / "output.txt").read_text().count("epoch   1/2") == 1

    monkeypatch.chdir(folder)
    sweep.main(PLAN, sweep.split(SHARED))
    assert capsys.readouterr().out == "3 runs are finished, 0 to do, 1 at a time\n"


def test_what_follows_the_bar_goes_where_it_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(b"")
    pairs = ("resnet14/resnet8", "resnet20/resnet8")
    args = sweep.Args(methods=("vanilla", "kd", "icd --kd-weight 1"), pairs=pairs, seeds=(1, 2))
    teachers, students = sweep.plan(args, {"--epochs": ["5"], "--lr": ["0.1"]})
    assert [job.args.student for job in teachers] == ["resnet14", "resnet20"]
    assert all((job.args.epochs, job.args.lr, job.args.seed) == (5, 0.05, 1) for job in teachers)  # as load_teacher trains them
    assert [job.args.seed for job in students] == [1] * 5 + [2] * 5  # vanilla once for both pairs
    assert all((job.args.epochs, job.args.lr) == (5, 0.1) for job in students)
    teachers, students = sweep.plan(args, {"--teacher-weights": [str(weights)]})
    assert not teachers
    assert ["--teacher-weights" in job.command for job in students[:3]] == [False, True, True]


@pytest.mark.parametrize(
    ("flags", "shared", "said"),
    [
        (dict(methods=("kdd",)), {}, "no methods/kdd.py"),
        (dict(pairs=("resnet8",)), {}, "--pairs resnet8 is not TEACHER/STUDENT"),
        (dict(pairs=("resnet8/resnet9",)), {}, "--pairs resnet8/resnet9 is not TEACHER/STUDENT"),
        (dict(jobs=0), {}, "--jobs 0 must be at least 1"),
        ({}, {"--epochz": ["3"]}, "none of these methods has --epochz"),
        (dict(methods=("kd --kd-wight 3",)), {}, "--kd-wight"),
    ],
)
def test_bad_flags_start_nothing(tmp_path, monkeypatch, capsys, flags, shared, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        sweep.main(sweep.Args(**flags), shared)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_list_that_nobody_reads_to_its_end():
    command = f"{sys.executable} {ROOT / 'benchmark' / 'sweep.py'} --list --seeds {' '.join(map(str, range(200)))} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_the_whole_benchmark_can_be_listed(tmp_path):
    words = "--seeds 1 --list -- --dataset synthetic --epochs 1".split()
    command = ["bash", str(ROOT / "benchmark" / "full.sh"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert "vanilla.py --student resnet56 --seed 1" in commands[0]  # the teacher of most
    students = [command for command in commands if "--teacher resnet56" in command or "--peer resnet56" in command]
    assert len(students) == len(set(students))
    assert {Path(command.split()[1]).name for command in students} == {p.name for p in ROOT.glob("methods/*.py")} - {"vanilla.py"}
