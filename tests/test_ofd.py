import copy

import pytest
import torch
from golden import Case, load
from torch import nn

ofd = load("ofd")


def norms(case):
    """The teacher's three batch norms of a golden case."""
    layers = [nn.BatchNorm2d(len(case[f"bn{k}_weight"])).double() for k in (1, 2, 3)]
    for k, norm in enumerate(layers, start=1):
        norm.load_state_dict({"weight": case[f"bn{k}_weight"], "bias": case[f"bn{k}_bias"]}, strict=False)
    return layers


def maps(case, side):
    return [case[f"{side}{k}"] for k in (1, 2, 3)]


def test_golden_margins():
    case = Case("ofd_margins")
    for k, norm in enumerate(norms(case), start=1):
        golden = case.array(case.outputs[f"margin{k}"])
        assert torch.allclose(ofd.margin(norm).flatten(), golden, rtol=1e-9, atol=0)
        assert torch.allclose(ofd.margin(norm.float()).flatten(), golden.float(), rtol=1e-4, atol=0)


def test_golden_partial_distance():
    case = Case("ofd_partial_l2")
    loss = ofd.OFD([8, 9, 10], norms(case))
    for stage in loss.stages:
        stage.connector = nn.Identity()
    case.check(ofd.Args().ofd_weight * loss(maps(case, "s"), maps(case, "t")))


def test_golden_with_connectors():
    case = Case("ofd_with_connectors")
    loss = ofd.OFD([6, 8, 8], norms(case))
    names = [f"{layer}.{end}" for layer, end in ((0, "weight"), (1, "weight"), (1, "bias"))]
    case.fill(loss, {f"stages.{k}.connector.{name}": f"{k}.{name}" for k in range(3) for name in names})
    case.check(ofd.Args().ofd_weight * loss(maps(case, "s"), maps(case, "t")))


@pytest.mark.parametrize(("gamma", "beta"), [(0.7, 0.3), (-0.7, 0.3), (1.3, -2.0), (0.5, 1.4)])
def test_margin_is_the_mean_of_the_negative_values(gamma, beta):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, gamma)
    nn.init.constant_(norm.bias, beta)
    x = torch.randn(4_000_000) * gamma + beta
    assert ofd.margin(norm).item() == pytest.approx(x[x < 0].mean().item(), rel=0.02)


@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.0])
def test_margin_of_a_channel_that_is_off_is_finite_and_not_positive(beta):
    norm = nn.BatchNorm2d(1)
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, beta)
    assert -1 <= ofd.margin(norm).item() <= 0


def test_a_student_value_below_a_margin_is_left_alone():
    distance = ofd.PartialDistance(1, nn.BatchNorm2d(1))
    distance.connector, m = nn.Identity(), distance.margin.item()
    u = torch.tensor([m - 1, m + 1, -1.0, 0.0]).reshape(1, 1, 2, 2).requires_grad_()
    v = torch.tensor([-5.0, -5.0, 2.0, m / 2]).reshape(1, 1, 2, 2)
    distance(u, v).backward()
    assert u.grad.flatten().tolist() == pytest.approx([0, 2, -6, -m], rel=1e-5)


@pytest.mark.parametrize(("side_s", "side_t"), [(8, 4), (4, 8)])
def test_the_larger_map_is_pooled(side_s, side_t):
    torch.manual_seed(0)
    distance = ofd.PartialDistance(2, nn.BatchNorm2d(2))
    distance.connector = nn.Identity()
    f_s, f_t = (torch.randn(3, 2, side, side) for side in (side_s, side_t))
    f_4 = [f.reshape(3, 2, 4, f.shape[2] // 4, 4, f.shape[2] // 4).mean((3, 5)) for f in (f_s, f_t)]
    assert distance(f_s, f_t).item() == pytest.approx(distance(*f_4).item(), rel=1e-5)


def test_batch_statistics_leave_no_trace():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval(), torch.randn(8, 3, 5, 5)
    expected, before = copy.deepcopy(net[:2]).train()(x), copy.deepcopy(net.state_dict())
    ofd.use_batch_statistics(net)
    assert torch.equal(net(x), expected)  # dropout stays off
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
