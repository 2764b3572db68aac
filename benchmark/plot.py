"""Draws the learning curves of runs, finished or still training: python benchmark/plot.py runs/* --out curves.png

Seeds form one curve, their mean, in a band from lowest to highest; a running median smooths long curves. At most six are told
apart: the best, with vanilla and kd always among them. Needs matplotlib.
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import tyro
from records import Record, read, words

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # color-blind readers tell them apart too
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold"}
STYLE |= {"axes.grid": True, "axes.grid.axis": "y", "grid.color": "#eeeeee", "axes.axisbelow": True, "axes.xmargin": 0.01}


def draw(records: list[Record], out: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    runs = defaultdict(list)
    for record in records:
        args, (method, *flags) = record["result"]["args"], words(record["run"])
        pair = " → ".join(args[role] for role in ("teacher", "student") if args.get(role))
        runs[method, *flags, args["dataset"], pair].append([test for test in record["curve"].get("test", []) if test is not None])
    curves = {key: [(mean(y), min(y), max(y)) for y in zip(*filter(None, seeds))] for key, seeds in runs.items() if any(seeds)}
    longest = max(curves, key=lambda key: len(key[-1]), default=None) or sys.exit("error: no run has finished an epoch")
    common = longest[1:] if len(curves) > 1 else longest[-2:]
    shared = [word for word in common if all(word in key or word.endswith(key[-1]) for key in curves)]  # vanilla has no teacher
    hidden = {*shared, *(key[-1] for key in curves if longest[-1] in shared)}
    ranked = sorted(curves, key=lambda key: (key[0] in ("vanilla", "kd") and hidden.issuperset(key[1:]), curves[key][-1]))
    told = dict(zip(sorted(ranked[-6:], key=lambda key: curves[key][-1], reverse=True), COLORS))
    plt.style.use(STYLE)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for key in [key for key in ranked if key not in told] + [*told]:
        means, lowest, highest = zip(*curves[key])
        epochs, near = range(1, len(means) + 1), len(means) // 100
        smooth = [median(means[max(0, epoch - 1 - near) : epoch + near]) for epoch in epochs]
        axes.plot(epochs, smooth, color=told.get(key, "#d8d8d8"), linewidth=1 + (key in told))
        axes.fill_between(epochs, lowest, highest, color=told.get(key, "none"), alpha=0.15)
    (low, high), top = axes.set_ylim(bottom=min(curve[len(curve) // 10][1] for curve in curves.values())), 1.05
    for key, color in told.items():
        y, text = curves[key][-1][0], " ".join(word for word in key if word not in hidden)
        top, line = min((y - low) / (high - low), top - 0.05), dict(arrowstyle="-", color=color, lw=0.6, relpos=(0, 0.5))
        axes.annotate(f"{text}  {y:.1f}", (len(curves[key]), y), (1.04, top), "data", "axes fraction", line, va="center", c=color)
    axes.locator_params(axis="x", integer=True)
    axes.set(title=", ".join(shared[::-1]), ylabel="test accuracy, %", xlabel="epoch" + " (gray: others)" * (len(ranked) > 6))
    figure.savefig(out, dpi=160)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, out: Path = Path("curves.png")) -> None:
    draw([read(run) for run in runs if (run / "log.jsonl").exists()], out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
