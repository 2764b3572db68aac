"""A method run as a user types it, in a process of its own or in this one, or its `main` alone on a few images."""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from golden import ROOT, load
from torch import Tensor, nn

import common

METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
every_method = pytest.mark.parametrize("method", METHODS)
SHARED = ROOT.parent / "shared"
FULL = common.DATASETS["synthetic"](Path(), None)


def only_quickly(*chosen: str) -> Any:
    """All methods; those not chosen are slow."""
    return pytest.mark.parametrize("method", [m if m in chosen else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])


def flags_of(method: str) -> set[str]:
    return {*load(method).Args.__dataclass_fields__}


def run_script(method: str, *words: Any, cwd: Path) -> subprocess.CompletedProcess:
    """`python methods/<method>.py <words>` as a user types it."""
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def few(data: Path, size: int | None) -> common.RawData:
    """The synthetic set cut to 44 training and 20 test images."""
    return FULL._replace(train=tuple(a[:44] for a in FULL.train), test=tuple(a[:20] for a in FULL.test))


class Killed(BaseException):
    """Stands for the end of the process at this point."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line on stderr."""
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err.strip()


class Script:
    """`script("icd", "--epochs 2")` is `python methods/icd.py --epochs 2` in this process and an empty folder.

    The `usual` flags stand before; a word of the call is split at its spaces.
    """

    usual = "--dataset few --device cpu --student resnet8 --batch-size 16"

    def __init__(self, monkeypatch: Any, capfd: Any, folder: Path):
        monkeypatch.chdir(folder)
        monkeypatch.setitem(common.DATASETS, "few", few)
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, method: str, *words: Any) -> Outcome:
        words = [*self.usual.split(), *(part for word in words for part in str(word).split())]
        self.monkeypatch.setattr(sys, "argv", [f"{method}.py", *words])
        self.capfd.readouterr()
        code, handlers = 0, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            runpy.run_path(str(ROOT / "methods" / f"{method}.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        except Killed:
            code = -9
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Outcome(code, *self.capfd.readouterr())

    @contextlib.contextmanager
    def dying(self, after: int | None = None) -> Iterator[list[str]]:
        """Within it, a process ends right after any checkpoint, or that of epoch `after`; gives the names written so far."""
        write, written = common.write_checkpoint, []

        def write_and_die(path, state):
            write(path, state)
            written.append(path.name)
            if after in (None, len(state["rows"])):
                raise Killed

        with self.monkeypatch.context() as patch:
            patch.setattr(common, "SAVE_EVERY", 0)
            patch.setattr(common, "write_checkpoint", write_and_die)
            yield written

    def at_epoch(self, n: int, action: Any) -> Any:
        """Four epochs of vanilla.py; at the end of the n-th, before it is logged, `action` is called."""
        accuracy, calls = common.accuracy, []

        def count(net, images):
            calls.append(net)
            if len(calls) == n:
                action()
            return accuracy(net, images)

        with self.monkeypatch.context() as patch:
            patch.setattr(common, "accuracy", count)
            return self("vanilla", "--epochs 4")

    def interrupted(self, n: int = 3, number: int = signal.SIGINT) -> Outcome:
        """Four epochs of vanilla.py, ended by Ctrl-C or another signal in the n-th."""
        return self.at_epoch(n, lambda: os.kill(os.getpid(), number))


def quick(method: str, teacher: str = "resnet8") -> list[str]:
    """Flags for a short run of a method with the network in teacher.pt; write it with `random_weights`."""
    own = flags_of(method)
    flags = [f"--teacher {teacher} --teacher-weights teacher.pt"] * ("teacher" in own)
    return flags + ["--peer resnet8"] * ("peer" in own) + ["--init-epochs 2"] * ("init_epochs" in own)


def random_weights(file: Path | str, name: str = "resnet8", classes: int = 100, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(common.build(name, classes).state_dict(), file)
    return Path(file)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log of a run without its times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def weights(file: Path) -> np.ndarray:
    """All values of a file of weights in one array."""
    state = torch.load(file, weights_only=True)
    return np.concatenate([value.flatten().double().numpy() for value in state.values()])


def same_end(*runs: str | Path) -> None:
    """The only runs in two --runs directories have the same log and the same weights, bit for bit."""
    (a,), (b,) = (Path(folder).glob("*__*") for folder in runs)
    assert rows(a) == rows(b)
    assert np.array_equal(weights(a / "student.pt"), weights(b / "student.pt"))


def small_data(args: Any, padding: str = "constant", n: int = 0, n_test: int = 100) -> tuple[common.ImageSet, common.ImageSet]:
    """Stands in for load_data: the first n images of the synthetic set, by default two batches and a last one of 4."""
    n = n or 2 * args.batch_size + 4
    train, test = tuple(a[:n] for a in FULL.train), tuple(a[:n_test] for a in FULL.test)
    return common.Resident(train, FULL, args, padding), common.Resident(test, FULL, args, "constant")


@functools.lru_cache(maxsize=1)
def untrained(name: str, classes: int) -> nn.Module:
    """A frozen network of random weights, whose running statistics are unlike their start: a teacher in train mode would show."""
    torch.manual_seed(1000)
    teacher = common.build(name, classes)
    with torch.no_grad():
        teacher(torch.randn(8, 3, 64, 64))
    return teacher.eval().requires_grad_(False)


class Drive:
    """`main` of a method run in this process on a few images, with the teacher untrained and no run folder.

    Afterwards: `student` (what was deployed), `teacher`, `teacher_before`, `trained` (the module of the last phase), `args`,
    `optimizer`, `result`; by phase `phases` (trained), `before` and `after` (its state dicts around the epochs), `schedulers`,
    `rates` (of each epoch); `rows`, one (epoch, train means by name, test, more) for each epoch.
    `before_step(n)` is called before the n-th training step.
    """

    def __init__(self, monkeypatch: Any, method: str, before_step: Any = None, data: Any = small_data, **flags: Any):
        module = load(method)
        drive = self
        self.module, self.rows, self.phases, self.before, self.after, self.steps = module, [], {}, {}, {}, 0
        self.schedulers: dict[str, Any] = {}
        self.rates: dict[str, list[float]] = {}

        class FakeRun:
            def __init__(self, script: str, args: Any):
                common.check(args)
                self.args, self.folder = args, Path()

            def epochs(self, total: int, trained: nn.ModuleDict, optimizer: Any, scheduler: Any, phase: str = ""):
                drive.trained = drive.phases[phase] = trained
                drive.optimizer, drive.schedulers[phase], drive.rates[phase], self.phase = optimizer, scheduler, [], phase
                drive.before[phase] = snapshot(trained)
                yield from range(1, total + 1)
                drive.after[phase] = snapshot(trained)

            def meter(self, total: int) -> common.Meter:
                return common.Meter(total, lambda meter: None)

            def log(self, epoch: int, train: dict[str, float], test: float | None = None, **more: Any) -> None:
                more = {name: torch.as_tensor(value).item() for name, value in more.items()}
                drive.rows.append((epoch, train, test, more))
                drive.rates[self.phase].append(drive.optimizer.param_groups[0]["lr"])

            def finish(self, deployed: nn.Module, teacher: nn.Module | None = None) -> float:
                drive.student = deployed
                return drive.rows[-1][2]

        def fake_teacher(run: Any, test: common.ImageSet) -> nn.Module:
            drive.teacher = deepcopy(untrained(run.args.teacher, test.classes))
            drive.teacher_before = snapshot(drive.teacher)
            return drive.teacher

        def counted(step: Any) -> Any:
            def call(*tensors: Tensor) -> dict[str, Tensor]:
                drive.steps += 1
                if before_step is not None:
                    before_step(drive.steps)
                return self.call_step(step, tensors)

            return call

        monkeypatch.setattr(module, "Run", FakeRun)
        monkeypatch.setattr(module, "load_data", data)
        monkeypatch.setattr(module, "cuda_graph", counted)
        if hasattr(module, "load_teacher"):
            monkeypatch.setattr(module, "load_teacher", fake_teacher)
        usual = dict(student="resnet8", dataset="synthetic", device="cpu", epochs=1, batch_size=16)
        own = module.Args.__dataclass_fields__
        usual |= {flag: value for flag, value in dict(teacher="resnet14", init_epochs=1).items() if flag in own}
        self.args = module.Args(**usual | flags)
        self.result = module.main(self.args)

    def call_step(self, step: Any, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return step(*tensors)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
