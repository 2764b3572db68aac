"""Writes results.md from benchmark/runs/ and benchmark/published.json alone, so that anyone can make it again.

A record is the folder of a finished run without its weights: result.json and log.jsonl. A cell of a table holds the runs that
differ in nothing but their seed: method, teacher (by SHA-256), student, data set and all flags but --seed, --device, --data and
--runs are the same. Full runs have 240 epochs (160 by IE-KD's recipe) and a full teacher; all others stand apart.

    python benchmark/report.py                      # results.md again
    python benchmark/report.py --runs runs          # first copy the records of the finished runs in runs/
    python benchmark/report.py --figures            # also benchmark/figures/*.png; needs matplotlib
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from common import fail

PUBLISHED = ROOT / "benchmark" / "published.json"  # numbers by pair and, as `method`, the label of our run that repeats them
TEMPLATE = ROOT / "benchmark" / "results.template.md"
APART = ("seed", "device", "data", "runs", "teacher_weights")  # flags that do not split a cell; its teacher is told by SHA-256
RECIPE = ("epochs", "batch_size", "lr", "milestones", "weight_decay")  # only where these are the same are runs compared
KD = {"KD 0.1/0.9": (0.1, 0.9, 4), "KD 1/1": (1, 1, 4)}  # our own KD rows: weight of labels, weight of teacher, temperature
OURS = {"dual_aug": " (a reconstruction)", "ie_at": " (our definition)", "ie_dml": " (our definition)"}  # said in every row
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last also for more, for which it is slightly too wide
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Record = dict[str, Any]
Cell = dict[int, Record]  # runs by seed


@dataclass
class Args:
    runs: Path | None = None
    """folder of runs whose records are copied to --records first"""
    records: Path = ROOT / "benchmark" / "runs"
    """folder of the records"""
    out: Path = ROOT / "results.md"
    """the file to write"""
    figures: bool = False
    """also draw learning curves and gains, into the folder `figures` beside --records"""


def collect(runs: Path, records: Path) -> None:
    """Copy result.json and log.jsonl of every finished run on real images; a record that says something else stays as it is."""
    for result in sorted(runs.glob("*/result.json")):
        for source in () if "__synthetic__" in result.parent.name else (result, result.with_name("log.jsonl")):
            if not source.exists():
                fail(f"{source} is missing: restore it, or remove the folder")
            target = records / result.parent.name / source.name
            if target.exists() and target.read_bytes() != source.read_bytes():
                print(f"kept {target} although {source} differs: remove its folder to take the new record", file=sys.stderr)
                break
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def read(records: Path) -> list[Record]:
    """All records in the order of their names, each with its `folder`, `label` and `log`."""
    found = []
    for file in sorted(records.glob("*/result.json")):
        try:
            log = [json.loads(text) for text in file.with_name("log.jsonl").read_text().splitlines()]
            found.append(json.loads(file.read_text()) | {"label": label(file.parent.name), "log": log, "folder": file.parent})
        except (OSError, ValueError) as error:
            fail(f"the record {file.parent} cannot be read ({error}): restore or remove it")
    lengths = {record["folder"].name: record["epochs"] for record in found}
    for record in found:  # a teacher that says nothing about its epochs may have a record here
        if record["teacher"] and record["teacher"]["epochs"] is None:
            names = {*Path(record["teacher"]["source"]).parts} & lengths.keys()
            record["teacher"]["epochs"] = lengths[names.pop()] if names else None
    return found


def label(name: str) -> str:
    """Method and flags from the name of a run's folder, without those a table shows elsewhere: "icd --kd-weight 1"."""
    method, *parts = name.split("__")
    flags = dict(part.split("=", 1) for part in parts if "=" in part)
    shown = {flag: value.removesuffix(".0").replace(",", " ") for flag, value in flags.items()}
    return " ".join([method, *(f"--{flag} {shown[flag]}" for flag in shown if flag not in ("epochs", "teacher-weights"))])


def teacher(record: Record) -> dict[str, Any]:
    """What the record says about its teacher; two networks that teach each other have a peer instead."""
    return record["teacher"] or dict(name=f"{record['args'].get('peer')} as a peer", sha256="", epochs=None)


def first(cell: Cell) -> Record:
    """One of the cell's records, for what all of them share."""
    return next(iter(cell.values()))


def cells(records: list[Record]) -> list[Cell]:
    """The records grouped into cells; short schedules stand before long ones, and within one vanilla and KD before the rest."""
    groups: dict[str, Cell] = defaultdict(dict)
    for record in records:
        flags = {flag: value for flag, value in record["args"].items() if flag not in APART}
        cell = groups[json.dumps([record["method"], teacher(record)["sha256"], flags], sort_keys=True)]
        seed = record["args"]["seed"]
        if seed in cell:
            fail(f"the records {cell[seed]['folder']} and {record['folder']} are of the same run: remove one")
        cell[seed] = record
    order = {"vanilla": 0, "kd": 1}
    found = [dict(sorted(cell.items())) for cell in groups.values()]
    return sorted(found, key=lambda cell: (first(cell)["epochs"], order.get(first(cell)["method"], 2), first(cell)["label"]))


def pairs(found: list[Cell]) -> dict[tuple[str, str, str, str], list[Cell]]:
    """The cells of each (data set, teacher, student, teacher's SHA-256); the student trained alone stands first."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = defaultdict(list)
    alone: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
    for cell in found:
        some, args, epochs = teacher(first(cell)), first(cell)["args"], first(cell)["epochs"]
        if first(cell)["method"] == "vanilla":
            alone[args["dataset"], args["student"], epochs].append(cell)
        else:
            groups[args["dataset"], some["name"], args["student"], some["sha256"]].append(cell)
    for (dataset, _, student, _), group in groups.items():
        lengths = sorted({first(cell)["epochs"] for cell in group})
        group[:0] = [cell for epochs in lengths for cell in alone[dataset, student, epochs]]
    return dict(sorted(groups.items()))


def usual(record: Record) -> int:
    """How many epochs the run's recipe has: 160 by IE-KD's, known by its batch size and milestones, else 240."""
    args = record["args"]
    return 160 if (args["batch_size"], list(args["milestones"])) == (128, [80, 120]) else 240


def is_full(record: Record) -> bool:
    """Whether the run belongs to the benchmark: enough epochs, for it and, as far as that is known, for its teacher."""
    own, others = record["epochs"], teacher(record)["epochs"] or 240
    return record["args"]["dataset"] != "synthetic" and own >= usual(record) and others >= 160


def mark(n: int) -> str:
    """How many seeds, and whether that is fewer than three."""
    return f" ({n})" + " †" * (n < 3)


def spread(values: list[float]) -> str:
    """Mean, standard deviation and number of values: "71.20 ± 0.25 (3)"."""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation}{mark(len(values))}"


def difference(cell: Cell, other: Cell) -> str:
    """Mean difference of the last epochs over common seeds, and its paired 95 % interval: "+0.50 [+0.10, +0.90] (3)"."""
    values = [run["last"] - other[seed]["last"] for seed, run in cell.items() if seed in other]
    n, interval = len(values), ""
    if n > 1:
        half = T[min(n - 1, len(T)) - 1] * stdev(values) / n**0.5
        interval = f" [{mean(values) - half:+.2f}, {mean(values) + half:+.2f}]"
    return f"{mean(values):+.2f}{interval}{mark(n)}" if values else ""


def control(group: list[Cell], some: Record, weights: tuple[float, ...] | None = None) -> Cell:
    """The cell of `group` with the recipe of `some` that is KD with these weights, or else vanilla; empty if there is none."""
    for cell in group:
        method, args = first(cell)["method"], first(cell)["args"]
        same = method == ("kd" if weights else "vanilla") and all(args[flag] == some["args"][flag] for flag in RECIPE)
        if same and (not weights or (args["ce_weight"], args["kd_weight"], args["kd_temperature"]) == weights):
            return cell
    return {}


def listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def device(run: Record) -> str:
    """What the run was made on: a CPU with its threads, or a GPU with its driver."""
    more = f"driver {run.get('driver') or 'unknown'}"
    if run["device"] == "cpu":
        more = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    return f"{run['device']}, {more}"


def row(cell: Cell, group: list[Cell], published: str = "") -> dict[str, str]:
    """A cell as the row of a table, compared with the KD cells of `group`."""
    runs, some = list(cell.values()), first(cell)
    against = {f"against {name}": control(group, some, weights) for name, weights in KD.items()}
    return {
        "run": f"`{some['label']}`" + OURS.get(some["method"], ""),
        "epochs": str(some["epochs"]),
        "published": published,
        "last": spread([run["last"] for run in runs]),
        "best": spread([run["best"] for run in runs]),
        **{name: "" if other is cell else difference(cell, other) for name, other in against.items()},
        "extra parameters": f"{some['parameters']['extra']:,}",
        "minutes": f"{median(run['seconds'] for run in runs) / 60:.1f}",
        "device": listed(map(device, runs)),
        "torch": listed(run["torch"] for run in runs),
        "commit": listed((run["commit"] or "unknown")[:7] + "+" * bool(run["dirty"]) for run in runs),
    }


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table with the columns of the last row, but for those that are empty everywhere."""
    names = [name for name in rows[-1] if any(row.get(name) for row in rows)]
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(words)} |" for words in lines) + "\n\n"


def section(found: list[Cell], cite: Callable[..., str]) -> str:
    """The tables of these cells: the networks trained alone, then a table for each pair. `cite` gives a published number."""
    text = ""
    alone = [cell for cell in found if first(cell)["method"] == "vanilla"]
    if alone:
        named = [{"network": first(cell)["args"]["student"], "data": first(cell)["args"]["dataset"]} for cell in alone]
        text += "### Networks trained alone\n\n" + table([name | row(cell, []) for name, cell in zip(named, alone)])
    for (dataset, name, student, sha256), group in pairs(found).items():
        some = teacher(first(group[-1]))
        text += f"### {name} to {student}, {dataset}\n\n"
        rows = []
        for cell in group:
            usual_length = first(cell)["epochs"] == usual(first(cell))  # the only one that published numbers are about
            rows.append(row(cell, group, cite(dataset, name, student, first(cell)["label"]) if usual_length else ""))
        if sha256:
            epochs = {None: "an unknown number of epochs", 1: "1 epoch"}.get(some["epochs"], f"{some['epochs']} epochs")
            text += f"Teacher: SHA-256 {sha256[:12]}, trained for {epochs}.\n\n"
            published = cite(dataset, name, student, "teacher")
            rows.insert(0, {"run": f"teacher {name}", "published": published, "last": f"{some['accuracy']:.2f}"})
        text += table(rows)
    return text.strip() or "No run is recorded yet."


def document(records: list[Record], published: list[dict[str, Any]]) -> str:
    """The text of results.md."""
    numbers = {(number["dataset"], number["teacher"], number["student"], number["method"]): number for number in published}
    sources: dict[str, int] = {}

    def cite(*key: str) -> str:
        if key not in numbers:
            return ""
        number = numbers[key]
        source = number["source"] + (f" ({number['note']})" if "note" in number else "")
        n = sources.setdefault(source, len(sources) + 1)
        return f"{number['top1']:.2f} {number['protocol'].replace('unknown', '?')} [{n}]"

    full = cells([record for record in records if is_full(record)])
    short = cells([record for record in records if not is_full(record)])
    done = {key[:3] for key in pairs(full)}
    missing = [f"{key[1]}/{key[2]}" + " on CIFAR-10" * (key[0] == "cifar10") for key in numbers if key[:3] not in done]
    return TEMPLATE.read_text("utf-8").format(
        missing=listed(missing) or "none",
        full=section(full, cite),
        short=section(short, lambda *key: ""),
        sources="\n".join(f"{n}. {source}" for source, n in sources.items()) or "None is cited yet.",
    )


def draw(found: list[Cell], folder: Path) -> None:
    """curves.png, test accuracy by epoch, and gains.png, gain over the student trained alone.

    A panel for each pair and number of epochs, from three epochs on, the best run first. A gain is shown where the student
    was trained alone by the same recipe; its bar ends at the mean, its line is the deviation.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figures: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    panels: dict[str, list[Cell]] = defaultdict(list)
    for (dataset, name, student, _), group in pairs(found).items():
        for cell in group:
            if (epochs := first(cell)["epochs"]) >= 3:
                short = "" if is_full(first(cell)) else ": NOT the benchmark"
                panels[f"{name} to {student}, {dataset}, {epochs} epochs{short}"].append(cell)
    if not panels:
        return
    sheet = dict(nrows=len(panels), figsize=(10, 5 * len(panels)), squeeze=False, layout="constrained")
    (curves, curve_axes), (gains, gain_axes) = plt.subplots(**sheet), plt.subplots(**sheet)
    for (title, group), curve, gain in zip(panels.items(), curve_axes.flat, gain_axes.flat):
        for place, cell in enumerate(sorted(group, key=lambda cell: -mean(run["last"] for run in cell.values()))):
            name = f"{first(cell)['label']} ({len(cell)})"
            logs = [[entry["test"] for entry in run["log"] if entry["phase"] == ""] for run in cell.values()]
            style = ("-", "--", ":")[place // 10 % 3]  # there are ten colours
            curve.plot(range(1, len(logs[0]) + 1), [mean(tests) for tests in zip(*logs)], style, label=name)
            alone = control(group, first(cell))
            if alone and cell is not alone:
                values = [run["last"] - mean(other["last"] for other in alone.values()) for run in cell.values()]
                gain.barh(name, mean(values), xerr=stdev(values) if len(values) > 1 else None, color="tab:blue")
        curve.set(title=title, xlabel="epoch", ylabel="test accuracy, mean of the (n) seeds, %")
        curve.xaxis.get_major_locator().set_params(integer=True)
        curve.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
        gain.set(title=title, xlabel="gain over the student alone by the same recipe, last epoch, mean of the (n) seeds, points")
        gain.invert_yaxis()
    folder.mkdir(parents=True, exist_ok=True)
    curves.savefig(folder / "curves.png", dpi=100)
    gains.savefig(folder / "gains.png", dpi=100)


def main(args: Args) -> None:
    flag, folder = ("records", args.records) if args.runs is None else ("runs", args.runs)
    if not folder.is_dir():
        fail(f"--{flag} {folder} is no folder", 2)
    if not args.out.parent.is_dir():
        fail(f"--out {args.out}: there is no folder {args.out.parent}", 2)
    if args.runs is not None:
        collect(args.runs, args.records)
    records = read(args.records)
    args.out.write_text(document(records, json.loads(PUBLISHED.read_text("utf-8"))), "utf-8")
    print(f"{args.out} written from {len(records)} records")
    if args.figures:
        full = [record for record in records if is_full(record)]
        draw(cells(full or records), args.records.parent / "figures")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
