import math

import pytest
import torch
from harness import Case, Drive, load

pkt = load("pkt")


@pytest.mark.parametrize("name", ["pkt", "pkt_original"])
def test_golden(name):
    case = Case(name)
    case.check(pkt.pkt_loss(case["f_s"], case["f_t"]))


def slow(f_s, f_t, eps=1e-7):
    def rows(f):
        kernel = [[(1 + float(a @ b) / ((float(a.norm()) + eps) * (float(b.norm()) + eps))) / 2 for b in f] for a in f]
        return [[value / sum(row) for value in row] for row in kernel]

    p_s, p_t, n = rows(f_s), rows(f_t), len(f_s)
    return sum(p_t[i][j] * math.log((p_t[i][j] + eps) / (p_s[i][j] + eps)) for i in range(n) for j in range(n)) / n**2


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_slow_formula(batch):
    torch.manual_seed(batch)
    f_s, f_t = torch.randn(batch, 6).double(), torch.randn(batch, 4).double()
    assert pkt.pkt_loss(f_s, f_t).item() == pytest.approx(slow(f_s, f_t), rel=1e-9, abs=1e-15)


def test_zero_for_the_same_directions():
    f = torch.randn(8, 5).double()
    assert pkt.pkt_loss(3 * f, f).item() == pytest.approx(0, abs=1e-9)


def test_falls_as_one_over_the_batch_size():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(16, 6).double(), torch.randn(16, 4).double()
    once, twice = pkt.pkt_loss(f_s, f_t), pkt.pkt_loss(f_s.repeat(2, 1), f_t.repeat(2, 1))
    assert (once / twice).item() == pytest.approx(2, rel=1e-3)
    f_s, f_t = torch.randn(20, 128, 256).relu(), torch.randn(20, 128, 256).relu()
    mean = {batch: sum(pkt.pkt_loss(a[:batch], b[:batch]) for a, b in zip(f_s, f_t)).item() / 20 for batch in (32, 64, 128)}
    assert mean[32] / mean[64] == pytest.approx(2, rel=0.1)
    assert mean[64] / mean[128] == pytest.approx(2, rel=0.1)


def test_finite_for_extreme_features():
    rows = torch.randn(4, 5)
    for f_s in (torch.zeros(4, 5), torch.ones(4, 5), 200 * rows, torch.cat([rows[:2], -rows[:2]])):
        f_s = f_s.clone().requires_grad_()
        for f_t in (rows, torch.zeros(4, 5), torch.cat([rows[:2], -rows[:2]])):
            value = pkt.pkt_loss(f_s, f_t)
            (gradient,) = torch.autograd.grad(value, f_s)
            assert value.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("batch_size", [16, 64])
def test_another_batch_size_is_warned_of(batch_size, monkeypatch, capsys):
    Drive(monkeypatch, "pkt", batch_size=batch_size, teacher="resnet8")
    lines = capsys.readouterr().out.splitlines()
    warning = "note: --pkt-weight was tuned for batches of 64; the term falls as 1 / batch size"
    assert lines.count(warning) == (batch_size != 64)
