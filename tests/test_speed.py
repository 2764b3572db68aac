"""benchmark/speed.py: its table and its JSON agree, it races the real step, and a wrong loop fails it. No time is asserted."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("speed", ROOT / "benchmark" / "speed.py")
speed = sys.modules["speed"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(speed)


def args(tmp_path: Path, **more) -> "speed.Args":
    tiny = dict(pair="resnet14/resnet8", rounds=1, steps=2, batch_size=8, workers=1, device="cpu", json=tmp_path / "speed.json")
    return speed.Args(**tiny | more)


def test_the_table_and_its_json(tmp_path, capsys):
    speed.main(args(tmp_path))
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert facts["right"] and facts["views_unlike"] == 0 and facts["step_unlike"] < 1e-9
    assert (facts["pair"], facts["rounds"], facts["torch"]) == ("resnet14/resnet8", 1, torch.__version__)
    assert list(facts["loops"]) == ["ours", "peer-like, resident", "peer-like"]
    printed = capsys.readouterr().out
    for name, row in facts["loops"].items():
        (seconds,) = row["seconds"]
        assert row["ratio"] == row["min"] == row["max"] == seconds / facts["loops"]["ours"]["seconds"][0]
        assert f"{name:24}{1000 * seconds / 2:9.2f}   {row['ratio']:.2f} (" in printed


def test_the_step_is_that_of_kd():
    def step(file: str) -> str:
        tree = ast.parse((ROOT / file).read_text())
        return next(ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "step")

    assert step("benchmark/speed.py") == step("methods/kd.py")


def test_a_wrong_step_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "kd_loss", lambda z_s, z_t, temperature: 0.5 * speed.kd.kd_loss(z_s, z_t, temperature))
    with pytest.raises(SystemExit) as end:
        speed.main(args(tmp_path, steps=1))
    assert end.value.code == 1
    assert "error:" in capsys.readouterr().err
    assert json.loads((tmp_path / "speed.json").read_text())["right"] is False


def test_wrong_views_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.Images, "normalise", lambda self, pixels: pixels / 255 - 0.5)
    with pytest.raises(SystemExit) as end:
        speed.main(args(tmp_path, steps=1))
    assert end.value.code == 1
    assert json.loads((tmp_path / "speed.json").read_text())["views_unlike"] == 200


@pytest.mark.parametrize("wrong", [{"pair": "resnet56"}, {"pair": "resnet56/no"}, {"dataset": "no"}, {"rounds": 0}])
def test_bad_flags(tmp_path, wrong):
    with pytest.raises(SystemExit) as end:
        speed.main(args(tmp_path, **wrong))
    assert end.value.code == 2
