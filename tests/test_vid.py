import math

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Drive, load
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
    convs = [nn.Conv2d(c_in, c_out, 1, bias=False) for c_in, c_out in ((6, 8), (8, 8), (8, 7))]
    loss.mu[0] = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    start = loss.alpha[0].detach().clone()
    assert start.double() == pytest.approx(torch.full((7,), case.outputs["default_log_scale_for_init_var_5"]).double(), rel=1e-6)
    case.fill(loss, {f"mu.0.{layer}.weight": f"regressor.{layer}.weight" for layer in (0, 2, 4)} | {"alpha.0": "log_scale"})
    case.check(loss([case["s"]], [case["t"]]))


def test_slow_formula():
    torch.manual_seed(0)
    loss, f_s, f_t = vid.VID([3], [2]).double(), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 4, 4).double()
    with torch.no_grad():
        loss.alpha[0].copy_(torch.tensor([0.3, -1.2], dtype=torch.float64))
    first, second, third = (loss.mu[0][layer].weight[:, :, 0, 0] for layer in (0, 2, 4))
    total = 0.0
    for b in range(2):
        for i in range(2):
            for j in range(2):
                mean = third @ (second @ (first @ f_s[b, :, i, j]).clamp(min=0)).clamp(min=0)
                for c, alpha in enumerate((0.3, -1.2)):
                    target = f_t[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum().item() / 4
                    variance = math.log(1 + math.exp(alpha)) + 1e-5
                    total += 0.5 * ((mean[c].item() - target) ** 2 / variance + math.log(variance))
    assert loss([f_s], [f_t]).item() == pytest.approx(total / 16, rel=1e-9)


def test_at_the_start_it_is_a_tenth_of_the_squared_error_and_a_constant():
    torch.manual_seed(0)
    loss, f_s, f_t = vid.VID([3], [2]), torch.randn(4, 3, 4, 4), torch.randn(4, 2, 4, 4)
    assert loss.variance(0).flatten().tolist() == pytest.approx([5.0, 5.0], rel=1e-6)
    assert loss([f_s], [f_t]).item() == pytest.approx(0.1 * F.mse_loss(loss.mu[0](f_s), f_t).item() + 0.8047, abs=1e-4)


def test_the_variance_learns_the_squared_error_of_its_channel():
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
    assert all(p.grad.abs().max() > 0 for p in loss.mu.parameters())


def test_can_be_negative_and_never_below_its_floor():
    loss = vid.VID([3], [2])
    nn.init.constant_(loss.alpha[0], -50.0)
    for parameter in loss.mu.parameters():
        nn.init.zeros_(parameter)
    assert loss([torch.randn(2, 3, 4, 4)], [torch.zeros(2, 2, 4, 4)]).item() == pytest.approx(math.log(1e-5) / 2, rel=1e-4)


@pytest.mark.parametrize("alpha", [-200.0, 100.0, 1000.0])
def test_finite_for_extreme_variances(alpha):
    loss = vid.VID([3], [2])
    nn.init.constant_(loss.alpha[0], alpha)
    value = loss([torch.randn(2, 3, 4, 4)], [torch.randn(2, 2, 4, 4)])
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_batch_size_changes_nothing():
    torch.manual_seed(0)
    loss, f_s, f_t = vid.VID([3], [2]), torch.randn(4, 3, 8, 8), torch.randn(4, 2, 4, 4)
    repeated = loss([f_s.repeat(2, 1, 1, 1)], [f_t.repeat(2, 1, 1, 1)]).item()
    assert repeated == pytest.approx(loss([f_s], [f_t]).item(), rel=1e-5)


def test_widths_and_extra_parameters():
    loss = vid.VID([16, 32], [32, 48])
    assert [conv.weight.shape[:2] for conv in loss.mu[1] if isinstance(conv, nn.Conv2d)] == [(48, 32), (48, 48), (48, 48)]
    expected = 16 * 32 + 2 * 32 * 32 + 32 * 48 + 2 * 48 * 48 + 32 + 48
    assert sum(p.numel() for p in loss.parameters()) == expected


def test_variances_are_trained_and_logged(monkeypatch):
    drive = Drive(monkeypatch, "vid")
    for stage in range(3):
        name = f"vid.alpha.{stage}"
        moved = (drive.after[""][name] - drive.before[""][name]).abs()
        assert moved.min() > 1e-6 and not moved.allclose(moved[0])  # weight decay alone would move all alike
    assert drive.rows[-1][3] == pytest.approx({"variance": drive.trained["vid"].variance(-1).mean().item()})


def test_unequal_numbers_of_stages_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        Drive(monkeypatch, "vid", teacher="vgg8")
    assert ended.value.code == 2
    assert "resnet8 has 3 stages, vgg8 4" in capsys.readouterr().err


def test_published_setting():
    args = vid.Args()
    assert (args.ce_weight, args.kd_weight, args.vid_weight) == (1.0, 0.0, 1.0)
