import pytest
import torch
from golden import Case, load

rkd = load("rkd")
ORIGINAL = {"rkd_original_distance": (1, 0), "rkd_original_angle": (0, 1)}


@pytest.mark.parametrize("name", ["rkd_both", "rkd_distance", "rkd_angle", *ORIGINAL])
def test_golden(name):
    case = Case(name)
    weights = ORIGINAL.get(name) or (case.hyper["w_d"], case.hyper["w_a"])
    case.check(sum(weight * loss for weight, loss in zip(weights, rkd.rkd_losses(case["f_s"], case["f_t"]))))


@pytest.mark.parametrize("size", [1.0, 30.0])  # the second reaches the straight part of the smooth L1
def test_slow_formula(size):
    torch.manual_seed(0)
    f_s, f_t = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    f_s[0] *= size
    n = range(5)

    def distances(f):
        d = [[float((f[i] - f[j]).norm()) for j in n] for i in n]
        mean = sum(map(sum, d)) / 20
        return [d[i][j] / mean for i in n for j in n]

    def angles(f):
        def unit(i, j):
            return torch.zeros_like(f[i]) if i == j else (f[j] - f[i]) / (f[j] - f[i]).norm()

        return [float(unit(i, j) @ unit(i, k)) for i in n for j in n for k in n]

    def mean_huber(s, t):
        x = [abs(a - b) for a, b in zip(s, t)]
        return sum(v * v / 2 if v < 1 else v - 0.5 for v in x) / len(x)

    loss_d, loss_a = rkd.rkd_losses(f_s, f_t)
    assert loss_d.item() == pytest.approx(mean_huber(distances(f_s), distances(f_t)), rel=1e-9)
    assert loss_a.item() == pytest.approx(mean_huber(angles(f_s), angles(f_t)), rel=1e-9)


def test_zero_for_the_same_figure():
    torch.manual_seed(0)
    f = torch.randn(6, 4).double()
    rotation = torch.linalg.qr(torch.randn(4, 4).double())[0]
    for same in 7 * f, f + 3, f @ rotation, -f, torch.cat([f, torch.zeros(6, 3)], 1):
        assert [loss.item() for loss in rkd.rkd_losses(same, f)] == pytest.approx([0, 0], abs=1e-20)
    assert all(loss > 1e-3 for loss in rkd.rkd_losses(f.flip(0), f))


@pytest.mark.parametrize(("batch", "equal"), [(2, 2), (3, 2), (8, 2), (8, 8)])
def test_finite_for_equal_rows(batch, equal):
    torch.manual_seed(0)
    f_s = torch.randn(batch, 4)
    f_s[:equal] = f_s[0].clone()
    f_s.requires_grad_()
    value = sum(rkd.rkd_losses(f_s, torch.randn(batch, 5)))
    value.backward()
    assert value.isfinite() and f_s.grad.isfinite().all()
