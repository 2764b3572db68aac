"""The folder of a run: its name and files, resuming, refusing, and what bad flags give."""

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import ROOT, load
from running import Killed, Script, common, quick, random_weights, rows, run_script, same_end, weights

fcntl = pytest.importorskip("fcntl")
FOLDER = Path("runs/vanilla__resnet8__few__epochs=4__batch-size=16__seed1")


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    return Script(monkeypatch, capfd, tmp_path)


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(common, "SAVE_EVERY", 0)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Make the Run of a method with some flags, as its `main` does first; signals stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "data_sha256", lambda args: "0")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def make(method, **flags):
        args = load(method).Args(**{"device": "cpu"} | flags)
        run = common.Run(str(ROOT / "methods" / f"{method}.py"), args)
        run.lock.close()
        return run.folder.name

    return make


# Names

OTHER = {"teacher": "resnet32", "student": "resnet14", "dataset": "cifar10", "lr": 0.3, "milestones": (3, 5), "image_size": 48}


@pytest.mark.parametrize("method", ["vanilla", "icd"])
def test_every_flag_that_matters_is_in_the_name(method, run):
    Path("weights.pt").write_bytes(b"1")
    usual = run(method)
    assert usual == "__".join([method, *["resnet56"] * (method != "vanilla"), "resnet20", "cifar100", "seed1"])
    names = {usual}
    for field in fields(load(method).Args):
        value = Path("weights.pt") if field.name == "teacher_weights" else OTHER.get(field.name)
        if field.name in ("data", "runs", "device", "workers"):  # where, not what
            other = {"data": Path("elsewhere"), "runs": Path("elsewhere"), "device": "cpu", "workers": 0}
            assert run(method, **{field.name: other[field.name]}) == usual
            continue
        value = value or (field.default / 2 or 1.0 if isinstance(field.default, float) else field.default + 1)
        name = run(method, **{field.name: value})
        assert name not in names
        names.add(name)
        shown = {"teacher_weights": hashlib.sha256(b"1").hexdigest()[:8], "milestones": "3,5"}.get(field.name, value)
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        bare = {"teacher": shown, "student": shown, "dataset": shown, "seed": f"seed{shown}"}
        assert bare.get(field.name, f"{field.name.replace('_', '-')}={shown}") in name.split("__")
    if method != "vanilla":
        Path("weights.pt").write_bytes(b"2")
        assert run(method, teacher_weights=Path("weights.pt")) not in names
        assert run(method, kd_weight=1.0, seed=2) == "icd__resnet56__resnet20__cifar100__kd-weight=1__seed2"


def test_a_name_never_outgrows_a_file_system(run):
    names = set()
    for value in 0.1234567, 0.1234568:
        numbers = "ce_weight kd_weight value_weight rank_weight teacher_mix prune_rate rank_temperature weight_decay lr".split()
        flags = {flag: value for flag in numbers} | dict(augment="autoaugment", milestones=(1, 2, 3))
        name = run("r2kd", teacher="torchvision.efficientnet_v2_s", student="torchvision.mobilenet_v3_small", **flags)
        assert len(name.encode()) <= 200
        assert name.startswith("r2kd__torchvision.efficientnet_v2_s__torchvision.mobilenet_v3_small__cifar100__")
        assert name.endswith("__seed1")
        assert json.loads(Path("runs", name, "args.json").read_text())["lr"] == value
        names.add(name)
    assert len(names) == 2


# Files and results


def test_a_run_and_its_files(script):
    done = script("vanilla", "--epochs 4 --batch-size 2")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["student", "parameters", "estimate", *["epoch"] * 4, "result"]
    assert "resnet8, seed 1" in lines[0] and "epochs 4, batch-size 2" in lines[0] and "83,892" in lines[1]
    (folder,) = Path("runs").iterdir()
    files = {"args.json", "checkpoint.pt", "common.py", "log.jsonl", "result.json", "student.pt", "vanilla.py"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == files
    assert (folder / "vanilla.py").read_bytes() == (ROOT / "methods" / "vanilla.py").read_bytes()

    log, args, result = rows(folder), *(json.loads((folder / f"{name}.json").read_text()) for name in ("args", "result"))
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    best = max(row["test"] for row in log)
    first_best = next(row["epoch"] for row in log if row["test"] == best)
    assert (result["last"], result["best"], result["best_epoch"]) == (log[-1]["test"], best, first_best)
    assert result["args"].items() <= args.items() and result["data_sha256"] == args["data_sha256"]
    assert result["parameters"] == {"student": 83_892, "extra": 0, "at_test": 83_892}
    assert [result[key] for key in ("method", "teacher", "epochs", "device", "resumed")] == ["vanilla", None, 4, "cpu", 0]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert result["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert result["student_sha256"] == hashlib.sha256((folder / "student.pt").read_bytes()).hexdigest()

    net = common.build("resnet8", 100)
    net.load_state_dict(torch.load(folder / "student.pt", weights_only=True))
    _, test = common.load_data(load("vanilla").Args(dataset="few", device="cpu", batch_size=2))
    assert common.accuracy(net, test) == result["last"]

    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    again = script("vanilla", "--epochs 4 --batch-size 2")
    assert (again.code, again.err, again.out.splitlines()) == (0, "", lines[-1:])
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_finished_run_is_not_shown_as_that_of_changed_code_or_data(script, monkeypatch):
    first = script("vanilla", "--epochs 1").out.splitlines()[-1]
    (folder,) = Path("runs").iterdir()
    for changed, words in ("vanilla.py", ["vanilla.py"]), ("common.py", ["vanilla.py", "common.py"]):
        (folder / changed).write_text("another version")
        note, result = script("vanilla", "--epochs 1").out.splitlines()
        assert all(word in note for word in (*words, "--runs", str(folder))) and result == first
    for source in ROOT / "common.py", ROOT / "methods" / "vanilla.py":
        (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(common, "data_sha256", lambda args: "of other images")
    note, result = script("vanilla", "--epochs 1").out.splitlines()
    assert "images" in note and result == first


def test_a_run_that_began_with_other_code_or_images(script, every_epoch, monkeypatch):
    expected = uninterrupted(script)
    script.interrupted()
    (FOLDER / "vanilla.py").write_text("another version")
    with monkeypatch.context() as patch:
        patch.setattr(common, "data_sha256", lambda args: "of other images")
        refused = script("vanilla", "--epochs 4")
        assert refused.code == 1 and "images" in refused.error()
    note = assert_ends_like(script, expected).out.splitlines()[0]
    assert "vanilla.py" in note and (FOLDER / "vanilla.py").read_text() == "another version"


# Stopped and started again

WHOLE = []


def uninterrupted(script):
    """The log rows and final weights of the same run without a break."""
    if not WHOLE:
        assert script("vanilla", "--epochs 4 --runs whole").code == 0
        folder = "whole" / FOLDER.relative_to("runs")
        WHOLE.extend([rows(folder), weights(folder / "student.pt")])
    return WHOLE


def assert_ends_like(script, expected):
    """The same command once more ends FOLDER as the uninterrupted run."""
    done = script("vanilla", "--epochs 4")
    assert (done.code, done.err) == (0, "")
    assert rows(FOLDER) == expected[0]
    assert np.array_equal(weights(FOLDER / "student.pt"), expected[1])
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(number, script, every_epoch):
    expected = uninterrupted(script)
    stopped = script.interrupted(3, number)
    assert stopped.code == 128 + number
    assert "saved up to epoch 2" in stopped.error() and "continue with the same command" in stopped.error()
    assert "continuing after epoch 2 of 4" in assert_ends_like(script, expected).out
    assert json.loads((FOLDER / "result.json").read_text())["resumed"] == 1


def test_a_signal_before_the_first_checkpoint(script):
    expected = uninterrupted(script)
    assert "nothing saved yet" in script.interrupted().error()
    assert not (FOLDER / "checkpoint.pt").exists()
    assert "continuing" not in assert_ends_like(script, expected).out


class Dropping(torch.nn.Module):
    """A network that draws in training."""

    def __init__(self, classes):
        super().__init__()
        self.net = common.build("resnet8", classes)

    def forward(self, x):
        logits, features = self.net(x)
        return torch.nn.functional.dropout(logits, 0.5, self.training), features


@pytest.mark.parametrize("method", ["vanilla", "ft"])
def test_a_network_with_dropout_resumes_exactly(method, script, monkeypatch):
    monkeypatch.setitem(common.NETWORKS, "dropping", Dropping)
    random_weights("teacher.pt")
    flags = ["--student dropping --epochs 2", *quick(method)]
    assert script(method, *flags, "--runs whole").code == 0
    with script.dying():
        while script(method, *flags, "--runs broken").code:
            pass
    same_end("whole", "broken")


def test_killed_between_any_two_files(script, every_epoch):
    """Each file of a run is renamed into place; the process ends right before the n-th of these renamings."""

    def run(runs):
        return script("vanilla", "--epochs 2 --runs", runs).code

    assert run("whole") == 0
    replace, n, ended = os.replace, 0, -9
    while ended == -9:
        n, done = n + 1, []

        def until(*words, n=n, done=done):
            done.append(1)
            if len(done) == n:
                raise Killed
            return replace(*words)

        with script.monkeypatch.context() as patch:
            patch.setattr(os, "replace", until)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
            ended = run(f"killed{n}")
        again = script("vanilla", "--epochs 2 --runs", f"killed{n}")
        assert (again.code, again.err) == (0, ""), n
        same_end("whole", f"killed{n}")
    assert ended == 0 and n > 9


# A script of ours in a process of its own, on few images
DRIVER = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from running import common, few
common.SAVE_EVERY = 0
common.DATASETS["few"] = few
sys.argv[0] = "icd.py"
runpy.run_path({str(ROOT / "methods" / "icd.py")!r}, run_name="__main__")
"""


def driven(*words):
    return [sys.executable, "-c", DRIVER, *" ".join(map(str, words)).split()]


@pytest.mark.slow
def test_killed_five_times(script, every_epoch):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moment = random.Random(seed)
    random_weights("teacher.pt")
    flags = "--teacher resnet8 --teacher-weights teacher.pt --epochs 24 --runs"
    assert script("icd", flags, "whole").code == 0
    command = driven(script.usual, flags, "killed")
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(moment.randint(1, 2)):
            assert any(line.startswith("epoch") for line in process.stdout)  # wait for one to end
        log = next(Path("killed").glob("*/log.jsonl"), None)
        time.sleep(moment.uniform(0, json.loads(log.read_text().splitlines()[-1])["seconds"] if log else 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "continuing after epoch" in done.stdout
    same_end("whole", "killed")


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_a_run_outlives_its_stdout(stdout, script):
    random_weights("teacher.pt")
    command = driven(script.usual, "--teacher resnet8 --teacher-weights teacher.pt --epochs 3")
    with open("/dev/full", "w") as full:
        out = subprocess.PIPE if stdout == "closed" else full
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        if stdout == "closed":
            assert process.stdout.readline().startswith("teacher")  # as `| head -1` does
            process.stdout.close()
        error = process.stderr.read()
    assert process.wait() == 0
    assert error.count("\n") == 1 and "stdout" in error
    (folder,) = Path("runs").iterdir()
    assert len(rows(folder)) == 3 and (folder / "result.json").exists()


def test_another_gpu_of_the_same_kind(run, monkeypatch):
    monkeypatch.setattr(common, "check", lambda args: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    name = run("vanilla", device="cuda:0")
    (Path("runs") / name / "checkpoint.pt").touch()  # the run has begun
    for device in "cuda:3", "cuda":
        assert run("vanilla", device=device) == name
    with pytest.raises(SystemExit) as exit:
        run("vanilla", device="cpu")
    assert exit.value.code == 1
    (Path("runs") / name / "args.json").write_text('{"device": "cpu"}')
    with pytest.raises(SystemExit):
        run("vanilla", device="cuda:0")


# Damage


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_edited_settings_are_refused(state, script, every_epoch):
    if state == "begun":
        script.interrupted()
    else:
        script("vanilla", "--epochs 4")
    file = FOLDER / "args.json"
    file.write_text(file.read_text().replace("0.0005", "0.0001"))
    kept = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    refused = script("vanilla", "--epochs 4")
    assert refused.code == 1
    assert all(word in refused.error() for word in (str(FOLDER), "0.0001", "weight_decay"))
    assert kept == {path.name: path.read_bytes() for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", ["args.json", "result.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"[[1, 2]]", b"null", b'"text"', b"\xff", b'{"last": 3}', b'{"last": "x"}']
)
def test_damaged_records_are_one_line(name, content, script):
    """Or none, where nothing is missing: the run goes on."""
    assert script("vanilla", "--epochs 4" if name == "args.json" else "--epochs 1").code == 0
    (file,) = Path("runs").glob(f"*/{name}")
    file.write_bytes(content)
    again = script("vanilla", "--epochs 4" if name == "args.json" else "--epochs 1")
    assert again.code == 0 if name == "args.json" and content[:2] == b'{"' else str(file) in again.error()


def test_a_folder_in_use_is_refused(script, every_epoch):
    expected = uninterrupted(script)
    script.interrupted()
    with open(FOLDER / ".lock", "a") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        refused = script("vanilla", "--epochs 4")
        assert refused.code == 1
        assert "in use" in refused.error() and str(FOLDER) in refused.error()
    assert_ends_like(script, expected)


def test_a_folder_that_cannot_be_used(script):
    Path("file").write_text("")
    (FOLDER / ".lock").mkdir(parents=True)  # for want of a file of somebody else's
    for flags in "--runs file", f"--runs {'a' * 300}", "--epochs 4":
        refused = script("vanilla", flags)
        assert refused.code == 1
        assert "--runs" in refused.error()


def test_a_damaged_checkpoint_is_refused(script, every_epoch):
    expected = uninterrupted(script)
    script.interrupted()
    file = FOLDER / "checkpoint.pt"
    content = file.read_bytes()
    random.seed(4)
    places = [0, len(content) - 33, len(content) - 32, len(content) - 1, *random.sample(range(len(content)), 20)]
    damaged = [content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :] for place in places]
    damaged += [content[:n] for n in (0, 1, 31, 32, 33, len(content) // 2, len(content) - 1)] + [content + b"\0"]
    for wrong in damaged:
        file.write_bytes(wrong)
        with pytest.raises(SystemExit) as exit:
            common.read_checkpoint(file)
        assert exit.value.code == 1
        assert script.capfd.readouterr().err.count("\n") == 1
    refused = script("vanilla", "--epochs 4")
    assert refused.code == 1 and str(file) in refused.error()
    assert file.read_bytes() == damaged[-1]
    file.write_bytes(content)
    state = common.read_checkpoint(file)
    for wrong in {k: v for k, v in state.items() if k != "trained"}, state | {"optimizer": {}}, state | {"trained": {}}:
        common.write_checkpoint(file, wrong)  # whole, but of another script
        refused = script("vanilla", "--epochs 4")
        assert refused.code == 1 and str(file) in refused.error()
    file.write_bytes(content)
    assert_ends_like(script, expected)


@pytest.mark.parametrize("flags", ["vanilla --student unfit", "kd --teacher unfit --teacher-weights teacher.pt"])
def test_a_network_that_does_not_fit_the_images(flags, script, monkeypatch):
    monkeypatch.setitem(common.NETWORKS, "unfit", lambda classes: torch.nn.Conv2d(3, classes, 40))
    random_weights("teacher.pt", "unfit")
    refused = script(*flags.split(), "--epochs 1")
    assert refused.code == 2 and "32 x 32" in refused.error()


@pytest.mark.parametrize(("flags", "words"), [("--lr 1e39 --batch-size 44", "no longer finite"), ("--lr 1e30", "nan")])
def test_divergence_is_not_saved(flags, words, script):
    failed = script("vanilla", "--epochs 1", flags)
    assert failed.code == 1
    assert words in failed.error() and "--lr" in failed.error()
    assert not list(Path("runs").rglob("checkpoint.pt")) and not list(Path("runs").rglob("result.json"))


def test_the_last_good_checkpoint_stays(script, every_epoch):
    expected = uninterrupted(script)
    normalize, calls = common.ImageSet.normalize, []

    def broken(images, pixels):
        calls.append(1)
        return normalize(images, pixels) * (float("nan") if len(calls) > 10 else 1)  # epochs have 3 and 1 batches

    with script.monkeypatch.context() as patch:
        patch.setattr(common.ImageSet, "normalize", broken)
        failed = script("vanilla", "--epochs 4")
    assert failed.code == 1 and "epoch 3" in failed.error()
    assert len(common.read_checkpoint(FOLDER / "checkpoint.pt")["rows"]) == 2
    assert_ends_like(script, expected)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("file", ["checkpoint.pt", "log.jsonl", "student.pt", "result.json"])
def test_disk_full(call, file, script, every_epoch):
    """The disk is full when `file` is written, for the second time where that is done more than once."""
    expected = uninterrupted(script)
    real, seen = getattr(os, call), []
    nth = 2 if file in ("checkpoint.pt", "log.jsonl") else 1

    def full(first, *rest):
        path = os.readlink(f"/proc/self/fd/{first}") if call == "fsync" else str(first)
        seen.append(Path(path).name.startswith(file))
        if seen[-1] and sum(seen) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(first, *rest)

    with script.monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        failed = script("vanilla", "--epochs 4")
    assert failed.code == 1
    assert all(word in failed.error() for word in ("No space left", str(FOLDER / file), "continue with the same command"))
    assert len(common.read_checkpoint(FOLDER / "checkpoint.pt")["rows"]) == (1 if nth == 2 else 4)
    assert not list(FOLDER.glob("*.tmp"))
    assert_ends_like(script, expected)


# Flags

BAD_FLAGS = [
    *("--teacher resnet57", "--student resnet8x5", "--student torchvision.resnet17", "--dataset imagenet"),
    *("--epochs 0", "--batch-size -64", "--lr 0", "--lr nan", "--weight-decay inf", "--momentum 1.5"),
    *("--milestones 3 2", "--milestones 2 2", "--milestones 0 2", "--seed -1", "--holdout -1", "--workers -1", "--image-size 0"),
    *("--device tpu", "--device cuda:99", "--device cuda:x", "--teacher-weights missing.pt", "--teacher-weights ."),
    *("--kd-temperature 0", "--ce-weight nan", "--kd-weight inf"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, script, monkeypatch):
    monkeypatch.setattr(common, "load_data", None)  # ends a run that should have been refused
    refused = script("icd", flags)
    assert refused.code == 2
    line = refused.error()
    assert line.split()[1] == flags.split()[0] and flags.split()[-1] in line
    assert not Path("runs").exists()


def test_a_bad_flag_as_a_user_sees_it(tmp_path):
    done = run_script("icd", "--epochs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--epochs 0" in done.stderr


def test_the_counter_on_a_terminal(run, monkeypatch, capsys):
    """It needs a second to show; the images left and the time for them."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0], sleep=time.sleep))
    args = load("vanilla").Args(device="cpu", dataset="synthetic")
    one = common.Run(str(ROOT / "methods" / "vanilla.py"), args)
    trained = torch.nn.ModuleDict({"student": common.build("resnet8", 100)})
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    next(one.epochs(3, trained=trained, optimizer=optimizer, scheduler=scheduler))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    capsys.readouterr()
    meter = one.meter(3000)
    for _ in range(30):
        now[0] += 0.6
        meter.add({"loss": torch.tensor(1.0)}, 100)
    out = capsys.readouterr().out
    assert "estimate    18.0 s per epoch, 54.0 s for the 3 left" in out
    assert len(re.findall(r"\r  [\d,]+ of 3,000 images", out)) == 15 and "1,000 of 3,000 images, 12.0 s left" in out
    assert meter.mean() == {"loss": 1.0}
