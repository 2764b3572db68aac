import json

import pytest
import torch
from harness import Case, Drive, common, load, same, small_data
from torch import nn

ab = load("ab")


def shape(tensor):
    return tuple(tensor.shape[1:])


@pytest.mark.parametrize("name", ["ab_stages", "ab_original"])
def test_golden(name):
    case = Case(name)
    maps_s, maps_t = ([case[f"{side}{k}"] for k in (1, 2, 3)] for side in "st")
    loss = ab.AB([shape(s) for s in maps_s], [shape(t) for t in maps_t])
    assert not list(loss.parameters())
    case.check(ab.Args().ab_weight * loss(maps_s, maps_t))


def test_golden_connector():
    case = Case("ab_connector")
    loss = ab.AB([shape(case["s"])], [shape(case["t"])]).train()
    ends = ("weight", "bias")
    case.fill(loss, {f"connectors.0.{k}.{end}": f"{layer}.{end}" for k, layer in enumerate(["conv", "bn"]) for end in ends})
    case.check(ab.Args().ab_weight * loss([case["s"]], [case["t"]]), no_gradient=("conv.bias",))  # batch norm takes the mean off


def test_slow_formula():
    torch.manual_seed(0)
    u, v = [torch.randn(2, 3, 2, 2).double() * 2 for _ in range(4)], [torch.randn(2, 3, 2, 2).double() for _ in range(4)]
    for margin in (1.0, 0.3):
        expected = 0.0
        for k in range(4):
            for a, b in zip(u[k].flatten().tolist(), v[k].flatten().tolist()):
                wrong = (a - margin) ** 2 * (a <= margin) if b > 0 else (a + margin) ** 2 * (a > -margin)
                expected += 2 ** (k - 3) / 2 * wrong
        loss = ab.AB([(3, 2, 2)] * 4, [(3, 2, 2)] * 4, margin)
        assert loss(u, v).item() == pytest.approx(expected, rel=1e-12)


def test_zero_beyond_the_margin_only():
    torch.manual_seed(0)
    v = torch.randn(4, 3, 2, 2)
    loss = ab.AB([(3, 2, 2)], [(3, 2, 2)])
    assert loss([torch.where(v > 0, 1.0, -1.0)], [v]).item() == 0
    assert loss([torch.where(v > 0, 200.0, -200.0)], [v]).item() == 0
    assert loss([torch.where(v > 0, 0.99, -0.99)], [v]).item() > 0
    assert loss([v], [v]).item() > 0
    assert loss([torch.zeros_like(v)], [torch.zeros_like(v)]).item() == pytest.approx(12)


@pytest.mark.parametrize(
    ("side_s", "side_t", "kind", "kernel"),
    [(8, 8, nn.Conv2d, 1), (16, 8, nn.Conv2d, 3), (4, 8, nn.ConvTranspose2d, 4), (8, 6, nn.Conv2d, 3)],
)
def test_connectors(side_s, side_t, kind, kernel):
    connector = ab.connector((5, side_s, side_s), (7, side_t, side_t))
    assert isinstance(connector[0], kind)
    assert connector[0].kernel_size == (kernel, kernel)
    assert len(connector) == 2  # no ReLU: what is compared has two signs
    assert connector(torch.randn(2, 5, side_s, side_s)).shape == (2, 7, side_t, side_t)


def test_a_map_too_small_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        ab.connector((5, 4, 4), (7, 32, 32))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: AB has no connector from the student's 4x4 map to the teacher's 32x32\n"


BEHIND = {
    "resnet8": {"fc"},
    "wrn_16_1": {"bn1", "fc"},
    "vgg8": {"classifier"},
    "mobilenetv2": {"conv2.0", "conv2.1", "classifier.0"},
    "shufflenetv1": {"linear"},
    "shufflenetv2": {"conv2", "bn2", "linear"},
    "resnet50": {"linear"},
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_lies_behind_the_maps(name):
    net = common.build(name, 10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    behind = set(ab.behind_maps(net, "cpu"))
    assert {key for key, module in net.named_modules() if module in behind} == BEHIND[name]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1"])
def test_stage_1_leaves_what_lies_behind_the_maps_and_stage_2_goes_on_with_the_student(student, monkeypatch):
    drive = Drive(monkeypatch, "ab", student=student)
    before, after = drive.before["init"], drive.after["init"]
    behind = {name for name in before if name.startswith(tuple(f"student.{part}." for part in BEHIND[student]))}
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == behind
    assert all(torch.equal(after[name], value) for name, value in drive.before[""].items())
    moved = {name for name, value in drive.before[""].items() if not torch.equal(value, drive.after[""][name])}
    assert moved == set(drive.before[""])
    assert [(len(means), test is None) for _, means, test, _ in drive.rows] == [(1, True), (2, False)]


def test_a_wrn_student_is_compared_through_a_batch_norm_that_changes_nothing():
    torch.manual_seed(0)
    net = common.build("wrn_16_1", 10)
    behind = ab.behind_maps(net, "cpu")
    net.train()
    behind.eval()
    _, features = net(torch.randn(4, 3, 32, 32))
    assert torch.allclose(features.preacts[-1], features.maps[-1], rtol=1e-4, atol=1e-6)


def test_unequal_numbers_of_stages_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        Drive(monkeypatch, "ab", student="vgg8")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: AB compares stage by stage: vgg8 has 4 stages, resnet14 3\n"


class Stop(Exception):
    pass


def weights_and_rows(monkeypatch, method, runs, stop_at=0, **flags):
    """Run `method` on a few images in a run folder under `runs`; stopped before step `stop_at`, it is started a second time."""
    module, steps, opened = load(method), [], []

    class Run(common.Run):
        def __init__(self, script, args):
            super().__init__(script, args)
            opened.append(self)

    def teacher(args, test):
        torch.manual_seed(1000)
        net = common.build(args.teacher, test.classes).eval().requires_grad_(False)
        net.record = {}
        return net

    def counted(step):
        def call(*tensors):
            steps.append(1)
            if len(steps) == stop_at:
                raise Stop
            return step(*tensors)

        return call

    monkeypatch.setattr(common, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(common.os, "fsync", lambda _: None)
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    for name, stand_in in dict(Run=Run, load_data=small_data, load_teacher=teacher, graphed=counted).items():
        monkeypatch.setattr(module, name, stand_in)
    args = dict(teacher="resnet14", student="resnet8", dataset="synthetic", device="cpu", epochs=2, batch_size=16, runs=runs)
    args |= flags
    if stop_at:
        with pytest.raises(Stop):
            module.main(module.Args(**args))
        opened[0].lock.close()
    module.main(module.Args(**args))
    rows = [json.loads(line) for line in (opened[-1].folder / "log.jsonl").read_text().splitlines()]
    weights = torch.load(opened[-1].folder / "student.pt", weights_only=True)
    opened[-1].lock.close()
    return weights, [{name: value for name, value in row.items() if name != "seconds"} for row in rows], len(steps)


def check_resume(monkeypatch, tmp_path, method, stops, **flags):
    """Stopped before any step of `stops` and started again, `method` ends with the weights and rows of an uninterrupted run."""
    weights, rows, steps = weights_and_rows(monkeypatch, method, tmp_path / "whole", **flags)
    assert steps > max(stops)
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        again, rows_again, steps_again = weights_and_rows(monkeypatch, method, folder, stop_at=stop, **flags)
        assert same(weights, again), stop
        assert rows == rows_again, stop
        assert steps_again < steps + 5, stop  # what was done is not done again


def test_resumes_in_either_stage(monkeypatch, tmp_path):
    check_resume(monkeypatch, tmp_path, "ab", stops=(5, 11), init_epochs=2)  # in the second epoch of each stage


def test_connectors_of_the_pair_with_the_largest_maps():
    mobilenetv2, resnet50 = (common.shapes(common.build(name, 10)).preacts[1:] for name in ("mobilenetv2", "resnet50"))
    assert all(isinstance(connector[0], nn.ConvTranspose2d) for connector in ab.AB(mobilenetv2, resnet50).connectors)
