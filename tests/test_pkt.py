import math

import pytest
import torch
from golden import Case, load

pkt = load("pkt")


@pytest.mark.parametrize("name", ["pkt", "pkt_original"])
def test_golden(name):
    case = Case(name)
    case.check(pkt.pkt_loss(case["f_s"], case["f_t"]))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_slow_formula(batch):
    torch.manual_seed(batch)
    f_s, f_t, eps = torch.randn(batch, 6).double(), torch.randn(batch, 4).double(), 1e-7

    def rows(f):
        kernel = [[(1 + float(a @ b) / ((float(a.norm()) + eps) * (float(b.norm()) + eps))) / 2 for b in f] for a in f]
        return [value / sum(row) for row in kernel for value in row]

    expected = sum(t * math.log((t + eps) / (s + eps)) for s, t in zip(rows(f_s), rows(f_t))) / batch**2
    assert pkt.pkt_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_scale_does_not_count_and_the_loss_falls_as_one_over_the_batch_size():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(16, 6).double(), torch.randn(16, 4).double()
    assert pkt.pkt_loss(3 * f_t, f_t).item() == pytest.approx(0, abs=1e-9)
    once, twice = pkt.pkt_loss(f_s, f_t), pkt.pkt_loss(f_s.repeat(2, 1), f_t.repeat(2, 1))
    assert (once / twice).item() == pytest.approx(2, rel=1e-3)


def test_finite_for_extreme_features():
    rows = torch.randn(4, 5)
    opposite = torch.cat([rows[:2], -rows[:2]])
    for f_s in (torch.zeros(4, 5), torch.ones(4, 5), 200 * rows, opposite.clone()):
        f_s.requires_grad_()
        for f_t in (rows, torch.zeros(4, 5), opposite):
            value = pkt.pkt_loss(f_s, f_t)
            (gradient,) = torch.autograd.grad(value, f_s)
            assert value.isfinite() and gradient.isfinite().all()
