import copy

import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from torch import nn

simkd = load("simkd")
import common


class Student(nn.Module):
    """A network whose only map is its input."""

    def forward(self, x):
        return None, common.Features([x], [x], x, None)


def network(c_s, side_t, classifier_t, factor=2):
    return simkd.SimKD(Student(), c_s, side_t, classifier_t.requires_grad_(False), factor)


@pytest.mark.parametrize("name", ["simkd_same", "simkd_s_larger", "simkd_t_larger"])
def test_golden(name):
    case = Case(name)
    f_s, f_t = case["s"], case["t"]
    net = network(f_s.shape[1], f_t.shape[2], nn.Linear(f_t.shape[1], len(case["cls_t.bias"])), case.hyper["factor"])
    case.fill(net.projector, {name: f"simkd.transfer.{name}" for name, _ in net.projector.named_parameters()})
    case.fill(net.classifier_t, {end: f"cls_t.{end}" for end in ("weight", "bias")})
    z, features = net(f_s)
    assert torch.allclose(features.last, case.array(case.outputs["projected"]), rtol=1e-9)
    assert torch.allclose(z, case.array(case.outputs["prediction"]), rtol=1e-9)
    case.check(F.mse_loss(*simkd.same_side(features.last, f_t)))


def test_a_perfect_projection_has_the_teachers_logits():
    torch.manual_seed(0)
    classifier_t, f_t = nn.Linear(6, 5), torch.rand(4, 6, 8, 8)
    net = network(6, 8, classifier_t)
    net.projector = nn.Identity()
    z, features = net(f_t)
    assert torch.equal(z, classifier_t(f_t.mean((2, 3)))) and F.mse_loss(*simkd.same_side(features.last, f_t)).item() == 0


def test_the_classifier_is_frozen_and_the_projector_learns():
    torch.manual_seed(0)
    classifier_t = nn.Linear(6, 5)
    net = network(3, 4, classifier_t)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    F.mse_loss(net(torch.randn(4, 3, 4, 4))[1].last, torch.rand(4, 6, 4, 4)).backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("classifier_t"), name
    net.train()
    assert net.classifier_t is not classifier_t  # whose mode is the teacher's


def test_parameters_at_inference():
    net = network(64, 8, nn.Linear(64, 100))
    inside = 32 * 64 + 9 * 32 * 32 + 32 * 64 + 2 * (32 + 32 + 64)
    assert sum(p.numel() for p in net.parameters()) == inside + 64 * 100 + 100
