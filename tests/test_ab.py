import pytest
import torch
from golden import Case, load
from running import Drive, common
from torch import nn

ab = load("ab")
BEHIND = {  # what lies behind the last map
    "resnet8": {"fc"},
    "wrn_16_1": {"bn1", "fc"},
    "vgg8": {"classifier"},
    "mobilenetv2": {"conv2.0", "conv2.1", "classifier.0"},
    "shufflenetv1": {"linear"},
    "shufflenetv2": {"conv2", "bn2", "linear"},
    "resnet50": {"linear"},
}


@pytest.mark.parametrize("name", ["ab_stages", "ab_original"])
def test_golden(name):
    case = Case(name)
    maps_s, maps_t = ([case[f"{side}{k}"] for k in (1, 2, 3)] for side in "st")
    loss = ab.AB([s.shape[1:] for s in maps_s], [t.shape[1:] for t in maps_t], margin=1.0)
    assert not list(loss.parameters())
    case.check(ab.Args().ab_weight * loss(maps_s, maps_t))


def test_golden_connector():
    case = Case("ab_connector")
    loss = ab.AB([case["s"].shape[1:]], [case["t"].shape[1:]], margin=1.0)
    ends = ("weight", "bias")
    case.fill(loss, {f"connectors.0.{k}.{end}": f"{layer}.{end}" for k, layer in enumerate(["conv", "bn"]) for end in ends})
    case.check(ab.Args().ab_weight * loss([case["s"]], [case["t"]]), no_gradient=("conv.bias",))  # batch norm removes the mean


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_slow_formula(margin):
    torch.manual_seed(0)
    u, v = [torch.randn(2, 3, 2, 2).double() * 2 for _ in range(4)], [torch.randn(2, 3, 2, 2).double() for _ in range(4)]
    expected = 0.0
    for k in range(4):
        for a, b in zip(u[k].flatten().tolist(), v[k].flatten().tolist()):
            cost = (a - margin) ** 2 * (a <= margin) if b > 0 else (a + margin) ** 2 * (a > -margin)
            expected += 2 ** (k - 3) / 2 * cost
    loss = ab.AB([(3, 2, 2)] * 4, [(3, 2, 2)] * 4, margin)
    assert loss(u, v).item() == pytest.approx(expected, rel=1e-12)


def test_zero_beyond_the_margin_only():
    torch.manual_seed(0)
    v = torch.randn(4, 3, 2, 2)
    loss = ab.AB([(3, 2, 2)], [(3, 2, 2)], margin=1.0)
    assert [loss([torch.where(v > 0, u, -u)], [v]).item() for u in (1.0, 200.0)] == [0, 0]
    assert loss([torch.where(v > 0, 0.99, -0.99)], [v]).item() > 0
    assert loss([v], [v]).item() > 0


@pytest.mark.parametrize(("side_s", "side_t", "kernel"), [(8, 8, 1), (16, 8, 3), (4, 8, 4), (8, 6, 3)])
def test_connectors(side_s, side_t, kernel):
    connector = ab.AB([(5, side_s, side_s)], [(7, side_t, side_t)], margin=1.0).connectors[0]
    assert connector[0].kernel_size == (kernel, kernel)
    out = connector(torch.randn(2, 5, side_s, side_s))
    assert out.shape == (2, 7, side_t, side_t)
    assert out.min() < 0  # no ReLU: what is compared has two signs


def test_a_map_that_is_too_small_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        ab.convolution((5, 4, 4), (7, 32, 32))
    assert end.value.code == 2
    assert "4x4 maps of the student to 32x32" in capsys.readouterr().err


@pytest.mark.parametrize("name", BEHIND)
def test_modules_behind_maps(name):
    net = common.build(name, 10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    behind = set(ab.modules_behind_maps(net, 32))
    assert {key for key, module in net.named_modules() if module in behind} == BEHIND[name]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_wrn_student_is_compared_through_a_batch_norm_that_changes_nothing():
    torch.manual_seed(0)
    net = common.build("wrn_16_1", 10)
    behind = ab.modules_behind_maps(net, 32)
    net.train()
    behind.eval()
    _, features = net(torch.randn(4, 3, 32, 32))
    assert torch.allclose(features.preacts[-1], features.maps[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1"])
def test_phase_1_leaves_what_lies_behind_the_maps_and_phase_2_continues_with_the_student(student, monkeypatch):
    drive = Drive(monkeypatch, "ab", student=student)
    before, after = drive.before["init"], drive.after["init"]
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(tuple(f"student.{part}." for part in BEHIND[student]))}
    assert all(torch.equal(after[name], value) for name, value in drive.before[""].items())
    assert not any(torch.equal(drive.after[""][name], value) for name, value in drive.before[""].items())
    assert all(m.training for m in drive.student.modules() if isinstance(m, nn.BatchNorm2d))
