"""Where a teacher comes from, that a run keeps it, and which files are refused."""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from golden import ROOT, load
from running import FULL, SHARED, Script, common, few, random_weights, same, snapshot

fcntl = pytest.importorskip("fcntl")
USUAL = Path("runs/vanilla__resnet8__few__seed1")
GIVEN = Path("runs/vanilla__resnet8__few__epochs=1__batch-size=16__seed1")


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    script = Script(monkeypatch, capfd, tmp_path)
    script.usual += " --teacher resnet8 --epochs 1"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
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


def sha256(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def finished(folder, seed, epochs):
    """Make what load_teacher needs of a finished run of vanilla.py."""
    digest = sha256(random_weights(folder / "student.pt", seed=seed))
    (folder / "result.json").write_text(json.dumps({"epochs": epochs, "student_sha256": digest}))
    return digest


def public(monkeypatch, dataset="few", name="resnet8", classes=100):
    """Put public weights into PyTorch's cache; gives the file."""
    file = random_weights("public.pt", name, classes, seed=9)
    monkeypatch.setitem(common.PUBLIC, (dataset, name), sha256(file)[:8])
    cached = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", f"{dataset}_{name}-{sha256(file)[:8]}.pt")
    cached.parent.mkdir(parents=True, exist_ok=True)
    return file.rename(cached)


def no_network(monkeypatch, asked=None):
    def fail(url, *_, **__):
        (asked if asked is not None else []).append(url)
        raise URLError("Temporary failure\nin name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


def taken(script, *flags):
    """The teacher that a new run of kd.py takes: its record in result.json."""
    before = set(Path("runs").glob("kd__*"))
    done = script("kd", *flags)
    assert (done.code, done.err) == (0, "")
    (folder,) = set(Path("runs").glob("kd__*")) - before
    record = json.loads((folder / "result.json").read_text())["teacher"]
    first = next(line for line in done.out.splitlines() if line.startswith("teacher "))
    assert all(word in first for word in ("resnet8", f"{record['accuracy']:.2f} %", record["sha256"][:8], record["source"]))
    assert record["epochs"] is None or f"{record['epochs']} epoch" in first
    return record["sha256"], record["source"], record["epochs"]


def test_order_of_sources(script, root, monkeypatch):
    finished(Path("prepared"), 5, 1)
    shipped = random_weights(root / "teachers" / "few" / "resnet8.pt", seed=2)
    shipped.with_suffix(".json").write_text(json.dumps({"epochs": 240}))
    by_default, by_given, by_download = finished(USUAL, 3, 240), finished(GIVEN, 4, 1), public(monkeypatch)
    no_network(monkeypatch)

    assert taken(script, "--teacher-weights", random_weights("mine.pt", seed=1)) == (sha256("mine.pt"), "mine.pt", None)
    assert taken(script, "--seed 1") == (sha256(shipped), "teachers/few/resnet8.pt", 240)
    shutil.rmtree(root / "teachers")
    assert taken(script, "--seed 2") == (by_default, str(USUAL), 240)
    (USUAL / "result.json").unlink()  # not finished
    digest, source, epochs = taken(script, "--seed 3")
    assert (digest, epochs) == (sha256(by_download), None) and source.startswith("https://") and by_download.name in source
    by_download.unlink()
    assert taken(script, "--seed 4") == (by_given, str(GIVEN), 1)
    (GIVEN / "result.json").unlink()
    assert not Path("flags").exists()
    assert taken(script, "--seed 5") == (sha256("prepared/student.pt"), str(GIVEN), 1)


def test_no_network_is_one_line_and_training(script, root, monkeypatch):
    finished(Path("prepared"), 5, 1)
    file, asked = public(monkeypatch), []
    file.unlink()
    no_network(monkeypatch, asked)
    done = script("kd")
    assert (done.code, done.err, len(asked)) == (0, "", 1)
    lines = done.out.splitlines()
    assert asked[0] in lines[0] and "Temporary failure in name resolution" in lines[0]
    assert "training" in lines[1] and Path("flags").read_text() in lines[1]


def test_held_out_images_were_not_seen_by_the_teacher(script, root, monkeypatch):
    """Shipped and public teachers and runs without --holdout were trained on them."""

    def twelve_classes(data, size):
        raw = few(data, size)
        return raw._replace(train=(raw.train[0], raw.train[1] % 12))

    monkeypatch.setitem(common.DATASETS, "twelve", twelve_classes)
    script.usual = script.usual.replace("few", "twelve")
    random_weights(root / "teachers" / "twelve" / "resnet8.pt", seed=2)
    finished(Path(str(USUAL).replace("few", "twelve")), 3, 240)
    public(monkeypatch, "twelve")
    expected, vanilla = finished(Path("prepared"), 5, 1), root / "methods" / "vanilla.py"
    source = vanilla.read_text().replace("few", "twelve")
    for flags, words in ("--holdout 1", "holdout=1"), ("--image-size 16", "image-size=16"):
        vanilla.write_text(source.replace("__seed1", f"__{words}__seed1"))
        assert taken(script, flags)[0] == expected
        assert flags in Path("flags").read_text()


def test_flags_of_the_training(script, root):
    """Data, device, epochs, batch size and milestones as given; learning rate and seed are vanilla's own."""
    vanilla = root / "methods" / "vanilla.py"
    folder = "elsewhere/vanilla__resnet8__few__epochs=3__batch-size=16__milestones=1__seed1"
    vanilla.write_text(vanilla.read_text().replace(str(GIVEN), folder))
    finished(Path("prepared"), 5, 3)
    done = script("kd", "--epochs 3 --milestones 1 --lr 0.3 --weight-decay 0 --seed 7 --kd-weight 2 --runs elsewhere --data here")
    assert done.code == 0, done.err
    words = Path("flags").read_text().split("--")[1:]
    expected = ["student resnet8", "dataset few", "data here", "runs elsewhere", "device cpu", "seed 1"]
    assert sorted(map(str.strip, words)) == sorted([*expected, "epochs 3", "batch-size 16", "milestones 1"])


@pytest.mark.slow
def test_a_teacher_is_trained(script):
    """With the real vanilla.py in a process of its own, on the whole synthetic set."""
    done = script("kd", "--dataset synthetic --batch-size 44")
    assert (done.code, done.err) == (0, "")
    folder = Path("runs/vanilla__resnet8__synthetic__epochs=1__batch-size=44__seed1")
    (run,) = Path("runs").glob("kd__*")
    record = json.loads((run / "result.json").read_text())["teacher"]
    assert (record["source"], record["epochs"], record["sha256"]) == (str(folder), 1, sha256(folder / "student.pt"))
    assert done.out.index("vanilla.py") < done.out.index("\nteacher ")


@pytest.mark.parametrize(("end", "code"), [("sys.exit(1)", 1), ("sys.exit(130)", 130), ("os.kill(os.getpid(), 9)", 1)])
def test_training_that_fails(end, code, script, root):
    (root / "methods" / "vanilla.py").write_text(f"import os, sys\n{end}")
    failed = script("kd")
    assert failed.code == code
    assert "teacher" in failed.error()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_of_the_teacher_too(number, script, root):
    (root / "methods" / "vanilla.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\nos.rename('pid', 'child')\ntime.sleep(60)"
    )

    def stop():
        while not Path("child").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    began = time.monotonic()
    thread.start()
    assert script("kd").code == 128 + number
    thread.join()
    assert time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("child").read_text()), 0)


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
    assert taken(script)[1] == str(folder)
    timer.join()
    assert not Path("flags").exists()


def test_trains_it_when_the_other_process_ends_too_early(script, root):
    threading.Timer(1, os.close, [hold(GIVEN)]).start()
    expected = finished(Path("prepared"), 5, 1)
    done = script("kd")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].startswith("waiting") and str(GIVEN) in done.out.splitlines()[0]
    assert "--student resnet8" in Path("flags").read_text() and expected[:8] in done.out


def interrupted(script, *flags):
    """A run of kd.py that ends after its first epoch."""
    with script.dying():
        assert script("kd", "--epochs 2", *flags).code == -9


def test_a_run_keeps_its_teacher(script, root):
    given = GIVEN.with_name(GIVEN.name.replace("epochs=1", "epochs=2"))
    first = finished(given, 4, 2)
    interrupted(script)
    finished(USUAL, 3, 240)  # a better one has appeared
    content = (given / "student.pt").read_bytes()
    for damage in "another", "missing":
        random_weights(given / "student.pt", seed=8)
        if damage == "missing":
            (given / "student.pt").unlink()
        refused = script("kd", "--epochs 2")
        assert refused.code == 1
        assert str(given / "student.pt") in refused.error() and first[:12] in refused.error()
    (given / "student.pt").write_bytes(content)
    done = script("kd", "--epochs 2")
    assert (done.code, done.err) == (0, "")
    assert "continuing after epoch 1" in done.out and str(given) in done.out
    (run,) = Path("runs").glob("kd__*")
    assert json.loads((run / "result.json").read_text())["teacher"]["sha256"] == first


def test_a_run_keeps_its_teacher_of_a_flag(script):
    """The file's name does not count; other bits under it make another run."""
    random_weights("a.pt")
    interrupted(script, "--teacher-weights a.pt")
    os.rename("a.pt", "b.pt")
    done = script("kd", "--epochs 2 --teacher-weights b.pt")
    assert done.code == 0 and "continuing after epoch 1" in done.out
    random_weights("b.pt", seed=1)
    done = script("kd", "--epochs 2 --teacher-weights b.pt")
    assert done.code == 0 and "continuing" not in done.out
    assert len(list(Path("runs").glob("kd__*"))) == 2


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load does not notice
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_a_teacher_unlike_its_record_is_refused(damage, script, root):
    finished(GIVEN, 4, 1)
    file = GIVEN / "student.pt"
    damage(file)
    refused = script("kd")
    assert refused.code == 1 and str(file) in refused.error()


def test_damaged_public_weights_are_refused(script, monkeypatch):
    file = public(monkeypatch)
    flip_a_bit(file)
    refused = script("kd")
    assert refused.code == 1
    assert str(file) in refused.error() and "SHA-256" in refused.error()


def look(script, name="resnet8", dataset="few", **flags):
    """The teacher that load_teacher gives."""
    args = load("kd").Args(teacher=name, dataset=dataset, device="cpu", batch_size=16, **flags)
    _, test = common.load_data(args)
    run = SimpleNamespace(args=args, folder=Path(), changed={"batch_size": 16}, kept=lambda name: {}, data="")
    return common.load_teacher(run, test), test


def test_the_teacher_is_frozen_and_in_eval_mode(script):
    teacher, test = look(script, teacher_weights=random_weights("teacher.pt"))
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(snapshot(teacher), torch.load("teacher.pt", weights_only=True))
    assert teacher.record["accuracy"] == common.accuracy(teacher, test)


def test_public_cifar10_weights_see_the_images_they_know(script, monkeypatch):
    """They were trained on images divided by another standard deviation."""
    raw = FULL._replace(train=(FULL.train[0][:40], FULL.train[1][:40] % 10), test=(FULL.test[0][:20], FULL.test[1][:20] % 10))
    mean, std = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    raw = raw._replace(names=raw.names[:10], mean=mean, std=(0.2471, 0.2435, 0.2616))
    monkeypatch.setitem(common.DATASETS, "cifar10", lambda data, size: raw)
    file = public(monkeypatch, "cifar10", "resnet20", 10)
    teacher, test = look(script, "resnet20", "cifar10")
    original = common.build("resnet20", 10).eval()
    common.load_weights(original, file)
    x, _ = next(test.batches())
    theirs = (torch.from_numpy(raw.test[0]).permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    with torch.no_grad():
        torch.testing.assert_close(teacher(x)[0], original(theirs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data" / "cifar-100-binary").is_dir(), reason="no CIFAR-100 in data/")
def test_the_real_public_resnet56(script, monkeypatch):
    file = SHARED / "teachers" / "cifar100_resnet56-f2eff4c8.pt"
    if not file.exists():
        pytest.skip(f"no {file}")
    cached = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", file.name)
    cached.parent.mkdir(parents=True)
    shutil.copy(file, cached)
    no_network(monkeypatch)
    teacher, _ = look(script, "resnet56", "cifar100", data=ROOT / "data")
    assert teacher.record["accuracy"] == pytest.approx(72.61, abs=0.02)
    assert teacher.record["sha256"] == "f2eff4c8461ca1e0d39af83a65f7243bf7d29ec421efee3064bcee93a3caaa73"
    assert teacher.record["source"].endswith(f"/chenyaofo/pytorch-cifar-models/releases/download/resnet/{file.name}")


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "missing.pt"])
def test_unknown_weights_of_torchvision(weights, script):
    refused = script("kd", "--teacher torchvision.resnet18 --teacher-weights", weights)
    assert refused.code == 2 and weights in refused.error()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def state(**more):
    return common.build("resnet8", 100).state_dict() | more


def saved(content):
    return lambda file: torch.save(content(), file)


def quantized():
    return torch.quantize_per_tensor(torch.zeros(100), 0.1, 0, torch.qint8)


REFUSED = {  # what the file holds: (what writes it, words of the message)
    "another architecture": (lambda file: random_weights(file, "resnet14"), "another network"),
    "another width": (lambda file: random_weights(file, "resnet8x4"), "another network"),
    "10 classes": (lambda file: random_weights(file, classes=10), "10 classes"),
    "a name missing": (saved(lambda: {k: v for k, v in state().items() if k != "bn1.running_mean"}), "bn1"),
    "a name too many": (saved(lambda: state(fc2=torch.zeros(1))), "fc2"),
    "a tensor": (saved(lambda: torch.zeros(3)), ""),
    "a list": (saved(lambda: [1, 2]), ""),
    "numbers": (saved(lambda: {"epoch": 3}), ""),
    "numbered tensors": (saved(lambda: dict(enumerate(state().values()))), ""),
    "no tensors": (saved(dict), ""),
    "a weight that is not finite": (saved(lambda: state(**{"fc.bias": torch.full((100,), torch.nan)})), "fc.bias"),
    "a sparse weight": (saved(lambda: state(**{"fc.bias": torch.zeros(100).to_sparse()})), ""),
    "a quantized weight": (saved(lambda: state(**{"fc.bias": quantized()})), ""),
    "nothing": (lambda file: file.write_bytes(b""), ""),
    "text": (lambda file: file.write_text("<html>\nnot found\n"), ""),
    "half a checkpoint": (lambda file: random_weights(file) and file.write_bytes(file.read_bytes()[:200_000]), ""),
    "its first byte wrong": (lambda file: random_weights(file) and file.write_bytes(b"Q" + file.read_bytes()[1:]), ""),
    "code": (saved(lambda: {"model": state(), "extra": RunsCode()}), ""),
    "code, old format": (lambda file: torch.save(RunsCode(), file, _use_new_zipfile_serialization=False), ""),
    "code, plain pickle": (lambda file: file.write_bytes(pickle.dumps(RunsCode(), 0)), ""),
    "a namespace besides": (saved(lambda: {"model": state(), "opt": argparse.Namespace(lr=0.05)}), "state dict"),
    "a whole network": (saved(lambda: common.build("resnet8", 100)), "state dict"),
}


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("content", REFUSED)
def test_refused(content, script, recwarn):
    make, words = REFUSED[content]
    make(Path("wrong.pt"))
    refused = script("kd", "--teacher-weights wrong.pt")
    assert refused.code == 1
    assert "wrong.pt" in refused.error() and words in refused.error()
    assert "weights_only" not in refused.err  # torch's own advice
    assert not Path("it-ran").exists()
    assert "epoch " not in refused.out


@pytest.mark.parametrize("record", ["[1]", "{", '{"student_sha256": 3}', '{"epochs": "all"}', "\xff", '{"epochs": []}'])
def test_a_foreign_record_beside_the_weights(record, script):
    """One line or none at all, but no traceback."""
    random_weights("theirs/student.pt")
    Path("theirs/result.json").write_text(record, encoding="latin-1")
    done = script("kd", "--teacher-weights theirs/student.pt")
    assert "Traceback" not in done.err and (done.code == 0 or "result.json" in done.error())
