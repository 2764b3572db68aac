"""benchmark/plot.py: a picture of runs that are finished or still train."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import plot

NAMES = [
    "kd__resnet56__resnet20__cifar100__seed1",
    "kd__resnet56__resnet20__cifar100__seed2",
    "vanilla__resnet20__cifar100__seed1",
]
NAMES += [f"icd__resnet56__resnet20__cifar100__alpha={k}__seed1" for k in range(6)]


@pytest.fixture
def runs(tmp_path):
    """Runs that still train, the k-th after k + 2 epochs; the last one, after an epoch of a first phase."""
    for k, name in enumerate([*NAMES, "ft__resnet56__resnet20__cifar100__seed1"]):
        (tmp_path / name).mkdir()
        args = dict(student="resnet20", dataset="cifar100") | ({} if "vanilla" in name else dict(teacher="resnet56"))
        (tmp_path / name / "args.json").write_text(json.dumps(args))
        rows = [dict(phase="", epoch=epoch, test=10.0 * k + epoch) for epoch in range(1, k + 3)]
        rows = [dict(phase="init", epoch=1, loss=1.0)] if "ft" in name else rows
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_six_curves_are_told_apart_among_them_vanilla_and_kd(runs, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    plot.main(tuple(sorted(runs.iterdir())))
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "resnet56 → resnet20, cifar100"
    labels = [text.get_text() for text in axes.texts]
    assert labels == [*(f"icd --alpha {k}  {10 * (k + 3) + k + 5}.0" for k in (5, 4, 3, 2)), "vanilla  24.0", "kd  7.0"]
    (kd,) = [line for line in axes.lines if line.get_color() == axes.texts[-1].get_color()]
    assert list(kd.get_ydata()) == [6.0, 7.0]  # the mean of both seeds, as far as both are
    assert [line.get_color() for line in axes.lines].count("#d8d8d8") == 2


def test_a_picture_of_running_runs(runs):
    pytest.importorskip("matplotlib")
    plot.main(tuple(runs.iterdir()), out=runs / "curves.png")
    assert (runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_one_line(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        plot.main(tuple(runs.iterdir()))
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="no run has finished an epoch"):
        plot.main((runs / "ft__resnet56__resnet20__cifar100__seed1", runs / "logs"))
