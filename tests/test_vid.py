import math

import pytest
import torch
from golden import Case, load
from torch import nn

vid = load("vid")


def test_golden_stages():
    case = Case("vid_stages")
    s, t = ([case[f"{side}{stage}"] for stage in (1, 2, 3)] for side in "st")
    loss = vid.VID([f.shape[1] for f in s], [f.shape[1] for f in t])
    names = {f"mu.{k}.{layer}.weight": f"{k}.regressor.{layer}.weight" for k in range(3) for layer in (0, 2, 4)}
    case.fill(loss, names | {f"alpha.{k}": f"{k}.log_scale" for k in range(3)})
    case.check(loss(s, t))


def test_golden_with_a_larger_student_map():
    case = Case("vid_s_larger")  # 8 channels between the convolutions, neither the student's nor the teacher's number
    loss = vid.VID([6], [7])
    start = loss.alpha[0].tolist()
    assert start == pytest.approx([case.outputs["default_log_scale_for_init_var_5"]] * 7, rel=1e-6)
    first, second, third = (nn.Conv2d(c_in, c_out, 1, bias=False) for c_in, c_out in ((6, 8), (8, 8), (8, 7)))
    loss.mu[0] = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    case.fill(loss, {f"mu.0.{layer}.weight": f"regressor.{layer}.weight" for layer in (0, 2, 4)} | {"alpha.0": "log_scale"})
    case.check(loss([case["s"]], [case["t"]]))


def test_slow_formula_with_a_larger_teacher_map():
    torch.manual_seed(0)
    loss, f_s, f_t = vid.VID([3], [2]).double(), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 4, 4).double()
    with torch.no_grad():
        loss.alpha[0].copy_(torch.tensor([0.3, -1.2], dtype=torch.float64))
    first, second, third = (loss.mu[0][layer].weight[:, :, 0, 0] for layer in (0, 2, 4))
    total = 0.0
    for b, i, j in [(b, i, j) for b in range(2) for i in range(2) for j in range(2)]:
        mean = third @ (second @ (first @ f_s[b, :, i, j]).clamp(min=0)).clamp(min=0)
        for c, alpha in enumerate((0.3, -1.2)):
            target = f_t[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum().item() / 4
            variance = math.log(1 + math.exp(alpha)) + 1e-5
            total += 0.5 * ((mean[c].item() - target) ** 2 / variance + math.log(variance))
    assert loss([f_s], [f_t]).item() == pytest.approx(total / 16, rel=1e-9)


def test_the_best_variance_of_a_channel_is_its_squared_error():
    torch.manual_seed(0)
    loss, f_s = vid.VID([3], [2]), torch.randn(64, 3, 4, 4)
    f_t = torch.randn(64, 2, 4, 4) * torch.tensor([0.1, 2.0])[:, None, None]
    with torch.no_grad():
        error = (loss.mu[0](f_s) - f_t).square().mean((0, 2, 3))
        loss.alpha[0].copy_(torch.log(torch.expm1(error - 1e-5)))
    best = loss([f_s], [f_t])
    best.backward()
    assert best.item() == pytest.approx(((1 + error.log()).mean() / 2).item(), rel=1e-4)
    assert loss.alpha[0].grad.abs().max() < 1e-5


@pytest.mark.parametrize("alpha", [-200.0, 100.0, 1000.0])
def test_finite_for_extreme_variances(alpha):
    loss = vid.VID([3], [2])
    nn.init.constant_(loss.alpha[0], alpha)
    value = loss([torch.randn(2, 3, 4, 4)], [torch.randn(2, 2, 4, 4)])
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in loss.parameters())
