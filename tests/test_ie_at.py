import math
from functools import partial

import harness
import pytest
import torch
from harness import Case, Drive, load, small_data

ie_at = load("ie_at")


def test_golden():
    case = Case("at_original")
    case.check(ie_at.distance(case["s"], case["t"]))


@pytest.mark.parametrize("name", ["at_s_larger", "at_t_larger"])
def test_golden_sides_differ(name):
    case = Case(name)
    case.check(ie_at.distance(case["s1"], case["t1"]))


def slow_distance(f_s, f_t):
    """D by loops, of two maps of one side."""
    total = 0.0
    for image_s, image_t in zip(f_s.tolist(), f_t.tolist()):
        vectors = []
        for channels in (image_s, image_t):
            rows, columns = len(channels[0]), len(channels[0][0])
            q = [sum(c[i][j] ** 2 for c in channels) / len(channels) for i in range(rows) for j in range(columns)]
            vectors.append([value / math.sqrt(sum(v * v for v in q)) for value in q])
        total += sum((a - b) ** 2 for a, b in zip(*vectors)) / len(vectors[0])
    return total / len(f_s)


def test_slow_formula():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(3, 6, 4, 4).double(), torch.randn(3, 5, 4, 4).double()
    inheritance, exploration = ie_at.ie_at_loss(f_s, f_t)
    assert inheritance.item() == pytest.approx(slow_distance(f_s[:, :3], f_t), rel=1e-12)
    assert exploration.item() == pytest.approx(-slow_distance(f_s[:, 3:], f_t), rel=1e-12)


def test_zero_bound_and_scale():
    torch.manual_seed(0)
    f, g = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 4, 5, 5).double()
    assert ie_at.distance(f, f).item() == 0
    assert ie_at.distance(7 * f, 0.1 * g).item() == pytest.approx(ie_at.distance(f, g).item(), rel=1e-12)
    left, right = torch.zeros(2, 4, 5, 5), torch.zeros(2, 4, 5, 5)
    left[:, :, :, 0], right[:, :, :, 4] = 1, 1
    assert ie_at.distance(left, right).item() == pytest.approx(2 / 25)
    inheritance, exploration = ie_at.ie_at_loss(torch.cat([f, f], 1), g)
    assert inheritance.item() == -exploration.item() > 0


def test_each_term_teaches_its_own_half_only():
    torch.manual_seed(0)
    f_s = torch.randn(3, 8, 5, 5, requires_grad=True)
    for term, half in enumerate([[0, 1, 2, 3], [4, 5, 6, 7]]):
        (gradient,) = torch.autograd.grad(ie_at.ie_at_loss(f_s, torch.randn(3, 6, 5, 5))[term], f_s)
        assert (gradient.abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist() == half


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_finite_for_maps_that_are_the_same_everywhere(size):
    f_s = torch.full((2, 6, 4, 4), size, requires_grad=True)
    loss = sum(ie_at.ie_at_loss(f_s, torch.full((2, 3, 4, 4), 1.0)))
    loss.backward()
    assert loss.isfinite()
    assert f_s.grad.isfinite().all()


def test_weights(monkeypatch):
    """One batch, so that the logged loss is that of the untrained student: it is linear in the weights."""
    data = partial(small_data, n=16)
    weights = [(0.0, 0.0, 1.0), (1000.0, 0.0, 1.0), (0.0, 100.0, 1.0), (1000.0, 100.0, 1.0), (2000.0, 300.0, 0.5)]
    losses = []
    for inheritance, exploration, ce in weights:
        flags = dict(inheritance_weight=inheritance, exploration_weight=exploration, ce_weight=ce)
        losses.append(Drive(monkeypatch, "ie_at", data=data, **flags).rows[0][1][0])
    ce, inheritance, exploration = losses[0], losses[1] - losses[0], losses[2] - losses[0]
    assert inheritance > 0 > exploration
    assert losses[3] == pytest.approx(ce + inheritance + exploration, rel=1e-5)
    assert losses[4] == pytest.approx(0.5 * ce + 2 * inheritance + 3 * exploration, rel=1e-5)


def test_recipe():
    args = ie_at.Args()
    harness.common.resolve(args)
    assert (args.epochs, args.batch_size, args.lr, args.milestones) == (160, 128, 0.1, (80, 120))
    assert (args.inheritance_weight, args.exploration_weight) == (1000, 100)
