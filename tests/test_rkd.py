import pytest
import torch
from harness import Case, load

rkd = load("rkd")
GOLDEN = ["rkd_both", "rkd_distance", "rkd_angle", "rkd_original_distance", "rkd_original_angle"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    case = Case(name)
    original = {"rkd_original_distance": (1, 0), "rkd_original_angle": (0, 1)}
    weights = original.get(name) or (case.hyper["w_d"], case.hyper["w_a"])
    case.check(rkd.rkd_loss(case["f_s"], case["f_t"], *weights))


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

    def huber(a, b):
        x = abs(a - b)
        return x * x / 2 if x < 1 else x - 0.5

    d = [huber(a, b) for a, b in zip(distances(f_s), distances(f_t))]
    a = [huber(a, b) for a, b in zip(angles(f_s), angles(f_t))]
    assert rkd.rkd_loss(f_s, f_t, 25, 50).item() == pytest.approx(25 * sum(d) / 25 + 50 * sum(a) / 125, rel=1e-9)


def test_zero_for_the_same_figure():
    torch.manual_seed(0)
    f = torch.randn(6, 4).double()
    rotation = torch.linalg.qr(torch.randn(4, 4).double())[0]
    for same in f, 7 * f, f + 3, f @ rotation, -f, torch.cat([f, torch.zeros(6, 3)], 1):
        assert rkd.rkd_loss(same, f, 25, 50).item() == pytest.approx(0, abs=1e-20)
    assert rkd.rkd_loss(f.flip(0), f, 25, 50).item() > 0.1


def test_relations():
    torch.manual_seed(0)
    distance, cosine = rkd.relations(torch.randn(6, 4).double())
    off = ~torch.eye(6, dtype=torch.bool)
    assert distance.diagonal().abs().max() == 0
    assert distance[off].mean().item() == pytest.approx(1)
    assert torch.equal(distance, distance.T)
    assert cosine.shape == (6, 6, 6)
    assert cosine.abs().max() <= 1 + 1e-12
    for i in range(6):
        assert cosine[i, i].abs().max() == cosine[i, :, i].abs().max() == 0
        others = [j for j in range(6) if j != i]
        assert cosine[i].diagonal()[others].tolist() == pytest.approx([1] * 5)


def test_each_weight_removes_and_doubles_its_term():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    distance, angle = rkd.rkd_loss(f_s, f_t, 1, 0).item(), rkd.rkd_loss(f_s, f_t, 0, 1).item()
    assert distance > 0 < angle
    assert rkd.rkd_loss(f_s, f_t, 2, 3).item() == pytest.approx(2 * distance + 3 * angle, rel=1e-12)


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("equal", [2, 8])
def test_finite_for_equal_rows(batch, equal):
    torch.manual_seed(0)
    f_s = torch.randn(batch, 4)
    f_s[:equal] = f_s[0].clone()
    f_s.requires_grad_()
    value = rkd.rkd_loss(f_s, torch.randn(batch, 5), 25, 50)
    value.backward()
    assert value.isfinite()
    assert f_s.grad.isfinite().all()


def test_batch_size_does_not_rule_the_loss():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(512, 64), torch.randn(512, 64)
    for weights in (1, 0), (0, 1):
        small, large = (
            sum(rkd.rkd_loss(s, t, *weights).item() for s, t in zip(f_s.split(batch), f_t.split(batch))) * batch / 512
            for batch in (32, 128)
        )
        assert 0.7 < small / large < 1.5  # not the 4 of a loss that falls as 1 / B


def test_published_setting():
    args = rkd.Args()
    assert (args.ce_weight, args.kd_weight, args.rkd_weight, args.distance_weight, args.angle_weight) == (1, 0, 1, 25, 50)
