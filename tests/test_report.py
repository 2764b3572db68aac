"""benchmark/report.py on made-up records: numbers worked out by hand, no cell that mixes settings, the same text every time."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, load

report = load("report", "benchmark")
RECIPE = dict(epochs=240, batch_size=64, lr=0.05, milestones=[150, 180, 210], weight_decay=5e-4)
TEACHER = dict(name="resnet56", accuracy=72.5, sha256="a" * 64, source="teachers/cifar100/resnet56.pt", epochs=240)


def record(folder: Path, name: str, last: float, teacher: dict | None = TEACHER, **args) -> None:
    """A record as common.Run writes it, in `folder` under `name`; best is last + 0.25."""
    method, *networks, dataset = [part for part in name.split("__") if "=" not in part][:-1]
    args = RECIPE | dict(student=networks[-1], dataset=dataset, seed=int(name[-1]), device="cuda", data="d", runs="r") | args
    if method == "kd":
        args = dict(ce_weight=0.1, kd_weight=0.9, kd_temperature=4.0) | args
    result = dict(method=method, args=args, last=last, best=last + 0.25, best_epoch=2, teacher=teacher, epochs=args["epochs"])
    result |= dict(parameters=dict(student=278324, extra=0 if method == "vanilla" else 16642, at_test=278324))
    result |= dict(device="NVIDIA H200", driver="580.1", threads=8, torch="2.15.0", commit="0123456789abcdef", dirty=False)
    result |= dict(seconds=45.0 * args["seed"] ** 2)
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(result))
    rows = [dict(phase="", epoch=epoch, test=last - 2 + epoch) for epoch in (1, 2)]
    (folder / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "runs"
    pair = "resnet56__resnet20__cifar100"
    for seed, vanilla, kd, icd in (1, 69.0, 71.0, 72.0), (2, 69.5, 71.5, 73.5), (3, 70.0, 72.0, 75.0):
        record(folder, f"vanilla__resnet20__cifar100__seed{seed}", vanilla, teacher=None)
        record(folder, f"kd__{pair}__seed{seed}", kd)
        record(folder, f"icd__{pair}__kd-weight=1.0__seed{seed}", icd, kd_weight=1.0)
    record(folder, f"kd__{pair}__ce-weight=1.0__kd-weight=1.0__seed1", 71.5, ce_weight=1.0, kd_weight=1.0)
    record(folder, f"icd__{pair}__epochs=5__kd-weight=1.0__seed1", 40.0, epochs=5, kd_weight=1.0)
    return folder


def written(records: Path, *flags: str) -> str:
    out = records.parent / "results.md"
    report.main(report.Args(records=records, out=out))
    return out.read_text()


def rows(text: str, run: str) -> list[list[str]]:
    """The cells of all rows that begin with `run`."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0].strip("`") == run]


def test_numbers_worked_out_by_hand(records):
    text = written(records)
    full = text[text.index("## The benchmark") : text.index("## NOT")]
    header = rows(full, "run")[-1]
    (icd,) = rows(full, "icd --kd-weight 1")
    icd = dict(zip(header, icd))
    assert icd["last"] == "73.50 ± 1.50 (3)"
    assert icd["best"] == "73.75 ± 1.50 (3)"
    # differences 1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484
    assert icd["against KD 0.1/0.9"] == "+2.00 [-0.48, +4.48] (3)"
    assert icd["against KD 1/1"] == "+0.50 (1) †"
    assert icd["published"] == "71.81 last [2]"
    assert icd["minutes"] == "3.0"  # the median of 45, 180 and 405 s
    assert (icd["extra parameters"], icd["commit"]) == ("16,642", "0123456")
    assert icd["device"] == "NVIDIA H200, driver 580.1"
    vanilla = dict(zip(header, rows(full, "vanilla")[-1]))
    assert vanilla["last"] == "69.50 ± 0.50 (3)"
    assert vanilla["against KD 0.1/0.9"] == "-2.00 [-2.00, -2.00] (3)"
    assert vanilla["published"] == "69.06 last [1]"
    assert rows(full, "teacher resnet56")[0][2:4] == ["72.34 last [1]", "72.50"]
    assert dict(zip(header, rows(full, "kd --ce-weight 1 --kd-weight 1")[0]))["last"] == "71.50 (1) †"
    assert full.index("| teacher resnet56") < full.index("| `kd`") < full.index("| `icd")
    assert "1. HobbitLong/RepDistiller@b84f547 README" in text


def test_fewer_than_three_seeds_are_marked():
    assert [report.spread(values) for values in ([1.0], [1.0, 2.0], [1.0, 2.0, 3.0])] == [
        "1.00 (1) †",
        "1.50 ± 0.71 (2) †",
        "2.00 ± 1.00 (3)",
    ]


def test_short_runs_stand_apart_without_published_numbers(records):
    text = written(records)
    short = text[text.index("## NOT") : text.index("## Sources")]
    (icd,) = rows(short, "icd --kd-weight 1")
    assert icd[1:4] == ["5", "40.00 (1) †", "40.25 (1) †"]
    assert "published" not in rows(short, "run")[0]
    assert "40.00" not in text[: text.index("## NOT")]


@pytest.mark.parametrize("change", ["teacher", "lr", "kd_temperature", "dataset"])
def test_other_settings_never_share_a_cell(records, change):
    name = "kd__resnet56__resnet20__cifar100__other=1__seed4"
    teacher = TEACHER | dict(sha256="b" * 64) if change == "teacher" else TEACHER
    other = {"lr": 0.1, "kd_temperature": 2.0, "dataset": "cifar10"}
    record(records, name, 50.0, teacher, **({change: other[change]} if change in other else {}))
    text = written(records)
    assert "71.50 ± 0.50 (3)" in text
    assert "50.00 (1) †" in text


def test_what_is_apart_by_intent_shares_a_cell(records):
    name = "kd__resnet56__resnet20__cifar100__teacher-weights=aaaaaaaa__seed4"
    record(records, name, 72.5, device="cpu", data="elsewhere", runs="elsewhere", teacher_weights="x.pt")
    assert "71.75 ± 0.65 (4)" in written(records)


def test_a_short_teacher_makes_a_run_short(records):
    record(records, "kd__resnet56__resnet20__cifar100__lr=0.1__seed1", 60.0, TEACHER | dict(epochs=20), lr=0.1)
    text = written(records)
    assert text.index("60.00") > text.index("## NOT")


def test_networks_that_teach_each_other_have_no_teacher_row(records):
    record(records, "ie_dml__resnet20__resnet20__cifar100__seed1", 70.25, None, epochs=160, peer="resnet20")
    text = written(records)
    table = text.split("### resnet20 as a peer to resnet20")[1].split("###")[0]
    assert "| `ie_dml` (our definition) | 160 | 70.25 (1) † |" in table and "| teacher" not in table


def test_runs_of_ie_kds_recipe_are_full_and_compared(records):
    recipe = dict(epochs=160, batch_size=128, lr=0.1, milestones=[80, 120])
    flags = "epochs=160__batch-size=128__lr=0.1__milestones=80,120__seed1"
    record(records, f"kd__resnet56__resnet20__cifar100__{flags}", 70.0, **recipe)
    record(records, "ie_kd__resnet56__resnet20__cifar100__seed1", 71.0, **recipe)
    text = written(records)
    full = text[: text.index("## NOT")]
    (ie_kd,) = rows(full, "ie_kd")
    assert dict(zip(rows(full, "run")[-1], ie_kd))["against KD 0.1/0.9"] == "+1.00 (1) †"


def test_a_student_alone_is_compared_with_by_its_own_recipe_only(records):
    recipe = dict(batch_size=128, lr=0.1)
    record(records, "vanilla__resnet20__cifar100__batch-size=128__lr=0.1__seed1", 60.0, teacher=None, **recipe)
    found = report.cells(report.read(records))
    usual, other, unknown = (dict(args=RECIPE | change) for change in ({}, recipe, dict(lr=0.3)))
    assert [run["last"] for run in report.control(found, usual).values()] == [69.0, 69.5, 70.0]
    assert [run["last"] for run in report.control(found, other).values()] == [60.0]
    assert report.control(found, unknown) == {}


def test_only_the_usual_length_stands_beside_published_numbers(records):
    longer = dict(epochs=480, milestones=[300, 360, 420])
    record(records, "kd__resnet56__resnet20__cifar100__epochs=480__seed1", 72.75, **longer)
    kd = {row[1]: row for row in rows(written(records), "kd")}
    assert (kd["240"][2], kd["480"][2]) == ("70.66 last [1]", "")


def test_a_teachers_epochs_are_found_in_its_own_record(records):
    record(records, "vanilla__resnet56__cifar100__epochs=20__seed1", 50.0, None, epochs=20)
    source = "runs/vanilla__resnet56__cifar100__epochs=20__seed1/student.pt"
    teacher = TEACHER | dict(epochs=None, source=source, sha256="c" * 64)
    record(records, "kd__resnet56__resnet20__cifar100__teacher-weights=cccccccc__seed1", 60.0, teacher)
    text = written(records)
    assert text.index("SHA-256 cccccccccccc, trained for 20 epochs") > text.index("## NOT")


def test_two_records_of_one_run_are_refused(records, capsys):
    record(records, "kd__resnet56__resnet20__cifar100__teacher-weights=aaaaaaaa__seed1", 72.5, teacher_weights="x.pt")
    with pytest.raises(SystemExit):
        written(records)
    assert "same run" in capsys.readouterr().err


def test_records_are_copied_without_weights_and_never_replaced(records, tmp_path, capsys):
    own = tmp_path / "own" / "runs"
    name = "kd__resnet56__resnet20__cifar100__seed1"
    (records / name / "student.pt").write_bytes(b"weights")
    (records / "unfinished").mkdir()
    record(records, "vanilla__resnet20__synthetic__seed1", 99.0, None)
    args = report.Args(runs=records, records=own, out=tmp_path / "own.md")
    report.main(args)
    assert {path.name for path in (own / name).iterdir()} == {"result.json", "log.jsonl"}
    assert not (own / "unfinished").exists() and not list(own.glob("*synthetic*"))
    shutil.rmtree(records / "vanilla__resnet20__synthetic__seed1")
    assert args.out.read_text() == written(records)
    changed = (records / name / "result.json").read_text().replace("71.0", "99.0")
    (records / name / "result.json").write_text(changed)
    report.main(args)
    assert "99.0" not in (own / name / "result.json").read_text()
    assert "kept" in capsys.readouterr().err


def test_a_damaged_record_is_one_line(records, tmp_path):
    (records / "kd__resnet56__resnet20__cifar100__seed1" / "result.json").write_text("{")
    command = [sys.executable, ROOT / "benchmark" / "report.py", "--records", records, "--out", tmp_path / "r.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the record") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["runs", "records", "out"])
def test_a_folder_that_is_not_there(records, tmp_path, flag, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(report.Args(**dict(records=records, out=tmp_path / "r.md") | {flag: tmp_path / "no" / "r.md"}))
    assert end.value.code == 2 and f"--{flag}" in capsys.readouterr().err


def test_figures_or_one_line_that_says_what_is_missing(records, tmp_path, capsys):
    report.main(report.Args(records=records, out=tmp_path / "r.md", figures=True))
    drawn = {path.name for path in (tmp_path / "figures").glob("*")}
    if importlib.util.find_spec("matplotlib"):
        assert drawn == {"curves.png", "gains.png"}
    else:
        assert not drawn and capsys.readouterr().err == "no figures: matplotlib is missing (pip install matplotlib)\n"


def test_published_numbers_are_well_formed():
    numbers = json.loads(report.PUBLISHED.read_text())
    keys = {(number["dataset"], number["teacher"], number["student"], number["method"]) for number in numbers}
    assert len(keys) == len(numbers)
    assert all(number["source"] and number["protocol"] in ("last", "best", "unknown") for number in numbers)
    assert not any("UNVERIFIED" in number.get("note", "") for number in numbers)


def test_results_are_made_from_the_committed_records(tmp_path):
    if not any(report.Args().records.glob("*/result.json")):
        pytest.skip("no records yet")
    report.main(report.Args(out=tmp_path / "results.md"))
    assert (tmp_path / "results.md").read_text() == (ROOT / "results.md").read_text(), "run python benchmark/report.py"
