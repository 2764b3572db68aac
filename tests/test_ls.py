import pytest
import torch
from golden import Case, load

ls = load("ls")


@pytest.mark.parametrize("name", ["lskd_c100_T2", "lskd_c100_T4", "lskd_c10_T2", "lskd_c10_T4"])
def test_golden(name):
    case = Case(name)
    n_s, n_t = ls.standardize(case["logits_s"]), ls.standardize(case["logits_t"])
    assert torch.allclose(n_s, case.array(case.outputs["z_s"]), rtol=1e-9, atol=1e-12)
    assert torch.allclose(n_t, case.array(case.outputs["z_t"]), rtol=1e-9, atol=1e-12)
    case.check(ls.kd_loss(n_s, n_t, case.hyper["T"]))


def test_golden_with_dkd():
    case = Case("lskd_dkd_c100")
    n_s, n_t = ls.standardize(case["logits_s"]), ls.standardize(case["logits_t"])
    tckd, nckd = ls.dkd_losses(n_s, n_t, case["target"], case.hyper["T"])
    case.check(case.hyper["alpha"] * tckd + case.hyper["beta"] * nckd)


def test_scale_and_shift_of_the_logits_do_not_matter():
    z = torch.randn(4, 10, dtype=torch.float64)
    assert torch.allclose(ls.standardize(z), ls.standardize(30 * z - 7), rtol=1e-5)
    assert ls.kd_loss(ls.standardize(z), ls.standardize(30 * z - 7), 2.0).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_extremes(classes, size):
    torch.manual_seed(0)
    z_s, z_t = (size * torch.randn(6, classes).sign() for _ in range(2))
    n_s, n_t = ls.standardize(z_s.requires_grad_()), ls.standardize(z_t)
    value = ls.kd_loss(n_s, n_t, 2.0) + sum(ls.dkd_losses(n_s, n_t, torch.randint(classes, (6,)), 2.0))
    value.backward()
    assert value.isfinite()
    assert z_s.grad.isfinite().all()
