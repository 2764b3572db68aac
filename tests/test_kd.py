import pytest
import torch
import torch.nn.functional as F
from golden import Case, load

kd = load("kd")  # test_methods.py checks that kd_loss is the same text in all files


@pytest.mark.parametrize("name", ["kd_c100_T4", "kd_c100_T1", "kd_c10_T4", "kd_c10_T1"])
def test_golden(name):
    case = Case(name)
    case.check(kd.kd_loss(case["logits_s"], case["logits_t"], case.hyper["T"]))


def test_total():
    case, args = Case("kd_total"), kd.Args()
    loss_kd = kd.kd_loss(case["logits_s"], case["logits_t"], args.kd_temperature)
    case.check(args.ce_weight * F.cross_entropy(case["logits_s"], case["target"]) + args.kd_weight * loss_kd)


@pytest.mark.parametrize("size", [50.0, 200.0])
def test_finite_and_zero(size):
    z_s = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    value = kd.kd_loss(z_s, -z_s.detach(), 1.0)
    value.backward()
    assert value.isfinite() and z_s.grad.isfinite().all()
    assert kd.kd_loss(z_s, z_s, 4.0).item() == pytest.approx(0, abs=1e-6)
