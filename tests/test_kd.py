import pytest
import torch
import torch.nn.functional as F
from harness import METHODS, Case, load

WITH_KD = [method for method in METHODS if hasattr(load(method), "kd_loss")]


@pytest.mark.parametrize("name", ["kd_c100_T4", "kd_c100_T1", "kd_c10_T4", "kd_c10_T1"])
@pytest.mark.parametrize("method", WITH_KD)
def test_golden(method, name):
    case = Case(name)
    case.check(load(method).kd_loss(case["logits_s"], case["logits_t"], case.hyper["T"]))


def test_total():
    case = Case("kd_total")
    kd = load("kd").kd_loss(case["logits_s"], case["logits_t"], 4.0)
    args = load("kd").Args()
    case.check(args.ce_weight * F.cross_entropy(case["logits_s"], case["target"]) + args.kd_weight * kd)


def test_finite_and_zero():
    kd_loss = load("kd").kd_loss
    for size in (50.0, 200.0):
        z_s = torch.tensor([[size, -size, 0.0]], requires_grad=True)
        value = kd_loss(z_s, -z_s.detach(), 1.0)
        value.backward()
        assert value.isfinite()
        assert z_s.grad.isfinite().all()
    z = torch.randn(4, 10)
    assert kd_loss(z, z, 4.0).item() == pytest.approx(0, abs=1e-6)
