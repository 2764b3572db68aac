"""Where a teacher comes from, and which files are refused."""

import argparse
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from harness import ROOT, common, load, same, snapshot
from inprocess import Script

USUAL = Path("runs/vanilla__resnet8__synthetic__seed1")
GIVEN = Path("runs/vanilla__resnet8__synthetic__epochs=1__batch-size=16__seed1")


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    script = Script(monkeypatch, capfd, tmp_path)
    script.usual += " --teacher resnet8 --epochs 1"
    return script


@pytest.fixture
def root(monkeypatch, tmp_path):
    """A project folder without teachers, whose methods/vanilla.py only notes its flags and copies the folder `prepared`."""
    root = tmp_path / "project"
    (root / "methods").mkdir(parents=True)
    lines = ["import pathlib, shutil, sys", "pathlib.Path('flags').write_text(' '.join(sys.argv[1:]))"]
    lines += [f"shutil.copytree('prepared', {str(GIVEN)!r}, dirs_exist_ok=True)"]
    (root / "methods" / "vanilla.py").write_text("\n".join(lines))
    monkeypatch.setattr(common, "ROOT", root)
    return root


def trained(file, seed, name="resnet8", classes=100):
    """Write a network's weights; gives the file's SHA-256."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(common.build(name, classes).state_dict(), file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def finished(folder, seed, epochs):
    """Make what load_teacher needs of a finished run of vanilla.py."""
    sha256 = trained(folder / "student.pt", seed)
    (folder / "result.json").write_text(json.dumps({"epochs": epochs}))
    return sha256


def taken(script, *flags):
    """The teacher that a new run of kd.py takes: its record in result.json."""
    before = set(Path("runs").glob("kd__*"))
    done = script("kd", *flags)
    assert (done.code, done.err) == (0, "")
    (folder,) = set(Path("runs").glob("kd__*")) - before
    record = json.loads((folder / "result.json").read_text())["teacher"]
    first = next(line for line in done.out.splitlines() if line.startswith("teacher "))
    assert all(word in first for word in ("resnet8", f"{record['accuracy']:.2f} %", record["sha256"][:8], record["source"]))
    assert record["epochs"] is None or f"{record['epochs']} epochs" in first
    assert record["name"] == "resnet8"
    return record


def test_order_of_sources(script, root):
    finished(Path("prepared"), 5, 1)
    by_training = hashlib.sha256(Path("prepared/student.pt").read_bytes()).hexdigest()
    by_flag = trained(Path("mine.pt"), 1)
    shipped = root / "teachers" / "synthetic" / "resnet8.pt"
    by_shipping = trained(shipped, 2)
    shipped.with_suffix(".json").write_text(json.dumps({"epochs": 240}))
    by_default, by_given = finished(USUAL, 3, 240), finished(GIVEN, 4, 1)

    record = taken(script, "--teacher-weights mine.pt")
    assert (record["sha256"], record["source"], record["epochs"]) == (by_flag, "mine.pt", None)
    record = taken(script, "--seed 1")
    assert (record["sha256"], record["source"], record["epochs"]) == (by_shipping, "teachers/synthetic/resnet8.pt", 240)
    shutil.rmtree(root / "teachers")
    record = taken(script, "--seed 2")
    assert (record["sha256"], record["source"], record["epochs"]) == (by_default, str(USUAL), 240)
    (USUAL / "result.json").unlink()  # not finished
    record = taken(script, "--seed 3")
    assert (record["sha256"], record["source"], record["epochs"]) == (by_given, str(GIVEN), 1)
    (GIVEN / "result.json").unlink()
    assert not Path("flags").exists()
    record = taken(script, "--seed 4")
    assert (record["sha256"], record["source"], record["epochs"]) == (by_training, str(GIVEN), 1)
    assert len({by_flag, by_shipping, by_default, by_given, by_training}) == 5


def test_flags_of_the_training(script, root):
    """Data, device, epochs, batch size and milestones as given; learning rate and seed are vanilla's own."""
    folder = "vanilla__resnet8__synthetic__epochs=3__batch-size=16__milestones=1__seed1"
    vanilla = root / "methods" / "vanilla.py"
    vanilla.write_text(vanilla.read_text().replace(str(GIVEN), f"elsewhere/{folder}"))
    finished(Path("prepared"), 5, 3)
    flags = "--epochs 3 --milestones 1 --lr 0.3 --weight-decay 0 --seed 7 --kd-weight 2 --runs elsewhere --data here"
    done = script("kd", flags)
    assert done.code == 0, done.err
    words = Path("flags").read_text().split("--")[1:]
    expected = ["student resnet8", "dataset synthetic", "data here", "runs elsewhere", "device cpu", "seed 1"]
    assert sorted(map(str.strip, words)) == sorted([*expected, "epochs 3", "batch-size 16", "milestones 1"])
    assert Path("flags").read_text() in done.out  # said before it starts


def test_a_teacher_is_trained(script):
    """With the real vanilla.py in a process of its own, on the whole synthetic set."""
    done = script("kd", "--batch-size 44")
    assert (done.code, done.err) == (0, "")
    folder = Path("runs/vanilla__resnet8__synthetic__epochs=1__batch-size=44__seed1")
    own = json.loads((folder / "result.json").read_text())
    (run,) = Path("runs").glob("kd__*")
    record = json.loads((run / "result.json").read_text())["teacher"]
    assert (record["source"], record["epochs"], own["args"]["lr"]) == (str(folder), 1, 0.05)
    assert record["sha256"] == hashlib.sha256((folder / "student.pt").read_bytes()).hexdigest()
    assert done.out.index("vanilla.py") < done.out.index("\nteacher ")


@pytest.mark.parametrize(("end", "code"), [("sys.exit(1)", 1), ("sys.exit(130)", 130), ("os.kill(os.getpid(), 9)", 1)])
def test_training_that_fails(end, code, script, root):
    (root / "methods" / "vanilla.py").write_text(f"import os, sys\n{end}")
    failed = script("kd")
    assert failed.code == code
    assert "teacher" in failed.error()


def hold(folder):
    """Work in `folder` as another process does, until the file descriptor is closed."""
    folder.mkdir(parents=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@pytest.mark.parametrize("folder", [GIVEN, USUAL])
def test_waits_while_another_process_trains_it_or_the_full_one(folder, script, root):
    held = hold(folder)

    def finish():
        finished(folder, 3, 1)
        os.close(held)

    timer = threading.Timer(1, finish)
    timer.start()
    record = taken(script)
    timer.join()
    assert record["sha256"] == hashlib.sha256((folder / "student.pt").read_bytes()).hexdigest()
    assert not Path("flags").exists()


def test_trains_it_when_the_other_process_ends_too_early(script, root):
    threading.Timer(1, os.close, [hold(GIVEN)]).start()
    expected = finished(Path("prepared"), 5, 1)
    done = script("kd")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].startswith("waiting") and str(GIVEN) in done.out.splitlines()[0]
    assert "--student resnet8" in Path("flags").read_text()
    assert expected[:8] in done.out


def test_the_teacher_is_frozen_and_in_eval_mode(script):
    trained(Path("teacher.pt"), 1)
    flags = dict(dataset="synthetic", device="cpu", batch_size=16)
    args = load("kd").Args(teacher="resnet8", teacher_weights=Path("teacher.pt"), **flags)
    _, test = common.load_data(args)
    teacher = common.load_teacher(args, test)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(snapshot(teacher), torch.load("teacher.pt", weights_only=True))
    assert teacher.record["accuracy"] == common.accuracy(teacher, test)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def state(**more):
    return common.build("resnet8", 100).state_dict() | more


REFUSED = {  # what the file holds: (what writes it, words of the message)
    "another architecture": (lambda file: trained(file, 1, "resnet14"), "another network"),
    "another width": (lambda file: trained(file, 1, "resnet8x4"), "another network"),
    "another family": (lambda file: trained(file, 1, "vgg8"), "another network"),
    "10 classes": (lambda file: trained(file, 1, classes=10), "10 classes"),
    "a name missing": (lambda file: torch.save({k: v for k, v in state().items() if k != "bn1.running_mean"}, file), "bn1"),
    "a name too many": (lambda file: torch.save(state(fc2=torch.zeros(1)), file), "fc2"),
    "a tensor": (lambda file: torch.save(torch.zeros(3), file), ""),
    "a list": (lambda file: torch.save([1, 2], file), ""),
    "numbers": (lambda file: torch.save({"epoch": 3}, file), ""),
    "nothing": (lambda file: file.write_bytes(b""), ""),
    "text": (lambda file: file.write_text("<html>\nnot found\n"), ""),
    "random bytes": (lambda file: file.write_bytes(bytes(range(256)) * 40), ""),
    "half a checkpoint": (lambda file: trained(file, 1) and file.write_bytes(file.read_bytes()[:200_000]), ""),
    "its first byte wrong": (lambda file: trained(file, 1) and file.write_bytes(b"Q" + file.read_bytes()[1:]), ""),
    "code": (lambda file: torch.save({"model": state(), "extra": RunsCode()}, file), ""),
    "code, old format": (lambda file: torch.save(RunsCode(), file, _use_new_zipfile_serialization=False), ""),
    "code, plain pickle": (lambda file: file.write_bytes(pickle.dumps(RunsCode())), ""),
    "code, first protocol": (lambda file: file.write_bytes(pickle.dumps(RunsCode(), 0)), ""),
    "a namespace besides": (lambda file: torch.save({"model": state(), "opt": argparse.Namespace(lr=0.05)}, file), "weights"),
    "a whole network": (lambda file: torch.save(common.build("resnet8", 100), file), "weights"),
}


@pytest.mark.parametrize("content", REFUSED)
def test_refused(content, script, recwarn):
    make, words = REFUSED[content]
    make(Path("wrong.pt"))
    refused = script("kd", "--teacher-weights wrong.pt")
    assert refused.code == 1
    assert "wrong.pt" in refused.error() and words in refused.error()
    assert not Path("it-ran").exists()
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]  # they would be lines on stderr
    assert "epoch " not in refused.out


def test_a_teacher_in_a_folder_of_the_project_is_checked_too(script, root):
    trained(GIVEN / "student.pt", 1, "resnet14")
    (GIVEN / "result.json").write_text(json.dumps({"epochs": 1}))
    refused = script("kd")
    assert refused.code == 1
    assert str(GIVEN / "student.pt") in refused.error()


@pytest.mark.parametrize("file", sorted((ROOT / "teachers").glob("*/*.pt")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_teachers(file):
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["epochs"] > 0
    net = common.build(file.stem, {"cifar10": 10}.get(file.parent.name, 100))
    common.load_weights(net, file)
    assert all(value.isfinite().all() for value in net.state_dict().values())
