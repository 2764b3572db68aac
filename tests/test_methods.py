"""What holds for every method: the repeated part, a script that runs, a frozen teacher, nothing forgotten, nothing hidden."""

import ast
import gc
import inspect
import json
import random

import harness
import numpy as np
import pytest
import torch
from harness import METHODS, ROOT, Drive, common, load, run_script, same, small_data

SOURCES = {method: (ROOT / "methods" / f"{method}.py").read_text() for method in METHODS}
SHARED = "student dataset data runs seed device teacher_weights epochs batch_size lr milestones weight_decay".split()

# Parameters that stay where they are in one step, by design: {method: {phase: names or prefixes}}
STILL: dict[str, dict[str, tuple[str, ...]]] = {
    "icd": {"": ("icd.bias",)},  # a constant added to all logits changes no softmax
    "dual_aug": {"": ("icd.bias",)},
    "ab": {"init": ("student.fc",)},  # the first stage trains up to the last map
    "fsp": {"init": ("student.fc",)},
}

# The pairs of RepDistiller's table
PAIRS = [
    *(("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"), ("resnet110", "resnet20")),
    *(("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("vgg13", "mobilenetv2")),
    *(("resnet50", "mobilenetv2"), ("resnet50", "vgg8"), ("resnet32x4", "shufflenetv1"), ("resnet32x4", "shufflenetv2")),
    ("wrn_40_2", "shufflenetv1"),
]


def fields(method):
    """{field: (default as text, docstring)} of Args."""
    body = next(node for node in ast.parse(SOURCES[method]).body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    found = {}
    for place, node in enumerate(body):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            following = body[place + 1] if place + 1 < len(body) else None
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[node.target.id] = (ast.unparse(node), following.value.value if documented else None)
    return found


def main_of(method):
    return next(node for node in ast.parse(SOURCES[method]).body if isinstance(node, ast.FunctionDef) and node.name == "main")


class Normal(ast.NodeTransformer):
    """Takes out what may differ between two copies: what is logged besides, and what is wrapped around the batches."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "run.log":
            node.keywords = []
        return node

    def visit_comprehension(self, node):
        if "train.epoch(" in ast.unparse(node.iter):
            node.iter = ast.parse("train.epoch(epoch)", mode="eval").body
        return node


def epoch_loop(method):
    """`main` from its last epoch loop on, as text."""
    body = main_of(method).body
    start = max(place for place, node in enumerate(body) if isinstance(node, ast.For) and "run.epochs(" in ast.unparse(node.iter))
    return "\n".join(ast.unparse(Normal().visit(node)) for node in body[start:])


@pytest.mark.parametrize("method", METHODS)
def test_the_epoch_loop_is_the_same_text(method):
    expected = epoch_loop("icd")
    if "teacher" not in fields(method):
        expected = expected.replace("run.finish(student, teacher)", "run.finish(student)")
    assert epoch_loop(method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_guard_and_import_lines_are_the_same(method):
    lines = SOURCES[method].splitlines()
    assert lines[-2:] == ['if __name__ == "__main__":', "    main(tyro.cli(Args, description=__doc__))"]
    assert lines.count("sys.path.insert(1, str(Path(__file__).resolve().parents[1]))") == 1
    first = [ast.unparse(node) for node in main_of(method).body]
    assert "run = Run(__file__, args)" in first
    assert any(line.startswith("train, test = load_data(args") for line in first)
    for node in ast.walk(ast.parse(SOURCES[method])):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not {"methods", *METHODS} & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_shared_flags_are_the_same_and_every_flag_has_a_docstring(method):
    own, model = fields(method), fields("icd")
    assert all(text for _, text in own.values()), [name for name, (_, text) in own.items() if not text]
    expected = [name for name in SHARED if name != "teacher_weights" or "teacher" in own]
    assert [name for name in own if name in SHARED] == expected
    other_recipe = ("epochs", "batch_size", "lr", "milestones") if method.startswith("ie_") else ()
    for name in expected:
        if method != "vanilla" and name not in other_recipe:
            assert own[name] == model[name], name
        assert own[name][0].split("=")[0] == model[name][0].split("=")[0], name


@pytest.mark.parametrize("method", METHODS)
def test_the_head_names_paper_differences_and_command(method):
    head = ast.get_docstring(ast.parse(SOURCES[method]))
    assert f"python methods/{method}.py --" in head
    assert "Differences" in head
    assert "- from" in head
    assert method == "vanilla" or "arXiv" in head
    assert SOURCES[method].count("\n") <= 220
    module = load(method)
    own = [item for _, item in inspect.getmembers(module, inspect.isfunction) if item.__module__ == method]
    assert all(item.__doc__ for item in own if item is not module.main)


@pytest.mark.parametrize("method", METHODS)
def test_help(method, tmp_path):
    done = run_script(method, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--milestones" in done.stdout
    assert not list(tmp_path.iterdir())


def still(method, phase, name):
    return any(name.startswith(prefix) for prefix in STILL.get(method, {}).get(phase, ()))


@pytest.mark.parametrize("method", METHODS)
def test_everything_trained_moves_and_the_teacher_does_not(method, monkeypatch):
    drive = Drive(monkeypatch, method)
    for phase, trained in drive.phases.items():
        learnable = [name for name, _ in trained.named_parameters()]
        for name in learnable:
            moved = (drive.before[phase][name] - drive.after[phase][name]).abs().max().item()
            assert moved < 1e-6 if still(method, phase, name) else moved > 0, (phase, name, moved)
        assert all(value.isfinite().all() for value in drive.after[phase].values() if value.is_floating_point())
    if hasattr(drive, "teacher"):
        assert same(drive.teacher_before, {name: value for name, value in drive.teacher.state_dict().items()})
        assert not drive.teacher.training
        assert all(p.grad is None for p in drive.teacher.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_its_arguments_only(method, monkeypatch):
    def reseed(with_seed):
        def before_step(n):
            torch.manual_seed(with_seed + n)
            np.random.seed(with_seed + n)  # noqa: NPY002, the state that a careless step would read
            random.seed(with_seed + n)

        return before_step

    first = Drive(monkeypatch, method, before_step=reseed(0))
    second = Drive(monkeypatch, method, before_step=reseed(100))
    assert first.steps == second.steps > 0
    for phase in first.phases:
        assert same(first.after[phase], second.after[phase]), phase


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_behind_on_the_cpu(method, monkeypatch):
    """All on PyTorch's "meta" device, whose tensors have no values: most operations refuse to mix them with those of a CPU."""

    def load_for_meta(name):
        module = load(name)
        monkeypatch.setattr(module, "SGD", lambda *args, fused, **more: torch.optim.SGD(*args, **more))  # no fused one there
        monkeypatch.setattr(module, "accuracy", lambda net, images: 0.0)
        return module

    def zeros_for_meta(name, value):
        true = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *args: value(x) if x.is_meta else true(x, *args))

    zeros_for_meta("tolist", lambda x: torch.zeros(x.shape, dtype=x.dtype, device="cpu").tolist())
    zeros_for_meta("item", lambda x: 0.0)
    zeros_for_meta("__int__", lambda x: 0)
    zeros_for_meta("bincount", lambda x: torch.zeros(100, dtype=torch.int64, device="meta"))

    class Generator(torch.Generator):  # it has none of its own
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    rand = torch.rand
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, **more: rand(*shape, **more))
    monkeypatch.setattr(harness, "load", load_for_meta)
    monkeypatch.setattr(harness, "untrained", lambda name, classes: common.build(name, classes, "meta").eval())
    monkeypatch.setattr(common, "check", lambda args: None)
    drive = Drive(monkeypatch, method, device="meta")
    assert drive.steps > 0
    assert all(value.is_meta for value in drive.trained.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
def test_runs_as_a_user_types_it(method, synthetic_teacher, tmp_path):
    flags = ["--student", "resnet8", "--dataset", "synthetic", "--epochs", "3", "--device", "cpu", "--runs", str(tmp_path)]
    own = fields(method)
    if "teacher" in own:
        flags += ["--teacher", "resnet8", "--teacher-weights", str(synthetic_teacher)]
    if "peer" in own:
        flags += ["--peer", "resnet8"]
    if "init_epochs" in own:
        flags += ["--init-epochs", "1"]
    done = run_script(method, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    files = {"args.json", "checkpoint.pt", "common.py", f"{method}.py", "log.jsonl", "result.json", "student.pt"}
    assert files <= {path.name for path in folder.iterdir()}
    result = json.loads((folder / "result.json").read_text())
    assert result["last"] >= 8, result["last"]  # chance is 1 %
    again = run_script(method, *flags, cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def four_images(args, padding="constant"):
    return small_data(args, padding, n=4, n_test=4)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_method_takes_a_step_with_every_pair(teacher, student, monkeypatch):
    for method in METHODS:
        flags = {"student": student, "batch_size": 4, "data": four_images}
        flags |= {"teacher": teacher} if "teacher" in fields(method) else {}
        flags |= {"peer": "resnet8"} if "peer" in fields(method) else {}
        with monkeypatch.context() as patched:  # its end frees the networks
            if method == "fsp" and not equal_channels(teacher, student):
                with pytest.raises(SystemExit) as stopped:
                    Drive(patched, method, **flags)
                assert stopped.value.code == 2
                continue
            drive = Drive(patched, method, **flags)
            assert drive.steps == len(drive.phases)
            assert all(value.isfinite().all() for value in drive.after[""].values() if value.is_floating_point()), method
        del drive
        gc.collect()  # networks of up to 130 million parameters, held by the cycle of module and drive


def equal_channels(teacher, student):
    a, b = ([shape[0] for shape in common.shapes(common.build(name, 100)).maps] for name in (teacher, student))
    return a == b


@pytest.mark.real
@pytest.mark.skipif(not (ROOT / "data" / "cifar-100-binary").is_dir(), reason="no CIFAR-100 in data/")
def test_learns_the_real_cifar100(tmp_path):
    flags = ["--student", "resnet8", "--epochs", "1", "--batch-size", "256", "--device", "cpu", "--data", str(ROOT / "data")]
    done = run_script("vanilla", *flags, "--runs", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["last"] > 3  # chance is 1 %
