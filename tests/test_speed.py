"""benchmark/speed.py: who takes how many steps, ratios within a round, the same training in both loops. No time is asserted."""

import json
from itertools import islice

import pytest
import torch
from golden import load

speed = load("speed", "benchmark")
import common
from methods import kd


def args(**more):
    tiny = dict(pair="resnet8/resnet8", rounds=2, steps=3, batch_size=8, workers=1, device="cpu")
    return speed.Args(**tiny | more)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return speed.Bench(args(), tmp_path_factory.mktemp("bench"))


def test_ratios_are_taken_within_a_round():
    assert speed.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 8.0]) == dict(time=2, low=0.5, high=3)  # not 4 / 8, of the medians


def test_the_loops_beside_each_other(tmp_path, capsys):
    speed.main(args(rounds=1, json=tmp_path / "speed.json"))
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert (facts["pair"], facts["rounds"], facts["torch"]) == ("resnet8/resnet8", 1, torch.__version__)
    assert list(facts["loops"]) == ["ours", "peer-like"]
    printed, (own,) = capsys.readouterr().out, facts["loops"]["ours"]["seconds"]
    for name, row in facts["loops"].items():
        (seconds,) = row["seconds"]
        assert row["time"] == row["low"] == row["high"] == seconds / own and row["ms"] == 1000 * seconds / 3
        assert f"{name:15}{row['ms']:9.2f} ms per step, {row['time']:.2f} times ours" in printed
    # by hand: 3 multiply-adds per weight and place in training, 1 in the frozen teacher; no gradient of the images
    places, weights = (32 * 32, 16 * 16, 8 * 8), (4608, 512 + 4608 + 9216, 2048 + 18432 + 36864)
    stem, rest = 432 * 32 * 32, sum(map(int.__mul__, places, weights)) + 64 * 100
    assert facts["gflop"] == pytest.approx(2 * 8 * (4 * rest + 3 * stem) / 1e9)


@pytest.mark.parametrize("method, phases", [("kd", 1), ("ft", 2), ("crld", 1)])
def test_a_method_and_its_rivals_take_turns(bench, monkeypatch, method, phases):
    order, cuda_graph = [], common.cuda_graph

    def counted(step):
        def call(*batch):
            order.append("ours")
            return step(*batch)

        return cuda_graph(call)

    monkeypatch.setattr(common, "cuda_graph", counted)
    _, _, seconds = bench.drive(method, {"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    ours = ["ours"] * 3
    assert order == ["ours"] * 5 * phases + [*ours, "a", "b", "a", "b", *ours, "b", *ours, "a"]
    assert {name: len(values) for name, values in seconds.items()} == dict(ours=2, a=2, b=2)  # the first does not count


def test_a_drive_leaves_nothing_behind(bench):
    bench.drive("kd")
    assert kd.load_data is common.load_data and kd.cuda_graph is common.cuda_graph and "epoch" not in vars(bench.train)


def test_both_loops_train_alike(bench, monkeypatch):
    nets = []

    def build(name, classes, device="cpu"):
        torch.manual_seed(1)
        nets.append(common.build(name, classes, device))
        return nets[-1]

    monkeypatch.setitem(bench.flags, "lr", 0.05)
    monkeypatch.setattr(bench, "kd_args", bench.method_args(kd))
    views = [(x.contiguous(), y) for x, y, _ in islice(speed.Resident.epoch(bench.train, 1), 5)]
    monkeypatch.setattr(speed, "DataLoader", lambda *args, **more: views)
    monkeypatch.setattr(speed, "build", build)
    monkeypatch.setattr(kd, "build", build)
    bench.drive("kd")
    bench.peer()()
    ours, _, peer = nets
    assert all(weight.is_contiguous() for weight in peer.parameters())  # the default memory format
    start = build("resnet8", 100)
    for a, b, c in zip(ours.parameters(), peer.parameters(), start.parameters()):
        assert (a - b).norm() < 0.02 * (a - c).norm()  # float32 in another order


def test_the_peers_images_are_augmented_and_normalized(bench, monkeypatch):
    loaders, loader = [], speed.DataLoader
    monkeypatch.setattr(speed, "DataLoader", lambda *args, **more: loaders.append(loader(*args, **more)) or loaders[-1])
    bench.peer()
    images = loaders[0].dataset
    assert len(images) == 3 * 8 and images[0][0].shape == (3, 32, 32) and len({images[0][0].sum().item() for _ in range(9)}) > 1
    images.transform.transforms[:2] = []
    whole = next(iter(bench.train.batches()))[0]
    assert torch.equal(torch.stack([images[i][0] for i in range(24)]), whole[:24])


def test_methods_beside_vanilla(tmp_path, monkeypatch, capsys):
    (tmp_path / "methods").mkdir()
    (tmp_path / "benchmark").mkdir()
    for method in "icd", "ofd", "vanilla":
        (tmp_path / "methods" / f"{method}.py").touch()
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    speed.main(args(methods=True, pair="shufflenetv1/resnet8"))
    vanilla, second = json.loads((tmp_path / "benchmark" / "speed-methods.json").read_text())["rows"]
    assert (vanilla["method"], second["method"]) == ("vanilla", "icd") and {"time", "low", "high", "extra", "memory"} < {*second}
    assert vanilla["extra"] == 0 and second["extra"] == 64 * 128 + 960 * 128 + 2 * 128 + 2
    assert vanilla["memory"] == pytest.approx(1, abs=0.01) and second["memory"] > 1
    assert all(row["low"] <= row["time"] <= row["high"] for row in (vanilla, second))
    out, err = capsys.readouterr()
    assert "icd" in out and "ofd" not in out and "ShuffleNets lack" in err


def test_memory_counts_what_a_method_keeps(bench):
    """CRD keeps two vectors of 128 floats for each of the 50,000 images; besides, it makes many negatives per step."""
    bank = 2 * 128 * 50_000 * 4
    assert bank < bench.memory("crd") - bench.memory("icd") < 3 * bank


@pytest.mark.parametrize("wrong", [{"pair": "resnet8"}, {"pair": "resnet8/no"}, {"rounds": 0}, {"device": "tpu"}])
def test_bad_flags(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        speed.main(args(**wrong))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
