"""Many runs: methods x pairs x seeds, as the very commands a user would type, several at a time.

    python benchmark/sweep.py --methods vanilla kd icd 'icd --kd-weight 1' --pairs resnet56/resnet20 --seeds 1 2 3 --jobs 2
    python benchmark/sweep.py --methods kd icd --pairs resnet20/resnet8 -- --epochs 5 --device cpu

A flag after the lone -- goes to every command whose script has it. Teachers come first: the commands that load_teacher would
start by itself. Then come all methods and pairs with the first seed, with the second, and so on. A finished run is skipped,
a broken one goes on from its last checkpoint, one that another process works on is waited for: kill the sweep whenever you
like and start it again, or start it twice. What a run prints lies in its folder, in output.txt. A run that fails stops no
other; all that failed are listed at the end with their last line, and the exit code is 1.

--list prints the commands one a line, for xargs, GNU parallel, or a Slurm job array, where each task does

    sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | bash
"""

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import NETWORKS, ROOT, check, clock, fail, in_use, resolve, run_folder

Flags = dict[str, list[str]]  # a command's flags with the words that follow them


@dataclass
class Args:
    methods: tuple[str, ...] = ("vanilla", "kd", "kd --ce-weight 1 --kd-weight 1", "icd", "icd --kd-weight 1")
    """files in methods/, each alone or in quotes with flags of its own"""
    pairs: tuple[str, ...] = ("resnet56/resnet20",)
    """teacher/student, names in common.NETWORKS"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the students; a teacher always has seed 1"""
    jobs: int = 1
    """runs at the same time; on a CPU they share its cores evenly"""
    list: bool = False
    """print the commands and run nothing"""


@dataclass
class Job:
    """One run: its command, its settings, its folder."""

    command: list[str]
    args: Any
    folder: Path

    def __str__(self) -> str:
        return shlex.join(self.command)

    def result(self) -> dict[str, Any] | None:
        """What the finished run has recorded; None if it is not finished."""
        file = self.folder / "result.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            fail(f"{file} is damaged: delete the folder to start this run again")

    def start(self, environment: dict[str, str]) -> subprocess.Popen:
        """Begin the run or go on with it; what it prints is added to output.txt in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "output.txt", "a") as output:
            command = [sys.executable, *self.command[1:]]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)

    def last_line(self) -> str:
        return ([line for line in (self.folder / "output.txt").read_text().splitlines() if line.strip()] or ["no output"])[-1]


def split(words: list[str]) -> Flags:
    """--epochs 5 --device cpu as {"--epochs": ["5"], "--device": ["cpu"]}."""
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag.replace("_", "-")] = [value] if equals else []
        elif flags:
            flags[list(flags)[-1]].append(word)
        else:
            fail(f"{word} follows no flag", 2)
    return flags


def arguments(method: str) -> type:
    """The Args of methods/<method>.py."""
    if not (ROOT / "methods" / f"{method}.py").exists():
        known = ", ".join(sorted(path.stem for path in (ROOT / "methods").glob("*.py")))
        fail(f"no methods/{method}.py: take one of {known}", 2)
    return importlib.import_module(f"methods.{method}").Args


def job(method: str, flags: Flags) -> Job:
    """The run that `python methods/<method>.py <flags>` makes."""
    script = os.path.relpath(ROOT / "methods" / f"{method}.py")
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    args = tyro.cli(arguments(method), args=words, prog=script)
    resolve(args)
    return Job(["python", script, *words], args, run_folder(method, args))


def plan(args: Args, shared: Flags) -> list[list[Job]]:
    """All jobs in two stages, none twice: the teachers that load_teacher would have to train, then the students."""
    students = {}
    unused = set(shared)
    for seed in args.seeds:
        for pair in args.pairs:
            teacher, _, student = pair.partition("/")
            for words in args.methods:
                method, *own = shlex.split(words)
                has = {f"--{field.name.replace('_', '-')}" for field in fields(arguments(method))}
                flags = {role: [teacher] for role in ("--teacher", "--peer") if role in has} | {"--student": [student]}
                flags |= split(own) | {"--seed": [str(seed)]} | {flag: shared[flag] for flag in shared if flag in has}
                run = job(method, flags)
                students[str(run)] = run
                unused -= has
    if unused:
        fail(f"none of these methods has {', '.join(sorted(unused))}", 2)
    teachers = {}
    place = {flag: shared[flag] for flag in ("--dataset", "--data", "--runs", "--device") if flag in shared}
    schedule = {flag: shared[flag] for flag in ("--epochs", "--batch-size", "--milestones") if flag in shared}
    for name in dict.fromkeys(run.args.teacher for run in students.values() if getattr(run.args, "teacher_weights", "") is None):
        best = job("vanilla", {"--student": [name], "--seed": ["1"]} | place)
        shipped = ROOT / "teachers" / best.args.dataset / f"{name}.pt"
        if not shipped.exists() and best.result() is None:
            run = job("vanilla", {"--student": [name], "--seed": ["1"]} | place | schedule)
            teachers[run.folder] = run
    return [list(teachers.values()), [run for run in students.values() if run.folder not in teachers]]


def sweep(stages: list[list[Job]], at_once: int) -> list[Job]:
    """Run what is not finished, one stage after the other; gives the jobs that failed."""
    environment = dict(os.environ)
    if at_once > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // at_once)))
    todo = [[run for run in stage if run.result() is None] for stage in stages]
    total, begin = sum(map(len, todo)), time.monotonic()
    print(f"{sum(map(len, stages)) - total} runs are finished, {total} to do, {at_once} at a time", flush=True)
    done, failed = 0, []
    for waiting in todo:
        running: list[tuple[subprocess.Popen, Job]] = []
        while waiting or running:
            free = next((run for run in waiting if not in_use(run.folder)), None) if len(running) < at_once else None
            if free:
                waiting.remove(free)
                running.append((free.start(environment), free))
            ended = [(process, run) for process, run in running if process.poll() is not None]
            for process, run in ended:
                running.remove((process, run))
                result = run.result()
                if result is None and in_use(run.folder):  # another process was faster
                    waiting.append(run)
                    continue
                done += 1
                left = clock((time.monotonic() - begin) / done * (total - done))
                if result is None:
                    failed.append(run)
                    print(f"{done}/{total}  failed, exit code {process.returncode}  {run}  left {left}", flush=True)
                else:
                    numbers = f"last {result['last']:.2f} %  best {result['best']:.2f} %  {clock(result['seconds'])}"
                    print(f"{done}/{total}  {numbers}  {run}  left {left}", flush=True)
            if not free and not ended:
                time.sleep(0.2)
    return failed


def main(args: Args, shared: Flags) -> None:
    if wrong := [pair for pair in args.pairs if pair.count("/") != 1 or not {*pair.split("/")} <= NETWORKS.keys()]:
        fail(f"--pairs {wrong[0]} is not TEACHER/STUDENT: take two of {', '.join(NETWORKS)}", 2)
    if args.jobs < 1:
        fail(f"--jobs {args.jobs} must be at least 1", 2)
    stages = plan(args, shared)
    runs = [run for stage in stages for run in stage]
    if args.list:
        try:
            print("\n".join(map(str, runs)), flush=True)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    for run in runs:
        check(run.args)
    failed = sweep(stages, args.jobs)
    for run in failed:
        print(f"failed: {run}\n        {run.last_line()}", file=sys.stderr)
    if failed:
        fail(f"{len(failed)} of {len(runs)} runs failed: output.txt in a run's folder says more")


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    bar = words.index("--")
    try:
        main(tyro.cli(Args, description=__doc__, args=words[:bar]), split(words[bar + 1 : -1]))
    except KeyboardInterrupt:
        fail("interrupted: continue with the same command", 130)
