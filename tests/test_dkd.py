import pytest
import torch
from golden import CASES, Case, load

dkd = load("dkd")
kd = load("kd")


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] == "DKD"])
def test_golden(name):
    case = Case(name)
    tckd, nckd = dkd.dkd_losses(case["logits_s"], case["logits_t"], case["target"], case.hyper["T"])
    case.check(case.hyper["alpha"] * tckd + case.hyper["beta"] * nckd)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_tckd_plus_the_share_of_the_other_classes_times_nckd(temperature):
    case = Case("dkd_c100_a1_b8_T4")
    for z_s, z_t, y in zip(*(case[key].detach().split(1) for key in ("logits_s", "logits_t", "target"))):
        tckd, nckd = dkd.dkd_losses(z_s, z_t, y, temperature)
        p_t = (z_t / temperature).softmax(1)[0, y]
        assert kd.kd_loss(z_s, z_t, temperature).item() == pytest.approx((tckd + (1 - p_t) * nckd).item(), rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_extremes(classes, size):
    torch.manual_seed(0)
    y = torch.randint(classes, (6,))
    z_s, z_t = (size * torch.randn(6, classes).sign() for _ in range(2))
    terms = dkd.dkd_losses(z_s.requires_grad_(), z_t, y, 1.0)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    assert z_s.grad.isfinite().all()
    assert classes > 2 or terms[1] == 0  # a single other class


def test_the_logit_of_the_label_does_not_change_nckd():
    z_s, z_t, y = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([0, 3, 3, 9])
    shift = 30 * torch.nn.functional.one_hot(y, 10)
    before, after = dkd.dkd_losses(z_s, z_t, y, 4.0), dkd.dkd_losses(z_s + shift, z_t - shift, y, 4.0)
    assert before[1].item() == pytest.approx(after[1].item(), rel=1e-5)
    assert before[0].item() != pytest.approx(after[0].item(), rel=1e-2)
