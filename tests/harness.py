"""What several test files need: golden cases, methods as modules, and one method's `main` run for a few steps in this process."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))
import common

LOSSES = {case["name"]: case for case in json.loads((GOLDEN / "losses.json").read_text())["cases"]}
LOSS_ARRAYS = np.load(GOLDEN / "losses.npz")


def load(name: str, folder: str = "methods") -> ModuleType:
    """<folder>/<name>.py as a fresh module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def array(key: str) -> Tensor:
    """A golden array: float64, or int64 where it holds labels, indices or permutations."""
    value = LOSS_ARRAYS[key]
    return torch.from_numpy(value.astype(np.int64 if value.dtype.kind in "iu" else np.float64))


class Case:
    """A golden case: its `inputs` by name (those with a golden gradient require one), `hyper`, `value`, `outputs`."""

    def __init__(self, name: str):
        case = LOSSES[name]
        self.hyper, self.value, self.outputs = case["hyper"], case["value"], case["outputs"]
        self.inputs = {key: array(place) for key, place in case["inputs"].items()}
        self.grads = {key: array(place) if place else None for key, place in (case["grads"] or {}).items()}
        for key in self.grads:
            self.inputs[key].requires_grad_()

    def __getitem__(self, key: str) -> Tensor:
        return self.inputs[key]

    def fill(self, module: nn.Module, names: dict[str, str]) -> nn.Module:
        """Set parameters of `module` (made float64) to inputs, {parameter name: input name}; `check` looks at their gradients."""
        module.double()
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for own, key in names.items():
                parameters[own].copy_(self.inputs[key].reshape(parameters[own].shape))
                self.inputs[key] = parameters[own]
        return module

    def check(self, value: Tensor, no_gradient: tuple[str, ...] = ()) -> None:
        """`value` is the golden one to 1e-9, its gradients the golden ones to 1e-8 of their norm.

        `no_gradient` names the inputs whose golden gradient is zero but for rounding, by design.
        """
        assert abs(value.item() - self.value) <= 1e-9 * abs(self.value), (value.item(), self.value)
        value.backward()
        for key, golden in self.grads.items():
            own = self.inputs[key].grad
            if golden is None or key in no_gradient:
                assert own is None or own.abs().max() < 1e-12, key
                continue
            error = (own.reshape(golden.shape) - golden).norm()
            assert error <= 1e-8 * golden.norm(), (key, error / golden.norm())


def run_script(*words: str, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python methods/<words[0]>.py <the other words>` as a user types it."""
    command = [sys.executable, str(ROOT / "methods" / f"{words[0]}.py"), *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env)


SYNTHETIC = functools.cache(lambda: common.synthetic(Path()))


def small_data(args: Any, padding: str = "constant", n: int = 0, n_test: int = 100) -> tuple[common.Images, common.Images]:
    """Stands in for load_data: the first n images of the synthetic set, by default two batches and a last one of 4."""
    raw = SYNTHETIC()
    n = n or 2 * args.batch_size + 4
    train, test = (raw.train[0][:n], raw.train[1][:n]), (raw.test[0][:n_test], raw.test[1][:n_test])
    return common.Images(*train, raw, args, padding), common.Images(*test, raw, args)


@functools.lru_cache(maxsize=1)
def untrained(name: str, classes: int) -> nn.Module:
    """A frozen network of random weights, whose running statistics are unlike their start: a teacher in train mode would show."""
    torch.manual_seed(1000)
    teacher = common.build(name, classes)
    with torch.no_grad():
        teacher(torch.randn(8, 3, 32, 32))
    return teacher.eval().requires_grad_(False)


class Drive:
    """`main` of a method run in this process on a few images, with the teacher untrained and no run folder.

    Afterwards: `student`, `teacher`, `trained` (the module of the last phase), `phases` {name: trained}, `before` and `after`
    (state dicts of `trained` of each phase around its epochs), `teacher_before`, `rows`, `args`.
    `before_step(n)` is called before the n-th training step.
    """

    def __init__(self, monkeypatch: Any, method: str, before_step: Any = None, data: Any = small_data, **flags: Any):
        module = load(method)
        drive = self
        self.module, self.rows, self.phases, self.before, self.after, self.steps = module, [], {}, {}, {}, 0

        class FakeRun:
            def __init__(self, script: str, args: Any):
                common.resolve(args)
                common.check(args)
                self.folder = Path()

            def epochs(self, total: int, trained: nn.Module, optimizer: Any, schedule: Any, phase: str = ""):
                drive.trained = drive.phases[phase] = trained
                drive.optimizer = optimizer
                drive.before[phase] = snapshot(trained)
                yield from range(1, total + 1)
                drive.after[phase] = snapshot(trained)

            def log(self, epoch: int, means: Tensor, test: float | None, schedule: Any, **more: Any) -> None:
                more = {name: torch.as_tensor(value).item() for name, value in more.items()}
                drive.rows.append((epoch, means.tolist(), test, more))

            def finish(self, student: nn.Module, teacher: nn.Module | None = None) -> float:
                drive.student = student
                return drive.rows[-1][2]

        def fake_teacher(args: Any, test: common.Images) -> nn.Module:
            teacher = untrained(args.teacher, test.classes)
            drive.teacher, drive.teacher_before = teacher, snapshot(teacher)
            return teacher

        def counted(step: Any) -> Any:
            def call(*tensors: Tensor) -> Tensor:
                drive.steps += 1
                if before_step is not None:
                    before_step(drive.steps)
                return step(*tensors)

            return call

        monkeypatch.setattr(module, "Run", FakeRun)
        monkeypatch.setattr(module, "load_data", data)
        monkeypatch.setattr(module, "graphed", counted)
        if hasattr(module, "load_teacher"):
            monkeypatch.setattr(module, "load_teacher", fake_teacher)
        flags = dict(student="resnet8", dataset="synthetic", device="cpu", epochs=1, batch_size=16) | flags
        if hasattr(module.Args, "teacher"):
            flags = {"teacher": "resnet14"} | flags
        if hasattr(module.Args, "init_epochs"):
            flags = {"init_epochs": 1} | flags
        self.args = module.Args(**flags)
        self.result = module.main(self.args)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
