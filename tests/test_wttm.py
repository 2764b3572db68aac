import pytest
import torch
import torch.nn.functional as F
from golden import CASES, Case, load

wttm = load("wttm")
kd = load("kd")


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] in ("TTM", "WTTM")])
def test_golden(name):
    case = Case(name)
    value = wttm.ttm_loss(case["logits_s"], case["logits_t"], case.hyper["l"], weighted=name.startswith("wttm"))
    if "b" in case.hyper:
        value = case.hyper["r"] * F.cross_entropy(case["logits_s"], case["target"]) + case.hyper["b"] * value
    case.check(value)


@pytest.mark.parametrize("weighted", [True, False])
def test_gamma_1_is_kd_at_temperature_1(weighted):
    z_s, z_t = torch.randn(2, 6, 10, dtype=torch.float64)
    assert wttm.ttm_loss(z_s, z_t, 1.0, weighted).item() == pytest.approx(kd.kd_loss(z_s, z_t, 1.0).item(), rel=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient(weighted):
    case = Case("wttm_c100_l0.2")
    z_s, z_t = case["logits_s"], case["logits_t"]
    wttm.ttm_loss(z_s, z_t, 0.2, weighted).backward()
    u = case.array(case.outputs["weight_per_image"])[:, None] if weighted else 1
    expected = u * (z_s.softmax(1) - (0.2 * z_t).softmax(1)) / len(z_s)
    assert torch.allclose(z_s.grad, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("weighted", [True, False])
def test_extremes(weighted, classes, size):
    torch.manual_seed(0)
    z_s, z_t = (size * torch.randn(6, classes).sign() for _ in range(2))
    value = wttm.ttm_loss(z_s.requires_grad_(), z_t, 0.1, weighted)
    value.backward()
    assert value.isfinite()
    assert z_s.grad.isfinite().all()
