"""Golden figures: losses and gradients that the published implementations gave on fixed inputs (tests/golden/README.md)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

CASES = {}  # name -> (description, arrays)
for file in "losses", "more_losses":
    arrays = np.load(GOLDEN / f"{file}.npz")
    CASES |= {case["name"]: (case, arrays) for case in json.loads((GOLDEN / f"{file}.json").read_text())["cases"]}


def load(name: str, folder: str = "methods") -> ModuleType:
    """<folder>/<name>.py as a fresh module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Case:
    """A golden case: its `inputs` by name (those with a golden gradient require one), `hyper`, `value`, `outputs`."""

    def __init__(self, name: str):
        case, self.arrays = CASES[name]
        self.hyper, self.value, self.outputs = case["hyper"], case["value"], case["outputs"]
        self.inputs = {key: self.array(place) for key, place in case["inputs"].items()}
        self.grads = {key: self.array(place) if place else None for key, place in (case["grads"] or {}).items()}
        for key in self.grads:
            self.inputs[key].requires_grad_()

    def __getitem__(self, key: str) -> Tensor:
        return self.inputs[key]

    def array(self, key: str) -> Tensor:
        """A golden array: float64, or int64 where it holds labels, indices or permutations."""
        value = self.arrays[key]
        return torch.from_numpy(value.astype(np.int64 if value.dtype.kind in "iu" else np.float64))

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
