import pytest
import torch
from golden import Case, load

sp = load("sp")


@pytest.mark.parametrize(("name", "stages"), [("sp_stages", [1, 2, 3]), ("sp_last", [3]), ("sp_sizes_differ", [1])])
def test_golden(name, stages):
    case = Case(name)
    case.check(sum(sp.sp_loss(case[f"s{stage}"], case[f"t{stage}"]) for stage in stages))


def test_slow_formula():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(5, 2, 4, 4).double(), torch.randn(5, 7, 2, 2).double()

    def rows(f):
        gram = [[float((f[i] * f[j]).sum()) for j in range(5)] for i in range(5)]
        return [[v / sum(w * w for w in row) ** 0.5 for v in row] for row in gram]

    expected = sum((v - w) ** 2 for row_s, row_t in zip(rows(f_s), rows(f_t)) for v, w in zip(row_s, row_t)) / 25
    assert sp.sp_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_zero_for_maps_that_differ_by_scale_or_rotation():
    torch.manual_seed(0)
    f = torch.randn(6, 4, 3, 3).double()
    rotation = torch.linalg.qr(torch.randn(36, 36).double())[0]
    for same in 5 * f, -f, f.flip(1), f.repeat(1, 2, 1, 1), (f.flatten(1) @ rotation).reshape(f.shape):
        assert sp.sp_loss(same, f).item() == pytest.approx(0, abs=1e-20)
    assert sp.sp_loss(f.flip(0), f).item() > 1e-3


@pytest.mark.parametrize("copies", [2, 4])
def test_falls_as_one_over_the_batch_size(copies):
    torch.manual_seed(0)
    f_s, f_t = torch.randn(6, 4, 3, 3).double(), torch.randn(6, 5, 2, 2).double()
    repeated = [f.repeat(copies, 1, 1, 1) for f in (f_s, f_t)]
    assert copies * sp.sp_loss(*repeated).item() == pytest.approx(sp.sp_loss(f_s, f_t).item(), rel=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_finite_for_empty_and_large_maps(size):
    f_s = (size * torch.randn(4, 3, 4, 4)).requires_grad_()
    value = sp.sp_loss(f_s, torch.randn(4, 5, 4, 4))
    value.backward()
    assert value.isfinite() and f_s.grad.isfinite().all()
