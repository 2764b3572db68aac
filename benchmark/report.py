"""Makes the tables of results.md from records.jsonl and published.json alone, so that anyone can make them again.

A row holds runs that differ only in their seed; a table, the rows of one student, data set and number of epochs: rows of three
seeds or more first, then the others, each best first. What follows the tables in results.md is written by hand and kept.

    python benchmark/report.py                      # results.md again
    python benchmark/report.py --runs runs          # first add the finished runs in runs/ to records.jsonl
    python benchmark/report.py --figures            # also figures/curves.png, of the first table; needs matplotlib
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import tyro
from records import Row, add, grouped, is_full, load, recipe, words

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.md"
BY_HAND = "## How to read the tables\n"
HEAD = """# Results

Top-1 accuracy on the test images, in percent. † fewer than three seeds: a small gap means nothing. ‡ a teacher with public
weights, not the one behind the published numbers. [How to read the tables](#how-to-read-the-tables).

"""
SHORT = """## Short schedules: NOT the benchmark

Few epochs or a short teacher: not to be compared with published numbers. Five epochs favor large loss weights, and the order need
not hold after 240. R2KD with an augmented batch runs the student on twice the images; KD on the same batches has not been run.

"""
COST = "## What a method costs\n\nA step relative to vanilla: {pair}, batches of {batch_size}, {device}, torch {torch}. "
COST += "The machine was not idle: vanilla beside itself shows the noise.\n\n"
FORMS = dict(method="`{method}`", time="{time:.2f} ({low:.2f} to {high:.2f})", memory="{memory:.2f}", parameters="+{extra:,}")
KD = {"against KD": (0.1, 0.9, 4), "against KD 1/1": (1, 1, 4)}  # weight of the labels, weight of the teacher, temperature
OURS = {"dual_aug": " (reconstruction)"} | dict.fromkeys(("ie_at", "ie_dml", "ie_od"), " (our definition)")
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last also for more, for which it is slightly too wide
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass
class Args:
    runs: Path | None = None
    """folder of runs; the finished ones are first added to --records"""
    records: Path = HERE / "records.jsonl"
    """the records"""
    out: Path = RESULTS
    """the file to write"""
    figures: bool = False
    """also draw the learning curves of the first table, into figures/ beside --records"""


class Published:
    """The published numbers, and the sources cited so far."""

    def __init__(self, file: Path):
        content = json.loads(file.read_text("utf-8"))
        self.sources, self.rows, self.cited = content["sources"], content["rows"], []

    def cite(self, *place: str | None, run: list[str]) -> str:
        """What is published for a data set, teacher, student and run: "70.66 last [1]; 71.54 ? [2]"."""
        found = []
        for *other, name, top1, protocol, source, note in [(*row, "")[:8] for row in self.rows]:
            if tuple(other) == place and {*re.split(" (?=--)", name)} == {*run}:
                text = f"{self.sources[source]}; {note}".removesuffix("; ")
                self.cited += [text] if text not in self.cited else []
                found.append(f"{top1:.2f} {protocol.replace('unknown', '?')} [{self.cited.index(text) + 1}]")
        return "; ".join(found)


def listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def spread(row: Row, key: str) -> str:
    """Mean and standard deviation over the seeds: "71.20 ± 0.25"."""
    values = [run[key] for run in row]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def difference(row: Row, kd: Row) -> str:
    """Mean difference in the last epoch over common seeds, with its paired 95 % interval: "+0.50 [+0.10, +0.90]"."""
    last = {run["args"]["seed"]: run["last"] for run in kd}
    values = [run["last"] - last[run["args"]["seed"]] for run in row if run["args"]["seed"] in last]
    text = f"{mean(values):+.2f}" if values else ""
    if (n := len(values)) > 1:
        half = T[min(n - 1, len(T)) - 1] * stdev(values) / n**0.5
        text += f" [{mean(values) - half:+.2f}, {mean(values) + half:+.2f}]"
    return text + f" ({n})" * (0 < n < len(row))


def against(row: Row, table: list[Row], weights: tuple[float, ...]) -> str:
    """The difference to the KD of the same recipe that has these weights."""
    for kd in [other for other in table if other is not row and other[0]["method"] == "kd"]:
        args = kd[0]["args"]
        if (args["ce_weight"], args["kd_weight"], args["kd_temperature"]) == weights and recipe(kd[0]) == recipe(row[0]):
            return difference(row, kd)
    return ""


def taught(run: dict[str, Any]) -> str:
    """The teacher: name, accuracy, SHA-256, and how long it was trained if that was short."""
    teacher = run["teacher"]
    if not teacher:
        return f"{run['args']['peer']} as a peer" if "peer" in run["args"] else ""
    sha256 = teacher["sha256"][:8]
    public = Path(teacher["source"]).stem.endswith(f"-{sha256}")  # how torch.hub names public weights
    short = f", {n} epoch{'s' * (n > 1)}" if (n := teacher["epochs"] or 240) < 160 else ""
    return f"{teacher['name']} {teacher['accuracy']:.2f}" + " ‡" * public + f", {sha256}{short}"


def device(run: dict[str, Any]) -> str:
    more = f"{run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device"] == "cpu" else f"driver {run['driver']}"
    return f"{run['device']}, {more}"


def line(row: Row, table: list[Row], published: Published | None) -> dict[str, str]:
    """A row of a table, by columns."""
    run, (method, *flags) = row[0], words(row[0]["run"])
    parameters, place = run["parameters"], (run["args"]["dataset"], (run["teacher"] or {}).get("name"), run["args"]["student"])
    kept = parameters["at_test"] - parameters["student"]
    return {
        "run": f"`{' '.join([method, *(flag for flag in flags if not flag.startswith('--epochs'))])}`{OURS.get(method, '')}",
        "seeds": f"{len(row)}" + " †" * (len(row) < 3),
        "last": spread(row, "last"),
        "best": spread(row, "best"),
        **{name: against(row, table, weights) for name, weights in KD.items()},
        "published": published.cite(*place, run=[method, *flags]) if published else "",
        "teacher": taught(run),
        "extra parameters": f"{parameters['extra']:,}" + f" ({kept:,} of them at inference)" * (kept != 0),
        "minutes": f"{median(run['seconds'] for run in row) / 60:.1f}",
        "device": listed(map(device, row)),
        "torch": listed(run["torch"] for run in row),
        "commit": listed((run["commit"] or "unknown")[:7] + "+" * bool(run["dirty"]) for run in row),
        "resumed": ", ".join(str(run.get("resumed", 0)) for run in row) if any(run.get("resumed") for run in row) else "",
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """A table, without the columns that are empty everywhere."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "".join(f"| {' | '.join(words)} |\n" for words in lines) + "\n"


def tables(rows: list[Row]) -> list[list[Row]]:
    """The rows of each student, data set and number of epochs, the largest table first."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[0]["args"][flag] for flag in ("student", "dataset", "epochs"))].append(row)
    return sorted(found.values(), key=len, reverse=True)


def section(rows: list[Row], published: Published | None) -> str:
    text = ""
    for table in tables(rows):
        args = table[0][0]["args"]
        text += f"### {args['student']} on {args['dataset']}, {args['epochs']} epoch{'s' * (args['epochs'] > 1)}\n\n"
        text += markdown([line(row, table, published) for row in table])
    return text


def transfer(rows: list[Row], published: Published) -> str:
    """The runs of linear_probe.py, then what is published for the same data sets."""
    names, lines = ("student", "trained by", "protocol", "data set", "last", "best", "published"), []
    for row in rows:
        args, weights = row[0]["args"], Path(row[0]["args"]["weights"])
        trained = " ".join(words(weights.parent.name)) if "__" in weights.parent.name else weights.stem
        accuracies = [spread(row, "last"), spread(row, "best")]
        lines.append([args["student"], f"`{trained}`", args["protocol"], args["dataset"], *accuracies])
    for dataset, teacher, student, run, *_ in published.rows:
        if (target := dataset.rpartition("->")[2]) != dataset and target in {line[3] for line in lines}:
            number = published.cite(dataset, teacher, student, run=re.split(" (?=--)", run))
            lines.append([student, f"`{run}`" + f" with {teacher}" * bool(teacher), "", target, "", "", number])
    text = "## Transfer: a linear classifier on frozen features\n\n"
    return text + markdown([dict(zip(names, line)) for line in lines]) if lines else ""


def document(full: list[Row], short: list[Row], probes: list[Row], published: Published) -> str:
    """The generated part of results.md."""
    text = HEAD + ("## The benchmark: full runs\n\n" + section(full, published) if full else "")
    text += SHORT + section(short, None) if short else ""
    if (cost := HERE / "speed-methods.json").exists():  # written by speed.py --methods
        facts = json.loads(cost.read_text("utf-8"))
        lines = [{name: form.format(**row) for name, form in FORMS.items()} for row in facts["rows"]]
        text += COST.format(**facts) + markdown(lines)
    text += transfer(probes, published)
    if published.cited:
        text += "## Sources of the published numbers\n\n"
        text += "".join(f"{n}. {source}\n" for n, source in enumerate(published.cited, 1)) + "\n"
    return text


def main(args: Args) -> None:
    complete = add(args.runs, args.records) if args.runs else True
    records = load(args.records)
    probes = grouped([record for record in records if record["method"] == "linear_probe"])
    rows = grouped([record for record in records if record["method"] != "linear_probe"])
    full, short = [row for row in rows if is_full(row[0])], [row for row in rows if not is_full(row[0])]
    by_hand = "".join(RESULTS.read_text("utf-8").partition(BY_HAND)[1:])
    args.out.write_text(document(full, short, probes, Published(HERE / "published.json")) + by_hand, "utf-8")
    print(f"{args.out} written from {len(records)} records")
    if args.figures:
        from plot import draw

        (folder := args.records.parent / "figures").mkdir(exist_ok=True)
        draw([run for row in tables(full or short)[0] for run in row], folder / "curves.png")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
