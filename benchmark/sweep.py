"""Many runs: methods x pairs x seeds, as the commands that a user would type, several at a time.

    python benchmark/sweep.py --methods vanilla kd icd 'icd --kd-weight 1' --pairs resnet56/resnet20 --seeds 1 2 3
    python benchmark/sweep.py --methods kd dkd --devices cuda:0 cuda:1 --jobs 2 -- --epochs 5        # four at a time

Flags after the lone -- go to every command whose script has them. All methods and pairs come with the first seed, then with the
second, and so on. The first run that misses a teacher trains it, the others wait. A finished run prints its result and ends at
once, an unfinished one continues: stop the sweep whenever you like and start it again. A run that fails stops no other.

--list prints the commands, one per line, for xargs, GNU parallel, or a Slurm job array, where each task does

    sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | bash
"""

import ast
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean
from subprocess import DEVNULL, Popen

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    methods: tuple[str, ...] = ("vanilla", "kd", "kd --ce-weight 1 --kd-weight 1", "icd", "icd --kd-weight 1")
    """files in methods/, each alone or in quotes with flags of its own"""
    pairs: tuple[str, ...] = ("resnet56/resnet20",)
    """teacher/student"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the students"""
    devices: tuple[str, ...] = ()
    """devices to spread the runs over, such as cuda:0 cuda:1; by default each run chooses its own"""
    jobs: int = 1
    """runs at a time, per device"""
    logs: Path = Path("runs/logs")
    """folder for what the runs print, one file per command"""
    list: bool = False
    """print the commands and run nothing"""


def fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def flags_of(method: str) -> set[str]:
    """The flags of methods/<method>.py, from its text, as importing it loads PyTorch; none if there is no such file."""
    flags: dict[str, set[str]] = {}
    for file in ROOT / "common.py", ROOT / "methods" / f"{method}.py":
        for node in ast.parse(file.read_text("utf-8")).body if file.exists() else []:
            if isinstance(node, ast.ClassDef):
                own = {"--" + item.target.id.replace("_", "-") for item in node.body if isinstance(item, ast.AnnAssign)}
                flags[node.name] = own.union(*(flags.get(base.id, ()) for base in node.bases if isinstance(base, ast.Name)))
    return flags.get("Args", set())


def commands(args: Args, shared: list[list[str]]) -> list[list[str]]:
    """The commands, each once. A later flag overrides an earlier one."""
    known = {words: flags_of(words.split()[0]) for words in args.methods}
    for flag in {flag.replace("--no-", "--") for flag, *_ in shared}.difference(*known.values()):
        if not any(flag in flags_of(file.stem) for file in (ROOT / "methods").glob("*.py")):
            fail(f"no method has {flag}", 2)
    found = []
    for seed in args.seeds:
        for teacher, _, student in [pair.partition("/") for pair in args.pairs]:
            for words, has in known.items():
                method, *own = shlex.split(words)
                teaching = [word for role in ("--teacher", "--peer") if role in has for word in (role, teacher)]
                more = [word for flag, *values in shared if flag.replace("--no-", "--") in has for word in (flag, *values)]
                script = os.path.relpath(ROOT / "methods" / f"{method}.py")
                found.append(["python", script, *teaching, "--student", student, *own, "--seed", str(seed), *more])
    return [command for place, command in enumerate(found) if command not in found[:place]]


def last_line(file: Path) -> str:
    """What a run said last; of the box in which tyro explains a bad flag, the first line."""
    text = file.read_text("utf-8", "replace")
    return (re.findall("│ (.*?) +│", text)[:1] or [line for line in text.splitlines() if line.strip()] or ["no output"])[-1]


def sweep(todo: list[list[str]], slots: list[str], logs: Path) -> list[str]:
    """Run the commands, one at a time per slot, which is a device or ""; return those that failed, with their last line."""
    stopped: list[int] = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: stopped.append(number))
    env = ({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(slots)))} if len(slots) > 1 else {}) | dict(os.environ)
    waiting, running, seconds, failed = list(todo), {}, [], []
    try:
        while (waiting or running) and not stopped:
            while waiting and slots:
                command, device = waiting.pop(0), slots.pop(0)
                name = " ".join([Path(command[1]).stem, *command[2:]])
                file = logs / (re.sub(r"[^\w.,-]+", "_", name)[:200] + ".txt")
                with open(file, "w") as output:
                    words = [sys.executable, *command[1:], *(["--device", device] if device else [])]
                    process = Popen(words, env=env, stdin=DEVNULL, stdout=output, stderr=output, process_group=0)
                    running[process] = command, device, file, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                command, device, file, began = running.pop(process)
                slots.append(device)
                seconds.append(time.monotonic() - began)
                said = f"FAILED {shlex.join(command)}: " * (process.returncode != 0) + last_line(file)
                failed += [said] if process.returncode else []
                usual = mean(value for value in seconds if value >= max(seconds) / 10)  # without those finished earlier
                left = usual * -((len(seconds) - len(todo)) // (len(slots) + len(running)))  # rounds up
                print(f"{len(seconds)}/{len(todo)}  {said}  left {timedelta(seconds=round(left))}", flush=True)
            time.sleep(0.1)
    finally:  # also where printing fails
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if stopped:
        fail(f"interrupted: {len(seconds)} of {len(todo)} runs have ended; continue with the same command", 128 + stopped[0])
    return failed


def main(args: Args, shared: list[list[str]]) -> None:
    slots = list(args.devices or [""]) * args.jobs
    if not slots:
        fail(f"--jobs {args.jobs} must be at least 1", 2)
    todo = commands(args, shared)
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
        return print("\n".join(map(shlex.join, todo)))
    args.logs.mkdir(parents=True, exist_ok=True)
    print(f"{len(todo)} runs, {len(slots)} at a time; what they print is in {args.logs}", flush=True)
    if failed := sweep(todo, slots, args.logs):
        print("\n".join(failed), file=sys.stderr)
        fail(f"{len(failed)} of {len(todo)} runs failed", 1)


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    bar = words.index("--")
    shared = [shlex.split(flag) for flag in re.split(" (?=--)", shlex.join(words[bar + 1 : -1])) if flag]
    try:
        main(tyro.cli(Args, description=__doc__, args=words[:bar]), shared)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", 1)
