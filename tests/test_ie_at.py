import pytest
import torch
from golden import Case, load
from running import Drive, small_data

ie_at = load("ie_at")


@pytest.mark.parametrize(("name", "k"), [("at_original", ""), ("at_s_larger", "1"), ("at_t_larger", "1")])
def test_golden(name, k):
    case = Case(name)
    case.check(ie_at.distance(case[f"s{k}"], case[f"t{k}"]))


def slow_distance(f, g):
    total = 0.0
    for image_f, image_g in zip(f.double().numpy(), g.double().numpy()):
        q_f, q_g = ((image**2).mean(0).flatten() for image in (image_f, image_g))
        total += ((q_f / (q_f @ q_f) ** 0.5 - q_g / (q_g @ q_g) ** 0.5) ** 2).mean()
    return total / len(f)


def test_each_half_against_the_slow_formula():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(3, 6, 4, 4).double().requires_grad_(), torch.randn(3, 5, 4, 4).double()
    inheritance, exploration = ie_at.ie_at_loss(f_s, f_t)
    assert inheritance.item() == pytest.approx(slow_distance(f_s[:, :3].detach(), f_t), rel=1e-12)
    assert exploration.item() == pytest.approx(-slow_distance(f_s[:, 3:].detach(), f_t), rel=1e-12)
    for term, half in (inheritance, [0, 1, 2]), (exploration, [3, 4, 5]):
        (gradient,) = torch.autograd.grad(term, f_s)
        assert (gradient.abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist() == half


def test_zero_bound_and_scale():
    torch.manual_seed(0)
    f, g = torch.randn(2, 3, 4, 5, 5).double()
    assert ie_at.distance(f, f).item() == 0
    assert ie_at.distance(7 * f, 0.1 * g).item() == pytest.approx(ie_at.distance(f, g).item(), rel=1e-12)
    left, right = torch.zeros(2, 2, 4, 5, 5)
    left[:, :, :, 0], right[:, :, :, 4] = 1, 1
    assert ie_at.distance(left, right).item() == pytest.approx(2 / 25)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_finite_for_constant_maps(size):
    f_s = torch.full((2, 6, 4, 4), size, requires_grad=True)
    loss = sum(ie_at.ie_at_loss(f_s, torch.ones(2, 3, 4, 4)))
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()


def test_the_loss_is_the_weighted_sum_of_its_terms(monkeypatch):
    flags = dict(ce_weight=0.5, inheritance_weight=2000.0, exploration_weight=300.0)
    (_, train, _, _), *_ = Drive(monkeypatch, "ie_at", **flags).rows
    assert train["inh"] > 0 > train["exp"]
    assert train["loss"] == pytest.approx(0.5 * train["ce"] + 2000 * train["inh"] + 300 * train["exp"], rel=1e-5)


def test_recipe(monkeypatch):
    drive = Drive(monkeypatch, "ie_at", epochs=4, data=lambda args, padding: small_data(args, padding, n=16))
    assert sorted(drive.schedulers[""].milestones) == [2, 3]
    (group,) = drive.optimizer.param_groups
    assert group["initial_lr"] == 0.1 and group["nesterov"]
