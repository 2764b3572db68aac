"""The records: a line of records.jsonl per finished run, {"run": name of its folder, "result": result.json, "curve": log.jsonl}.

The curve holds the log by columns, to six digits, with null where a row lacks a column. pandas.read_json(..., lines=True) opens
the file; benchmark/report.py --runs adds to it.
"""

import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

APART = ("seed", "device", "data", "runs", "workers", "teacher_weights", "lr", "milestones")  # the curve has the learning rates

Record = dict[str, Any]
Row = list[Record]  # the runs that differ only in their seed, by seed


def words(run: str) -> list[str]:
    """Method and flags in a run's name: ["icd", "--kd-weight 1"]. A very long name has a hash in place of its flags."""
    method, *parts = run.split("__")
    flags = [part.replace("=", " ", 1).replace(",", " ") for part in parts if "=" in part or re.fullmatch("[0-9a-f]{12}", part)]
    return [method, *("--" + flag.removesuffix(".0") for flag in flags if not flag.startswith("teacher-weights"))]


def read(folder: Path) -> Record:
    """A run as a record, in memory also with the keys of its result; one that still trains has only "args"."""
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line, parse_float=lambda digits: float(f"{float(digits):.6g}")) for line in lines]
    result, args = folder / "result.json", folder / "args.json"
    result = json.loads(result.read_text("utf-8")) if result.exists() else {"args": json.loads(args.read_text("utf-8"))}
    curve = {name: [row.get(name) for row in rows] for row in rows for name in row}
    return result | {"run": folder.name, "result": result, "curve": curve}


def load(file: Path) -> list[Record]:
    """The records in `file`."""
    try:
        return [(record := json.loads(line))["result"] | record for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {file} cannot be read ({error}): restore it")


def add(runs: Path, file: Path) -> bool:
    """Add the finished runs in `runs`; False if one was refused. Runs on synthetic or held-out images are no records."""
    records, refused = {record["run"]: record for record in load(file)}, False
    for folder in sorted(result.parent for result in runs.glob("*/result.json")):
        try:
            record = read(folder)
            real = record["args"]["dataset"] != "synthetic" and not record["args"].get("holdout")
            if real and records.setdefault(folder.name, record) != record:
                raise ValueError("its record says something else: rename the folder, or remove that line")
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {folder} is not added: {error}", file=sys.stderr)
            refused = True
    lines = [json.dumps({key: records[run][key] for key in ("run", "result", "curve")}) + "\n" for run in sorted(records)]
    new = file.with_name(file.name + ".tmp")
    new.write_text("".join(lines), "utf-8")
    os.replace(new, file)
    return not refused


def recipe(record: Record) -> list[Any]:
    """What KD must share with a run to be compared with it: teacher, batches, weight decay, the learning rate of each epoch."""
    args, curve, teacher = record["args"], record["curve"], record["teacher"] or {}
    rates = [rate for rate, phase in zip(curve["lr"], curve["phase"]) if not phase]
    return [teacher.get("sha256"), args["batch_size"], args["weight_decay"], rates]


def grouped(records: list[Record]) -> list[Row]:
    """The records in rows: those of three seeds or more first, then the others, each best first."""
    rows: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        flags = {flag: value for flag, value in record["args"].items() if flag not in APART}
        row = rows[json.dumps([record["method"], flags, recipe(record)], sort_keys=True)]
        if (other := row.setdefault(record["args"]["seed"], record)) is not record:
            sys.exit(f"error: the records {other['run']} and {record['run']} are of the same run: remove one")
    return sorted(
        ([row[seed] for seed in sorted(row)] for row in rows.values()),
        key=lambda row: (len(row) < 3, -mean(run["last"] for run in row)),
    )


def is_full(record: Record) -> bool:
    """Whether a run belongs to the benchmark: the published number of epochs, which is the default, and no short teacher."""
    args, teacher, changed = record["args"], record["teacher"] or {}, {word.split()[0] for word in words(record["run"])}
    usual = "--epochs" not in changed or args["epochs"] >= 240 or (args["epochs"], args["batch_size"]) == (160, 128)  # IE-KD's
    return usual and "--init-epochs" not in changed and min(args["epochs"], teacher.get("epochs") or 240) >= 160
