import pytest
import torch
import torch.nn.functional as F
from golden import CASES, Case, load

nkd = load("nkd")


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] == "NKD"])
def test_golden(name):
    case = Case(name)
    target, other = nkd.nkd_losses(case["logits_s"], case["logits_t"], case["target"], case.hyper["T"])
    assert target.item() == pytest.approx(case.outputs["target_part"], rel=1e-9)
    assert case.hyper["gamma"] * other.item() == pytest.approx(case.outputs["nontarget_part"], rel=1e-9)
    value = target + case.hyper["gamma"] * other
    if "ce_weight" in case.hyper:
        value = case.hyper["ce_weight"] * F.cross_entropy(case["logits_s"], case["target"]) + case.hyper["nkd_weight"] * value
    case.check(value)


def test_the_gradient_of_the_second_part_is_that_of_nckd():
    case = Case("dkd_c100_a0_b1_T4")
    _, other = nkd.nkd_losses(case["logits_s"], case["logits_t"], case["target"], 4.0)
    other.backward()
    assert torch.allclose(case["logits_s"].grad, case.grads["logits_s"], rtol=1e-9, atol=1e-12)


def test_the_first_part_weights_the_cross_entropy_by_the_teacher():
    case = Case("nkd_c100_T1_g1.5")
    z_s, z_t, y = case["logits_s"].detach(), case["logits_t"], case["target"]
    confidence = z_t.softmax(1)[torch.arange(len(y)), y]
    target, _ = nkd.nkd_losses(z_s, z_t, y, 1.0)
    assert target.item() == pytest.approx((confidence * F.cross_entropy(z_s, y, reduction="none")).mean().item(), rel=1e-9)


def test_a_student_equal_to_the_teacher_gets_no_gradient_from_the_second_part():
    z, y = torch.randn(6, 10, dtype=torch.float64), torch.arange(6)
    nkd.nkd_losses(student := z.clone().requires_grad_(), z, y, 3.0)[1].backward()
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_extremes(classes, size):
    torch.manual_seed(0)
    y = torch.randint(classes, (6,))
    z_s, z_t = (size * torch.randn(6, classes).sign() for _ in range(2))
    terms = nkd.nkd_losses(z_s.requires_grad_(), z_t, y, 1.0)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    assert z_s.grad.isfinite().all()
    assert classes > 2 or terms[1] == 0  # a single other class
