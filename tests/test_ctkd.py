import math

import pytest
import torch
import torch.nn.functional as F
from golden import CASES, Case, load
from torch.optim import SGD

ctkd = load("ctkd")
dkd = load("dkd")
CONSTANT_LOGITS = [name for name, (case, _) in CASES.items() if case["method"] == "CTKD" and "lambda" in case["hyper"]]


def temperature_of(case):
    module = ctkd.Temperature(0.0, case.hyper["t_start"], case.hyper["t_end"])
    return case.fill(module, {"theta": "theta"})


@pytest.mark.parametrize("name", [name for name in CONSTANT_LOGITS if name != "ctkd_dkd_c100"])
def test_golden(name):
    case = Case(name)
    temperature = temperature_of(case)
    assert temperature(1.0).item() == pytest.approx(case.outputs["T"], rel=1e-9)
    value = ctkd.kd_loss(case["logits_s"], case["logits_t"], temperature(case.hyper["lambda"]))
    if "r" in case.hyper:
        value = case.hyper["r"] * F.cross_entropy(case["logits_s"], case["target"]) + case.hyper["a"] * value
    case.check(value, no_gradient=("theta",) if case.hyper["lambda"] == 0 else ())


def test_golden_with_dkd_gives_theta_a_gradient():
    case = Case("ctkd_dkd_c100")  # NaN in the authors' code
    temperature = temperature_of(case)
    t = temperature(1.0)
    t.retain_grad()
    tckd, nckd = dkd.dkd_losses(case["logits_s"], case["logits_t"], case["target"], t)
    case.check(case.hyper["dkd_alpha"] * tckd + case.hyper["dkd_beta"] * nckd)
    assert t.grad.item() == pytest.approx(case.outputs["d_loss_d_T_by_differences"], rel=1e-6)
    assert temperature.theta.grad.isfinite()


def test_golden_schedule():
    outputs = Case("ctkd_schedule").outputs
    for ramp_epochs, values in (10, outputs["cosine"]), (4, outputs["cosine_loops_4"]):
        assert [ctkd.curriculum(epoch, ramp_epochs) for epoch in range(len(values))] == pytest.approx(values, abs=1e-12)


def test_golden_steps_of_theta():
    case = Case("ctkd_sgd_c100")
    temperature, hyper, thetas = temperature_of(case), case.hyper, []
    optimizer = SGD(temperature.parameters(), hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])
    for epoch in range(1, hyper["steps"] + 1):
        optimizer.zero_grad()
        t = temperature(ctkd.curriculum(epoch, hyper["loops"]))
        (hyper["a"] * ctkd.kd_loss(case["logits_s"], case["logits_t"], t)).backward()
        optimizer.step()
        thetas.append(temperature.theta.item())
    assert thetas == pytest.approx(case.outputs["theta_after"], rel=1e-12)


@pytest.mark.parametrize(("lambda_", "direction"), [(-1.0, 1), (1.0, -1)])
def test_a_step_of_theta_raises_the_loss_where_lambda_is_negative(lambda_, direction):
    torch.manual_seed(0)
    z_s, z_t = 5 * torch.randn(2, 6, 10, dtype=torch.float64)
    temperature = ctkd.Temperature(1.0, 1.0, 20.0).double()
    before = ctkd.kd_loss(z_s, z_t, temperature(lambda_))
    before.backward()
    with torch.no_grad():
        temperature.theta -= 0.1 * temperature.theta.grad
    assert direction * (ctkd.kd_loss(z_s, z_t, temperature(lambda_)) - before) > 0


@pytest.mark.parametrize("theta", [-50.0, 1.0, 50.0])
@pytest.mark.parametrize("classes", [2, 100])
def test_extremes(classes, theta):
    z_s, z_t = 200 * torch.randn(2, 6, classes).sign()
    temperature = ctkd.Temperature(theta, 1.0, 20.0)
    value = ctkd.kd_loss(z_s.requires_grad_(), z_t, temperature(torch.tensor(-1.0)))
    value.backward()
    assert math.isfinite(value.item())
    assert z_s.grad.isfinite().all()
    assert temperature.theta.grad.isfinite()
