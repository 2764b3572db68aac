"""benchmark/report.py and records.py on made-up runs: numbers worked out by hand, no row that mixes settings."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import records
import report
import sweep

TEACHER = dict(name="resnet56", accuracy=72.5, sha256="a" * 64, source="teachers/cifar100/resnet56.pt", epochs=240)
PUBLIC = TEACHER | dict(
    sha256="f2eff4c8" + "0" * 56, source="https://x/cifar100_resnet56-f2eff4c8.pt", epochs=None, accuracy=72.61
)
PAIR = "resnet56__resnet20__cifar100"


def make(folder: Path, name: str, last: float, teacher: dict | None = TEACHER, rate: float = 0.05, **args) -> Path:
    """A finished run as common.Run leaves it, without its weights; best is last + 0.25."""
    method, *_, student, dataset = re.split("__[^_]*=", name)[0].removesuffix(f"__seed{name[-1]}").split("__")
    args = dict(student=student, dataset=dataset, seed=int(name[-1]), device="cuda", data="d", runs="r", epochs=240) | args
    args = dict(batch_size=64, lr=None, milestones=[], weight_decay=5e-4) | args
    if method == "kd":
        args = dict(ce_weight=0.1, kd_weight=0.9, kd_temperature=4.0) | args
    result = dict(method=method, args=args, last=last, best=last + 0.25, best_epoch=2, teacher=teacher, epochs=args["epochs"])
    result |= dict(parameters=dict(student=278324, extra=0 if method == "vanilla" else 16642, at_test=278324), resumed=0)
    result |= dict(device="NVIDIA H200", driver="580.1", threads=8, torch="2.15.0", commit="0123456789abcdef", dirty=False)
    result |= dict(seconds=45.0 * args["seed"] ** 2)
    rows = [dict(phase="init", epoch=1, loss=2.0, lr=1.0)]
    rows += [dict(phase="", epoch=epoch, loss=1 / 3, test=last - 2 + epoch, lr=rate) for epoch in (1, 2)]
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(result))
    (folder / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for seed, vanilla, kd, icd in (1, 69.0, 71.0, 72.0), (2, 69.5, 71.5, 73.5), (3, 70.0, 72.0, 75.0):
        make(folder, f"vanilla__resnet20__cifar100__seed{seed}", vanilla, teacher=None)
        make(folder, f"kd__{PAIR}__seed{seed}", kd)
        make(folder, f"icd__{PAIR}__kd-weight=1.0__seed{seed}", icd, kd_weight=1.0)
    make(folder, f"kd__{PAIR}__ce-weight=1__kd-weight=1__seed1", 71.25, ce_weight=1.0, kd_weight=1.0)
    make(folder, f"icd__{PAIR}__epochs=5__kd-weight=1__seed1", 40.0, epochs=5, kd_weight=1.0)
    return folder


def written(runs: Path, code: int = 0, **flags) -> str:
    """results.md of the runs added to the records beside them."""
    args = report.Args(runs=runs, records=runs.parent / "records.jsonl", out=runs.parent / "results.md", **flags)
    args.records.touch()
    with pytest.raises(SystemExit) as end:
        report.main(args)
    assert end.value.code == code
    return args.out.read_text()


def table(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading: rows by run, as {column: cell}."""
    lines = re.search(r"^\|.*?\n\n", text.split(heading)[1], re.M | re.S)[0].strip().splitlines()
    names, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {row[0]: dict(zip(names, row)) for row in rows}


def test_numbers_worked_out_by_hand(runs):
    text = written(runs)
    rows = table(text, "### resnet20 on cifar100, 240 epochs")
    assert list(rows) == ["`icd --kd-weight 1`", "`kd`", "`vanilla`", "`kd --ce-weight 1 --kd-weight 1`"]  # one seed last
    icd = rows["`icd --kd-weight 1`"]
    assert (icd["seeds"], icd["last"], icd["best"]) == ("3", "73.50 ± 1.50", "73.75 ± 1.50")
    # differences 1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484
    assert (icd["against KD"], icd["against KD 1/1"]) == ("+2.00 [-0.48, +4.48]", "+0.75 (1)")
    assert icd["published"] == "71.81 last [1]" and "1. giakoumoglou/distillers@5a19fd0, README of 4 September 2024\n" in text
    assert icd["teacher"] == "resnet56 72.50, aaaaaaaa"
    assert (icd["extra parameters"], icd["minutes"]) == ("16,642", "3.0")  # the median of 45, 180 and 405 s
    assert (icd["device"], icd["torch"], icd["commit"]) == ("NVIDIA H200, driver 580.1", "2.15.0", "0123456")
    assert "resumed" not in icd
    assert rows["`kd --ce-weight 1 --kd-weight 1`"]["seeds"] == "1 †"
    assert (rows["`vanilla`"]["published"], rows["`vanilla`"]["teacher"]) == ("69.06 last [2]", "")


def test_short_runs_stand_apart_without_published_numbers(runs):
    make(runs, f"kd__{PAIR}__teacher-weights=cccccccc__seed1", 60.0, TEACHER | dict(sha256="c" * 64, epochs=20))
    text = written(runs)
    assert "70.66" not in next(line for line in text.splitlines() if "cccccccc, 20 epochs" in line)
    assert text.index("## The benchmark") < text.index("NOT the benchmark") < text.index(report.BY_HAND)
    row = table(text, "### resnet20 on cifar100, 5 epochs")["`icd --kd-weight 1`"]
    assert row["last"] == "40.00" and "published" not in row


@pytest.mark.parametrize(
    ("full", "args"),
    [
        (False, dict(name="epochs=20", epochs=20)),
        (False, dict(name="init-epochs=1", init_epochs=1)),
        (False, dict(name="lr=0.1", teacher=TEACHER | dict(epochs=20))),
        (True, dict(name="lr=0.1", teacher=PUBLIC)),
        (True, dict(name="epochs=480", epochs=480)),
        (True, dict(name="epochs=160__batch-size=128", epochs=160, batch_size=128)),
    ],
)
def test_what_belongs_to_the_benchmark(tmp_path, full, args):
    make(tmp_path, f"crd__{PAIR}__{args.pop('name')}__seed1", 60.0, **args)
    assert records.is_full(records.read(next(tmp_path.iterdir()))) == full


def test_a_public_teacher_and_interruptions_are_marked(runs):
    folder = make(runs, f"icd__{PAIR}__teacher-weights=f2eff4c8__kd-weight=1__seed1", 71.0, PUBLIC, kd_weight=1.0)
    result = json.loads((folder / "result.json").read_text())
    result |= dict(resumed=13, dirty=True, device="cpu", parameters=dict(student=10, extra=1000, at_test=30))
    (folder / "result.json").write_text(json.dumps(result))
    line = next(line for line in written(runs).splitlines() if "‡," in line)
    for text in (
        "`icd --kd-weight 1` | 1 † | 71.00",
        "71.81 last",
        "resnet56 72.61 ‡, f2eff4c8",
        "cpu, 8 threads",
        "0123456+ | 13 |",
    ):
        assert text in line
    assert "1,000 (20 of them at inference)" in line and "+" not in line.split("71.81")[0]  # no KD with this teacher


@pytest.mark.parametrize("change", ["teacher", "rate", "kd_temperature", "dataset"])
def test_other_settings_never_share_a_row(runs, change):
    other = dict(teacher=TEACHER | dict(sha256="b" * 64), rate=0.1, kd_temperature=2.0, dataset="cifar10")[change]
    make(runs, f"kd__{PAIR}__other=1__seed4", 50.0, **{change: other})
    text = written(runs)
    assert "| 3 | 71.50 ± 0.50 |" in text and "| 1 † | 50.00 |" in text


def test_places_and_devices_share_a_row(runs):
    places = dict(device="cpu", data="elsewhere", runs="elsewhere", teacher_weights="x.pt", workers=0)
    make(runs, f"kd__{PAIR}__teacher-weights=aaaaaaaa__seed4", 72.5, **places)
    assert "| 4 | 71.75 ± 0.65 |" in written(runs)


def test_two_records_of_one_run_are_refused(runs):
    make(runs, f"kd__{PAIR}__teacher-weights=aaaaaaaa__seed1", 72.5)
    with pytest.raises(SystemExit, match="of the same run: remove one"):
        records.grouped([records.read(folder) for folder in runs.iterdir()])


def test_a_changed_record_is_refused_and_the_others_are_added(runs, capsys):
    written(runs)
    before = (runs.parent / "records.jsonl").read_text()
    result = runs / f"kd__{PAIR}__seed1" / "result.json"
    result.write_text(result.read_text().replace("71.0", "99.0"))
    (make(runs, f"sp__{PAIR}__seed1", 70.0) / "log.jsonl").write_text("{")
    make(runs, f"at__{PAIR}__seed1", 70.0)
    make(runs, f"pkt__{PAIR}__holdout=50__seed1", 70.0, holdout=50)
    make(runs, "vanilla__resnet20__synthetic__seed1", 70.0, teacher=None)
    (runs / "unfinished").mkdir()
    text = written(runs, code=1).split("## What a method costs")[0]
    assert "99.0" not in text and "`at`" in text and "`pkt" not in text and "synthetic" not in text
    errors = capsys.readouterr().err.splitlines()
    assert [re.search(r"runs/(\w+?)__", error)[1] for error in errors] == ["kd", "sp"]
    assert "its record says something else" in errors[0]
    assert {*before.splitlines()} < {*(runs.parent / "records.jsonl").read_text().splitlines()}


def test_a_record_holds_the_curve_by_columns(runs):
    written(runs)
    record = json.loads((runs.parent / "records.jsonl").read_text().splitlines()[0])
    assert list(record) == ["run", "result", "curve"]
    assert record["curve"]["test"] == [None, 39.0, 40.0] and record["curve"]["loss"] == [2.0, 0.333333, 0.333333]
    pandas = pytest.importorskip("pandas")
    assert len(pandas.read_json(runs.parent / "records.jsonl", lines=True)) == 11


def test_transfer_stands_beside_what_is_published(runs):
    weights = "runs/icd__wrn_40_2__wrn_16_2__cifar100__kd-weight=1__seed1/student.pt"
    probe = dict(weights=weights, protocol="frozen", epochs=None)
    make(runs, "linear_probe__wrn_16_2__stl10__protocol=frozen__seed1", 72.0, None, **probe)
    text = written(runs, figures=bool(importlib.util.find_spec("matplotlib")))
    rows = text.split("## Transfer")[1].splitlines()
    assert "| wrn_16_2 | `icd --kd-weight 1` | frozen | stl10 | 72.00 | 72.25 |  |" in rows
    assert any(row.startswith("| wrn_16_2 | `icd --kd-weight 1` with wrn_40_2 |  | stl10 |  |  | 72.50 last [") for row in rows)
    assert "tinyimagenet" not in text


def test_the_cost_of_a_method(runs, monkeypatch):
    monkeypatch.setattr(report, "HERE", runs.parent)
    (runs.parent / "published.json").write_text((ROOT / "benchmark" / "published.json").read_text())
    facts = dict(pair="resnet56/resnet20", batch_size=64, device="cpu", torch="2.15.0")
    facts["rows"] = [dict(method="crd", time=1.304, low=1.2, high=1.4, memory=2.0, extra=16640, ms=100.0)]
    (runs.parent / "speed-methods.json").write_text(json.dumps(facts))
    text = written(runs)
    assert "A step relative to vanilla: resnet56/resnet20, batches of 64, cpu, torch 2.15.0. " in text
    row = {"method": "`crd`", "time": "1.30 (1.20 to 1.40)", "memory": "2.00", "parameters": "+16,640"}
    assert table(text, "## What a method costs")["`crd`"] == row


def test_damaged_records_are_one_line(tmp_path):
    (tmp_path / "records.jsonl").write_text("{\n")
    with pytest.raises(SystemExit, match="cannot be read"):
        report.main(report.Args(records=tmp_path / "records.jsonl", out=tmp_path / "results.md"))


def test_published_numbers_name_runs_that_exist():
    content = json.loads((ROOT / "benchmark" / "published.json").read_text())
    has = {method: sweep.flags_of(method) for method in {row[3].split()[0] for row in content["rows"]}}
    for dataset, _, _, run, top1, protocol, source, *_ in content["rows"]:
        method, *flags = run.split(" --")
        assert {"--" + flag.split()[0] for flag in flags} <= has[method] and has[method], run
        assert source in content["sources"] and protocol in ("last", "best", "unknown") and 30 < top1 < 96, dataset


def test_results_are_made_from_the_committed_records(tmp_path):
    with pytest.raises(SystemExit):
        report.main(report.Args(out=tmp_path / "results.md"))
    assert (tmp_path / "results.md").read_text() == (ROOT / "results.md").read_text(), "run python benchmark/report.py"
