"""What holds for every method: the repeated text, a script that runs, a frozen teacher, nothing forgotten, nothing hidden."""

import ast
import difflib
import gc
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import running
import torch
from golden import GOLDEN, ROOT, load
from PIL import Image
from running import (
    FULL,
    METHODS,
    Drive,
    Script,
    common,
    every_method,
    flags_of,
    only_quickly,
    quick,
    random_weights,
    run_script,
    same,
    same_end,
    small_data,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCES = {method: (ROOT / "methods" / f"{method}.py").read_text() for method in METHODS}
RECIPE = "student epochs batch_size lr milestones momentum weight_decay".split()

# Parameters that stay where they are in one step, by design: {method: {phase: prefixes}}
STILL: dict[str, dict[str, tuple[str, ...]]] = {
    "icd": {"": ("icd.bias",)},  # a constant added to all logits changes no softmax
    "dual_aug": {"": ("icd.bias",)},
    "ab": {"init": ("student.fc",)},  # phase 1 trains up to the last map
    "fsp": {"init": ("student.fc",)},
    "cat_kd": {"": ("student.fc.bias",)},  # left out, as the teacher's is
    "rrd": {"": ("rrd.project_t",)},  # random and fixed
    "simkd": {"": ("student.fc",)},  # the teacher's classifier takes its place
}

# Methods that compare stage by stage, or need what some networks lack; they refuse other pairs
MAY_REFUSE = {"fsp", "ofd"}

PAIRS = [  # of RepDistiller's table
    *(("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"), ("resnet110", "resnet20")),
    *(("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("vgg13", "mobilenetv2")),
    *(("resnet50", "mobilenetv2"), ("resnet50", "vgg8"), ("resnet32x4", "shufflenetv1"), ("resnet32x4", "shufflenetv2")),
    ("wrn_40_2", "shufflenetv1"),
]

# Text


def functions(method):
    return {node.name: node for node in ast.walk(ast.parse(SOURCES[method])) if isinstance(node, ast.FunctionDef)}


def text(method, function):
    return ast.get_source_segment(SOURCES[method], functions(method)[function]) if function in functions(method) else None


@every_method
def test_repeated_parts_are_the_same_text(method):
    assert text(method, "kd_loss") in (None, text("kd", "kd_loss"))
    lines, model = SOURCES[method].splitlines(), SOURCES["icd"].splitlines()
    assert lines[-2:] == model[-2:]
    assert [line for line in model if line.startswith("sys.path")] == [line for line in lines if line.startswith("sys.path")]
    main = text(method, "main").splitlines()
    for line in text("icd", "main").splitlines():
        if re.search(r"run = Run\(|manual_seed|student = build|MultiStepLR|@cuda|teacher = load", line):
            assert line in main or ("teacher" in line and "teacher" not in flags_of(method)), line
    step = [line.strip() for line in text(method, "step").splitlines()]
    if method != "ie_dml":  # two networks, two turns
        end = step.index("optimizer.zero_grad()")
        assert step[end : end + 3] == ["optimizer.zero_grad()", "loss.backward()", "optimizer.step()"]
        assert any(line.startswith("return dict(") for line in step[end + 3 : end + 5])
    assert not [name for name in re.findall(r"^\s*(?:from|import) (\w+)", SOURCES[method], re.M) if name in METHODS]


def loop(method):
    """The loop of the last phase: what may differ is left out (views, arguments of step, what is logged and deployed)."""
    main = text(method, "main")
    lines = main[main.rindex("    for epoch in run.epochs(") :].splitlines()
    lines = [re.sub(r"for [\w, ]+, index in train\.epoch\(epoch(, views=2)?\)", "for BATCH", line) for line in lines]
    lines = [re.sub(r"step\(.*?\), len", "STEP, len", line) for line in lines]
    lines = [re.sub(r"(run.finish|run.log)\(.*\)", r"\1()", line) for line in lines]
    return re.sub(r"run\.log\([^\n]*\n.*?\n        \)\n", "run.log()\n", "\n".join(lines), flags=re.S).splitlines()


@every_method
def test_the_loop_is_the_same_text_but_for_one_line(method):
    difference = [line for line in difflib.ndiff(loop("icd"), loop(method)) if line[0] in "+-"]
    assert all(line[0] == "+" for line in difference), difference
    assert len(difference) <= (2 if method == "dual_aug" else 1), difference  # two pictures, two augmentations


@every_method
def test_head_and_length(method):
    source = SOURCES[method]
    head = ast.get_docstring(ast.parse(source)).splitlines()
    assert len(head) <= 25 and "arXiv" in "\n".join(head)
    assert "Eq." not in source
    assert len(source.splitlines()) <= (220 if source.count("run.epochs(") > 1 else 190)
    if method != "vanilla":
        assert re.search(r"[12]\d{3}", " ".join(head[:2]))  # the year
        bullets = [line for line in head[head.index("Differences") :] if line.startswith("- ")]
        assert 1 <= len(bullets) <= 5


@every_method
def test_flags(method):
    """The recipe stands in the file with its values, inherited help is not repeated, a flag of its own has one line of help."""
    body = next(node for node in ast.parse(SOURCES[method]).body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    inherited = {*common.DistillArgs.__dataclass_fields__}
    own = [(node, after) for node, after in zip(body, [*body[1:], None]) if isinstance(node, ast.AnnAssign)]
    assert {*RECIPE} <= {node.target.id for node, _ in own if node.value is not None}
    for node, after in own:
        documented, name = isinstance(after, ast.Expr), node.target.id
        assert not documented or "\n" not in after.value.value
        if name in ("lr", "milestones"):  # the inherited help tells the usual ones
            usual, here = (re.findall(rf"^    {name} = .*", SOURCES[m], re.M) for m in ("icd", method))
            assert documented == (here != usual), name
        else:
            assert documented == (name not in inherited), name


@every_method
def test_help(method, monkeypatch, capfd, tmp_path):
    shown = Script(monkeypatch, capfd, tmp_path)(method, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"--{flag.replace('_', '-')}" in shown.out for flag in flags_of(method))
    assert not list(tmp_path.iterdir())


# Steps


def reseed(offset):
    """For Drive: before each step, put all of the process's random states where `offset` says."""

    def before_step(n):
        torch.manual_seed(offset + n)
        np.random.seed(offset + n)  # noqa: NPY002, the state that a careless step would read
        random.seed(offset + n)

    return before_step


@every_method
def test_all_that_is_trained_moves_the_teacher_does_not_and_a_step_reads_only_its_arguments(method, monkeypatch):
    drive, again = (Drive(monkeypatch, method, before_step=reseed(offset), batch_size=8) for offset in (0, 100))
    assert drive.steps == again.steps == 3 * len(drive.phases)
    assert drive.rows == again.rows
    for phase, trained in drive.phases.items():
        still = STILL.get(method, {}).get(phase, ("nothing",))
        for name, _ in trained.named_parameters():
            moved = (drive.before[phase][name] - drive.after[phase][name]).abs().max().item()
            assert moved < 1e-6 if name.startswith(still) else moved > 0, (phase, name, moved)
        assert all(value.isfinite().all() for value in drive.after[phase].values())
        assert same(drive.after[phase], again.after[phase]), phase
    if "teacher" in flags_of(method):
        assert same(drive.teacher_before, drive.teacher.state_dict())
        assert not drive.teacher.training
        assert all(p.grad is None for p in drive.teacher.parameters())
    (_, train, test, _) = drive.rows[-1]
    assert {"loss", "accuracy"} <= {*train} and 0 <= train["accuracy"] <= 1 and 0 <= test <= 100


# Learning rates other than RepDistiller's
SCHEDULES = {golden["name"]: golden["lr"] for golden in json.loads((GOLDEN / "schedule.json").read_text())["schedules"]}
IE = [0.1] * 80 + [0.01] * 40 + [0.001] * 40
RATES = {"ie_at": IE, "ie_dml": IE, "ie_kd": IE, "ie_od": IE, "mlld": [lr / 2 for lr in SCHEDULES["default"]]}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@every_method
def test_the_learning_rate_of_every_epoch(method, monkeypatch):
    means = dict(loss=torch.zeros(()), accuracy=torch.zeros(()))
    monkeypatch.setattr(Drive, "call_step", lambda drive, step, tensors: means)  # no step is taken
    monkeypatch.setattr(common, "accuracy", lambda net, images: 0.0)

    def rates(**flags):
        return Drive(monkeypatch, method, data=four_images, batch_size=4, **flags).rates

    golden = RATES.get(method, SCHEDULES["default"])
    default = load(method).Args.__dataclass_fields__["epochs"].default
    assert rates(epochs=default)[""] == pytest.approx(golden, rel=1e-12, abs=0)
    if method == "vanilla":
        assert rates(epochs=240, student="mobilenetv2")[""] == pytest.approx(SCHEDULES["small_networks"], rel=1e-12, abs=0)
        assert rates(epochs=3, lr=0.3, milestones=(1,))[""] == pytest.approx([0.3, 0.03, 0.03])
        for epochs in 1, 2, 4, 8, 30:
            drops = {epochs * k // 8 for k in (5, 6, 7)} - {0}
            assert rates(epochs=epochs)[""][-1] == pytest.approx(0.05 * 0.1 ** len(drops))  # each takes effect within the run


class PretendedGPU(TorchDispatchMode):
    """In it and FakeTensorMode, tensors on "cuda" have shapes but no values; those on the CPU are real; mixing is an error."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), operation.__name__.split(".")[0]
        pretended = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not pretended and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        if name in ("_local_scalar_dense", "allclose"):  # what the host reads
            return name == "allclose" or (0.0 if pretended[0].is_floating_point() else 0)
        if name == "bincount":
            return torch.zeros(100, dtype=torch.int64, device="cuda")
        return operation(*args, **kwargs | ({"generator": None} if "generator" in kwargs else {}))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Drive(..., device="cuda") without a GPU: no values, no backward pass."""

    def apply(module, convert):  # nn.Module.to cannot swap parameters for ones without values
        for part in module.modules():
            for kind, wrap in (part._parameters, nn.Parameter), (part._buffers, lambda value, _: value):
                kind |= {name: wrap(convert(x.detach()), x.requires_grad) for name, x in kind.items() if x is not None}
        return module

    def tolist(x, real=torch.Tensor.tolist):
        return np.zeros(x.shape).tolist() if isinstance(x, FakeTensor) else real(x)

    new_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": new_generator())
    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, **_: [torch.zeros_like(x) for x in inputs])
    monkeypatch.setattr(FakeTensor, "__deepcopy__", lambda x, memo: x.clone(), raising=False)
    monkeypatch.setattr(common, "check", lambda args: None)
    monkeypatch.setattr(running, "untrained", lambda name, n: common.build(name, n, "cuda").eval().requires_grad_(False))
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGPU():
        yield


@every_method
def test_nothing_stays_behind_on_the_cpu(method, pretended_gpu, monkeypatch):
    drive = Drive(monkeypatch, method, device="cuda", batch_size=8)
    assert drive.steps == 3 * len(drive.phases)
    assert all(value.device.type == "cuda" for phase in drive.phases.values() for value in phase.state_dict().values())


# Other images, other networks


def four_images(args, padding="constant"):
    return small_data(args, padding, n=4, n_test=4)


def images_of_64(args, padding="constant"):
    """Four images of 64x64 pixels to train and to test on."""
    raw = FULL._replace(train=tuple(a[:4] for a in FULL.train))
    raw = raw._replace(train=(common.resize(raw.train[0], 64), raw.train[1]))
    return common.Resident(raw.train, raw, args, padding), common.Resident(raw.train, raw, args, "constant")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder of four small images that are not square."""
    folder, pixels = tmp_path_factory.mktemp("photos"), np.random.default_rng(0).integers(0, 256, (2, 70, 50, 3), np.uint8)
    for split in "train", "val":
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for n in range(2):
                Image.fromarray(pixels[n]).save(folder / split / label / f"{n}.png")
    return folder


@every_method
def test_takes_steps_on_larger_images_and_on_a_folder(method, photos, monkeypatch):
    flags = dict(batch_size=4, teacher="resnet8") if "teacher" in flags_of(method) else dict(batch_size=4)
    drive = Drive(monkeypatch, method, data=images_of_64, **flags)
    assert drive.steps == len(drive.phases)
    flags |= dict(dataset="folder", image_size=40, workers=0, batch_size=2)
    drive = Drive(monkeypatch, method, data=lambda args, **more: common.load_data(replace(args, data=photos), **more), **flags)
    assert drive.steps == 2 * len(drive.phases)
    assert all(value.isfinite().all() for value in drive.after[""].values())


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_method_takes_a_step_with_every_pair(teacher, student, monkeypatch, capfd):
    for method in METHODS:
        flags = dict(
            student=student, batch_size=4, data=lambda args, padding="constant": small_data(args, padding, n=4, n_test=4)
        )
        flags |= {"teacher": teacher} if "teacher" in flags_of(method) else {}
        with monkeypatch.context() as patch:  # its end frees the networks
            try:
                drive = Drive(patch, method, **flags)
            except SystemExit as refused:
                assert method in MAY_REFUSE and refused.code == 2, capfd.readouterr().err
                continue
            assert drive.steps == len(drive.phases)
            assert all(value.isfinite().all() for value in drive.after[""].values()), method
        del drive
        gc.collect()  # networks of up to 130 million parameters, held by the cycle of module and drive


# Runs


@only_quickly("ft", "crd")
def test_killed_after_any_checkpoint(method, monkeypatch, capfd, tmp_path):
    """A run that is killed right after each of its checkpoints and started again ends as if nothing had happened."""
    script = Script(monkeypatch, capfd, tmp_path)
    random_weights("teacher.pt")
    flags = ["--epochs 2", *quick(method)]
    assert script(method, *flags, "--runs whole").code == 0

    lives = 4 if "init_epochs" in flags_of(method) else 2
    with script.dying() as written:
        for life in range(lives):
            assert script(method, *flags, "--runs broken").code == -9
            assert len(written) == life + 1
        assert script(method, *flags, "--runs broken").code == 0  # nothing is left to train
    same_end("whole", "broken")


@pytest.fixture(scope="session")
def synthetic_teacher(tmp_path_factory):
    """Weights of a resnet8 trained on the synthetic set by methods/vanilla.py."""
    folder = tmp_path_factory.mktemp("teacher")
    done = run_script("vanilla", *"--student resnet8 --dataset synthetic --device cpu --epochs 6 --runs .".split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = folder.iterdir()
    assert json.loads((run / "result.json").read_text())["last"] > 50
    return run / "student.pt"


@pytest.mark.slow
@every_method
def test_runs_as_a_user_types_it(method, synthetic_teacher, tmp_path):
    (tmp_path / "teacher.pt").write_bytes(synthetic_teacher.read_bytes())
    flags = "--student resnet8 --dataset synthetic --epochs 3 --device cpu".split() + " ".join(quick(method)).split()
    done = run_script(method, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["last"] >= 8  # chance is 1 %
    if method == "icd":
        again = run_script(method, *flags, cwd=tmp_path)
        assert (again.returncode, again.stdout) == (0, done.stdout.splitlines(keepends=True)[-1])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data" / "cifar-100-binary").is_dir(), reason="no CIFAR-100 in data/")
def test_learns_the_real_cifar100(tmp_path):
    flags = "--student resnet8 --epochs 1 --batch-size 256 --device cpu --runs . --data".split()
    done = run_script("vanilla", *flags, ROOT / "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["last"] > 3  # chance is 1 %
