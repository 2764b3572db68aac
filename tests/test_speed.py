"""benchmark/speed.py: its table and its JSON agree, it races the real step, and a wrong loop fails it. No time is asserted."""

import ast
import json
from pathlib import Path

import pytest
import torch
from harness import ROOT, load

speed = load("speed", "benchmark")


def args(tmp_path: Path, **more) -> "speed.Args":
    tiny = dict(pair="resnet14/resnet8", rounds=1, steps=2, batch_size=8, workers=1, device="cpu", json=tmp_path / "speed.json")
    return speed.Args(**tiny | more)


def test_the_table_and_its_json(tmp_path, capsys):
    speed.main(args(tmp_path))
    facts = json.loads((tmp_path / "speed.json").read_text())
    views, step, alike, resumed = facts["checks"].values()
    assert facts["right"] and views == alike == resumed == 0 and step < 1e-9
    assert (facts["pair"], facts["rounds"], facts["torch"]) == ("resnet14/resnet8", 1, torch.__version__)
    assert list(facts["loops"]) == ["ours", "peer-like, resident", "peer-like"]
    printed = capsys.readouterr().out
    for name, row in facts["loops"].items():
        (seconds,) = row["seconds"]
        assert row["ratio"] == row["min"] == row["max"] == seconds / facts["loops"]["ours"]["seconds"][0]
        assert f"{name:34}{1000 * seconds / 2:9.2f}   {row['ratio']:.2f} (" in printed
    bounds = facts["yardsticks"]
    assert bounds["arithmetic_ms"] == pytest.approx(1000 * bounds["gflop"] / bounds["product_gflop_s"])


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
    assert json.loads((tmp_path / "speed.json").read_text())["checks"]["views unlike torchvision's, of 200"] == 200


def test_a_rate_that_does_not_fall_after_a_resume_fails(tmp_path, monkeypatch, capsys):
    schedule = torch.optim.lr_scheduler.MultiStepLR
    monkeypatch.setattr(schedule, "load_state_dict", lambda self, state: None)  # it begins again at epoch 0
    with pytest.raises(SystemExit) as end:
        speed.main(args(tmp_path, steps=1))
    assert end.value.code == 1
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert not facts["right"] and facts["checks"]["run unlike the whole, eager one: resumed"] > 0


def test_variants_and_several_at_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))  # where the processes find this module
    speed.main(args(tmp_path, variants=True, at_once=(1, 2)))
    facts = json.loads((tmp_path / "speed.json").read_text())
    on_cpu = [f"ours, {variant}" for variant in speed.VARIANTS if "stream" not in variant]
    assert list(facts["loops"]) == ["ours", *on_cpu, "peer-like, resident", "peer-like"]
    assert list(facts["at_once"]) == ["1", "2"] and min(facts["at_once"].values()) > 0


@pytest.mark.parametrize("variant", ["", *(variant for variant in speed.VARIANTS if "stream" not in variant)])
def test_a_variant_changes_nothing_but_its_name_says(variant, monkeypatch):
    """The loss of the first epoch is the same to rounding, bfloat16's to its own."""
    raw = speed.DATASETS["synthetic"](Path())
    kd_args = speed.kd.Args("resnet14", "resnet8", device="cpu", batch_size=8, lr=0.05)
    train = speed.Images(raw.train[0][:8], raw.train[1][:8], raw, kd_args)
    (loss, _), (plain, _) = (speed.our_loop(kd_args, train, variant=name)(1) for name in (variant, ""))
    assert loss == pytest.approx(plain, rel=2e-2 if variant == "bfloat16" else 1e-5)


def test_the_arithmetic_is_that_of_the_networks():
    """Of resnet8 by hand: 3 multiply-adds a weight and place in training, 1 in the frozen teacher; no input gradient first."""
    kd_args = speed.kd.Args("resnet8", "resnet8", device="cpu", batch_size=2, lr=0.05)
    places, weights = (32 * 32, 16 * 16, 8 * 8), (4608, 512 + 4608 + 9216, 2048 + 18432 + 36864)
    stem, rest = 432 * 32 * 32, sum(map(int.__mul__, places, weights)) + 64 * 100
    assert speed.yardsticks(kd_args, 100)["gflop"] == pytest.approx(2 * 2 * (4 * rest + 3 * stem) / 1e9)


@pytest.mark.parametrize("wrong", [{"pair": "resnet56"}, {"pair": "resnet56/no"}, {"dataset": "no"}, {"rounds": 0}])
def test_bad_flags(tmp_path, wrong):
    with pytest.raises(SystemExit) as end:
        speed.main(args(tmp_path, **wrong))
    assert end.value.code == 2
