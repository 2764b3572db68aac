"""The folder of a run: its name and files, resuming, refusing, and what bad flags give."""

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, common, load, run_script
from inprocess import Killed, Script, rows, weights

fcntl = pytest.importorskip("fcntl")
FOLDER = Path("runs/vanilla__resnet8__synthetic__epochs=4__batch-size=16__seed1")


@pytest.fixture
def script(monkeypatch, capfd, tmp_path):
    return Script(monkeypatch, capfd, tmp_path)


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(common, "SAVE_EVERY", 0)


def run_folder(method, **flags):
    handler = signal.getsignal(signal.SIGINT)
    try:
        args = load(method).Args(**{"device": "cpu"} | flags)
        return common.Run(str(ROOT / "methods" / f"{method}.py"), args).folder.name
    finally:
        signal.signal(signal.SIGINT, handler)


OTHER = {"teacher": "resnet32", "student": "resnet14", "dataset": "cifar10", "lr": 0.3, "milestones": (3, 5)}


@pytest.mark.parametrize("method", ["vanilla", "kd", "icd"])
def test_every_flag_that_matters_is_in_the_name(method, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(b"1")
    usual = run_folder(method)
    assert usual == "__".join([method, *["resnet56"] * (method != "vanilla"), "resnet20", "cifar100", "seed1"])
    names = {usual}
    for field in fields(load(method).Args):
        if field.name in ("data", "runs", "device"):
            continue
        value = Path("weights.pt") if field.name == "teacher_weights" else OTHER.get(field.name) or field.default + 1
        name = run_folder(method, **{field.name: value})
        assert name not in names
        names.add(name)
        shown = {"teacher_weights": hashlib.sha256(b"1").hexdigest()[:8], "milestones": "3,5"}.get(field.name, value)
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        bare = {"teacher": shown, "student": shown, "dataset": shown, "seed": f"seed{shown}"}
        assert bare.get(field.name, f"{field.name.replace('_', '-')}={shown}") in name.split("__")
    if method != "vanilla":
        Path("weights.pt").write_bytes(b"2")
        assert run_folder(method, teacher_weights=Path("weights.pt")) not in names


def test_places_are_not_in_the_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_folder("icd", data=tmp_path / "a", runs=tmp_path / "b") == run_folder("icd")


def test_icd_and_icd_with_kd_do_not_meet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_folder("icd") == "icd__resnet56__resnet20__cifar100__seed1"
    assert run_folder("icd", kd_weight=1.0, seed=2) == "icd__resnet56__resnet20__cifar100__kd-weight=1__seed2"
    assert run_folder("icd", kd_weight=0.0) == run_folder("icd")


def test_a_default_that_is_written_out_is_the_same_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usual, mobile = run_folder("vanilla"), run_folder("vanilla", student="mobilenetv2")
    assert run_folder("vanilla", lr=0.05, epochs=240, milestones=(150, 180, 210)) == usual
    assert run_folder("vanilla", student="mobilenetv2", lr=0.01) == mobile == "vanilla__mobilenetv2__cifar100__seed1"
    assert "lr=0.05" in run_folder("vanilla", student="mobilenetv2", lr=0.05)
    assert run_folder("vanilla", epochs=8, milestones=(5, 6, 7)) == run_folder("vanilla", epochs=8)
    assert "milestones=" in run_folder("vanilla", epochs=8, milestones=(150, 180, 210))


def test_a_run_and_its_files(script):
    done = script("vanilla", "--epochs 4 --batch-size 2")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["teacher", "student", "parameters", "estimate", *["epoch"] * 4, "result"]
    assert "resnet8, seed 1" in lines[1] and "epochs 4, batch-size 2" in lines[1]
    assert "83,892" in lines[2]
    (folder,) = Path("runs").iterdir()
    files = {"args.json", "checkpoint.pt", "common.py", "log.jsonl", "result.json", "student.pt", "vanilla.py"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == files
    assert (folder / "common.py").read_bytes() == (ROOT / "common.py").read_bytes()
    assert (folder / "vanilla.py").read_bytes() == (ROOT / "methods" / "vanilla.py").read_bytes()

    log, args, result = rows(folder), *(json.loads((folder / f"{name}.json").read_text()) for name in ("args", "result"))
    assert (args["lr"], args["milestones"], args["epochs"], args["batch_size"]) == (0.05, [2, 3], 4, 2)
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    best = max(row["test"] for row in log)
    first_best = next(row["epoch"] for row in log if row["test"] == best)
    assert (result["last"], result["best"], result["best_epoch"]) == (log[-1]["test"], best, first_best)
    assert result["args"] == args
    assert result["parameters"] == {"student": 83_892, "extra": 0, "at_test": 83_892}
    assert (result["method"], result["teacher"], result["epochs"], result["device"]) == ("vanilla", None, 4, "cpu")
    assert (result["device"], result["driver"]) == ("cpu", None)
    assert (result["threads"], result["torch"]) == (torch.get_num_threads(), torch.__version__)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert result["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert result["seconds"] > 0

    net = common.build("resnet8", 100)
    state = torch.load(folder / "student.pt", weights_only=True)
    assert all(value.is_contiguous() for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    net.load_state_dict(state)
    _, test = common.load_data(load("vanilla").Args(dataset="synthetic", device="cpu", batch_size=2))
    assert common.accuracy(net, test) == result["last"]

    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    again = script("vanilla", "--epochs 4 --batch-size 2")
    assert (again.code, again.err, again.out.splitlines()) == (0, "", lines[-1:])
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def interrupted(script, epoch=3):
    """A run of four epochs, ended by Ctrl-C in its third: FOLDER, with a checkpoint after each of the first two."""
    with script.monkeypatch.context() as patched:
        script.monkeypatch, usual = patched, script.monkeypatch
        script.interrupt(epoch)
        done = script("vanilla", "--epochs 4")
        script.monkeypatch = usual
    return done


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


def test_ctrl_c(script, every_epoch):
    expected = uninterrupted(script)
    stopped = interrupted(script)
    assert stopped.code == 130
    assert "continue with the same command" in stopped.error()
    assert "continuing after epoch 2 of 4" in assert_ends_like(script, expected).out


def test_ctrl_c_before_the_first_checkpoint(script):
    expected = uninterrupted(script)
    assert interrupted(script).code == 130
    assert not (FOLDER / "checkpoint.pt").exists()
    assert "continuing" not in assert_ends_like(script, expected).out


@pytest.mark.parametrize("edit", ["value", "list", "removed", "no json", "empty", "no object"])
def test_edited_settings_are_refused(edit, script, every_epoch):
    interrupted(script)
    file = FOLDER / "args.json"
    args = json.loads(file.read_text())
    assert args["weight_decay"] == 5e-4 and args["milestones"] == [2, 3]
    if edit == "removed":
        del args["weight_decay"]
    edited = {"value": args | {"weight_decay": 1e-4}, "list": args | {"milestones": [1, 3]}, "no object": [1]}.get(edit, args)
    file.write_text({"no json": '{"lr": 0.05', "empty": ""}.get(edit, json.dumps(edited)))
    kept = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    refused = script("vanilla", "--epochs 4")
    assert refused.code == 1
    assert str(file) in refused.error()
    assert kept == {path.name: path.read_bytes() for path in FOLDER.iterdir()}


def test_a_finished_run_with_edited_settings_is_refused(script):
    assert script("vanilla", "--epochs 1").code == 0
    (file,) = Path("runs").glob("*/args.json")
    file.write_text(file.read_text().replace("0.0005", "0.0001"))
    refused = script("vanilla", "--epochs 1")
    assert refused.code == 1
    assert str(file) in refused.error()


def test_a_folder_in_use_is_refused(script, every_epoch):
    expected = uninterrupted(script)
    interrupted(script)
    with open(FOLDER / ".lock", "a") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        refused = script("vanilla", "--epochs 4")
        assert refused.code == 1
        assert "in use" in refused.error() and str(FOLDER) in refused.error()
    assert_ends_like(script, expected)


def test_a_damaged_checkpoint_is_refused(script, every_epoch):
    expected = uninterrupted(script)
    interrupted(script)
    file = FOLDER / "checkpoint.pt"
    content = file.read_bytes()
    random.seed(4)
    places = [0, 1, len(content) - 33, len(content) - 32, len(content) - 1, *random.sample(range(len(content)), 25)]
    damaged = [content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :] for place in places]
    damaged += [content[:n] for n in (0, 1, 31, 32, 33, len(content) // 2, len(content) - 1)] + [content + b"\0"]
    for wrong in damaged:
        file.write_bytes(wrong)
        with pytest.raises(SystemExit) as exit:
            common.read_checkpoint(file)
        assert exit.value.code == 1
        assert script.capfd.readouterr().err.count("\n") == 1
    refused = script("vanilla", "--epochs 4")
    assert refused.code == 1
    assert str(file) in refused.error()
    assert file.read_bytes() == damaged[-1]
    file.write_bytes(content)
    assert_ends_like(script, expected)


def test_weights_that_diverge_in_the_last_step_are_not_saved(script):
    failed = script("vanilla", "--epochs 1 --lr 1e39 --batch-size 44")  # one step, whose loss is still finite
    assert failed.code == 1
    assert "no longer finite" in failed.error() and "--lr" in failed.error()
    assert not list(Path("runs").rglob("checkpoint.pt")) and not list(Path("runs").rglob("result.json"))


def test_a_loss_that_is_not_finite(script):
    failed = script("vanilla", "--epochs 4 --lr 1e30")
    assert failed.code == 1
    assert "nan" in failed.error() and "--lr" in failed.error()
    assert not list(Path("runs").glob("*/checkpoint.pt")) and not list(Path("runs").glob("*/result.json"))


def test_the_last_good_checkpoint_stays(script, every_epoch):
    expected = uninterrupted(script)
    normalise = common.Images.normalise
    with script.monkeypatch.context() as patched:
        calls = []

        def broken(images, pixels):
            calls.append(1)
            return normalise(images, pixels) * (float("nan") if len(calls) > 10 else 1)  # epochs have 3 and 1 batches

        patched.setattr(common.Images, "normalise", broken)
        failed = script("vanilla", "--epochs 4")
    assert failed.code == 1
    assert "epoch 3" in failed.error()
    assert len(common.read_checkpoint(FOLDER / "checkpoint.pt")["rows"]) == 2
    assert_ends_like(script, expected)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("file", ["checkpoint.pt", "log.jsonl", "student.pt", "result.json"])
def test_disk_full(call, file, script, every_epoch):
    """The disk is full when `file` is written, for the second time where that is done more than once."""
    expected = uninterrupted(script)
    real, seen = getattr(os, call), []

    def full(first, *rest):
        path = os.readlink(f"/proc/self/fd/{first}") if call == "fsync" else str(first)
        seen.append(Path(path).name.startswith(file))
        if seen[-1] and sum(seen) == (2 if file in ("checkpoint.pt", "log.jsonl") else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(first, *rest)

    with script.monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        failed = script("vanilla", "--epochs 4")
    assert failed.code == 1
    assert "No space left" in failed.error() and str(FOLDER / file) in failed.error()
    assert "continue with the same command" in failed.error()
    assert len(common.read_checkpoint(FOLDER / "checkpoint.pt")["rows"]) == (1 if file in ("checkpoint.pt", "log.jsonl") else 4)
    assert not list(FOLDER.glob("*.tmp"))
    assert_ends_like(script, expected)


def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path, capsys):
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    common.write(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            common.write(path, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    common.write(path, "new")
    assert path.read_text() == "new"


def test_killed_between_any_two_files(script, every_epoch):
    """Each file of a run is renamed into place; the process ends right before the n-th of these renamings."""

    def run(runs):
        return script("vanilla", "--epochs 2 --runs", runs), Path(runs) / FOLDER.name.replace("epochs=4", "epochs=2")

    _, whole = run("whole")
    replace, n, ended = os.replace, 0, -9
    while ended == -9:
        n, done = n + 1, []

        def until(*words, n=n, done=done):
            done.append(1)
            if len(done) == n:
                raise Killed
            return replace(*words)

        with script.monkeypatch.context() as patched:
            patched.setattr(os, "replace", until)
            patched.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
            ended = run(f"killed{n}")[0].code
        again, killed = run(f"killed{n}")
        assert (again.code, again.err) == (0, ""), n
        assert rows(killed) == rows(whole), n
        assert np.array_equal(weights(killed / "student.pt"), weights(whole / "student.pt")), n
    assert ended == 0 and n > 9


DRIVER = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from inprocess import common, few
common.SAVE_EVERY = 0
common.DATASETS["synthetic"] = few
sys.argv[0] = "icd.py"
runpy.run_path({str(ROOT / "methods" / "icd.py")!r}, run_name="__main__")
"""


def test_killed_five_times(script, every_epoch):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moment = random.Random(seed)
    torch.manual_seed(0)
    torch.save(common.build("resnet8", 100).state_dict(), "teacher.pt")
    flags = "--teacher resnet8 --teacher-weights teacher.pt --epochs 24 --runs"
    assert script("icd", flags, "whole").code == 0
    (whole,) = Path("whole").iterdir()

    command = [sys.executable, "-c", DRIVER, *script.usual.split(), *flags.split(), "killed"]
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
    assert (done.returncode, done.stderr) == (0, "")
    assert "continuing after epoch" in done.stdout
    (killed,) = Path("killed").iterdir()
    assert rows(killed) == rows(whole) and len(rows(whole)) == 24
    assert np.array_equal(weights(killed / "student.pt"), weights(whole / "student.pt"))


BAD_FLAGS = [
    *("--teacher resnet57", "--student resnet8x5", "--dataset imagenet"),
    *("--epochs 0", "--epochs -5", "--batch-size 0", "--batch-size -64"),
    *("--lr -0.1", "--lr 0", "--lr nan", "--lr inf", "--weight-decay -1", "--weight-decay nan"),
    *("--milestones 3 2", "--milestones 2 2", "--milestones 0 2", "--milestones -1 2"),
    *("--seed -1", "--device tpu", "--device cuda:99", "--device cuda:x"),
    *("--teacher-weights missing.pt", "--teacher-weights ."),
    *("--kd-temperature 0", "--kd-temperature -4", "--ce-weight nan", "--kd-weight inf", "--alpha nan"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, script, monkeypatch):
    monkeypatch.setattr(common, "load_data", None)  # ends a run that should have been refused
    refused = script("icd", flags)
    assert refused.code == 2
    assert "Traceback" not in refused.err
    line = refused.error()
    assert line.split()[1] == flags.split()[0] and flags.split()[-1] in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("size", [45, 43, 1])
def test_batch_sizes_that_44_images_do_not_allow(size, script):
    refused = script("vanilla", f"--epochs 1 --batch-size {size}")
    assert refused.code == 2
    assert f"--batch-size {size}" in refused.error()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(script):
    refused = script("vanilla", "--epochs 1 --device cuda")
    assert refused.code == 2
    assert "--device cpu" in refused.error()


@pytest.mark.parametrize("flags", ["--epochs many", "--learning-rate 1", "--milestones 1.5"])
def test_flags_that_are_no_flags(flags, script):
    refused = script("icd", flags)
    assert refused.code == 2
    assert flags.split()[0] in refused.err and "Traceback" not in refused.err


def test_a_bad_flag_as_a_user_sees_it(tmp_path):
    done = run_script("icd", "--epochs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--epochs 0" in done.stderr


def test_a_folder_that_cannot_be_made(script):
    Path("file").write_text("")
    for flags in "--runs file", f"--runs {'a' * 300}":
        refused = script("vanilla", "--epochs 1", flags)
        assert refused.code == 1
        assert "--runs" in refused.error()


def test_a_changed_script_is_mentioned(script, every_epoch):
    interrupted(script)
    (FOLDER / "vanilla.py").write_text("another version")
    done = script("vanilla", "--epochs 4")
    assert done.code == 0
    assert "vanilla.py" in done.out.splitlines()[0]
    assert (FOLDER / "vanilla.py").read_text() == "another version"
