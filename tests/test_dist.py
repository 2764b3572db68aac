import pytest
import torch
from golden import CASES, Case, load

dist = load("dist")


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] == "DIST"])
def test_golden(name):
    case = Case(name)
    inter, intra = dist.dist_losses(case["logits_s"], case["logits_t"], case.hyper["tau"])
    if case.outputs:
        assert inter.item() == pytest.approx(case.outputs["inter_unscaled"], rel=1e-9)
        assert intra.item() == pytest.approx(case.outputs["intra_unscaled"], rel=1e-9)
    scale = case.hyper["tau"] ** 2 if case.hyper["times_tau_squared"] else 1
    case.check(scale * (case.hyper["beta"] * inter + case.hyper["gamma"] * intra))


def test_a_linear_relation_is_enough():
    a = torch.rand(5, 8, dtype=torch.float64)
    scale, shift = torch.rand(2, 5, 1, dtype=torch.float64)
    assert torch.allclose(dist.pearson(a, (scale + 0.1) * a + shift), torch.ones(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(dist.pearson(a, shift - a), -torch.ones(5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("classes", [2, 100])
def test_extremes(classes, batch, size):
    torch.manual_seed(0)
    z_s, z_t = (size * torch.randn(batch, classes).sign() for _ in range(2))
    terms = dist.dist_losses(z_s.requires_grad_(), z_t, 1.0)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    assert z_s.grad.isfinite().all()
