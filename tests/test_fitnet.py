import pytest
import torch
from harness import Case, Drive, load

fitnet = load("fitnet")
NAMES = {name: name for name in ("conv.weight", "conv.bias", "bn.weight", "bn.bias")}


@pytest.mark.parametrize("name", ["fitnet_convreg_same", "fitnet_convreg_down", "fitnet_convreg_up"])
def test_golden(name):
    case = Case(name)
    loss = case.fill(fitnet.FitNet(case["s"].shape[1:], case["t"].shape[1:]), NAMES)
    case.check(loss(case["s"], case["t"]))


@pytest.mark.parametrize(
    ("side_s", "side_t", "weight"),
    [(8, 8, (7, 5, 1, 1)), (16, 8, (7, 5, 3, 3)), (4, 8, (5, 7, 4, 4)), (8, 6, (7, 5, 3, 3)), (16, 4, (7, 5, 13, 13))],
)
def test_the_regressor_fits_the_shapes(side_s, side_t, weight):
    conv = fitnet.convolution((5, side_s, side_s), (7, side_t, side_t))
    assert conv.weight.shape == weight
    assert conv(torch.zeros(2, 5, side_s, side_s)).shape == (2, 7, side_t, side_t)


def test_a_student_map_too_small_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        fitnet.convolution((5, 4, 4), (7, 16, 16))
    assert ended.value.code == 2
    assert "4x4" in capsys.readouterr().err


def test_slow_formula():
    torch.manual_seed(0)
    loss = fitnet.FitNet((3, 4, 4), (2, 4, 4)).double()
    f_s, f_t = torch.randn(3, 3, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    total = 0.0
    for c in range(2):
        weight = loss.conv.weight[c, :, 0, 0].detach()
        values = [[float(weight @ f_s[b, :, i, j]) for i in range(4) for j in range(4)] for b in range(3)]  # the bias drops out
        mean = sum(map(sum, values)) / 48
        variance = sum((v - mean) ** 2 for row in values for v in row) / 48
        for b in range(3):
            for v, target in zip(values[b], f_t[b, c].flatten().tolist()):
                total += (max((v - mean) / (variance + 1e-5) ** 0.5, 0) - target) ** 2
    assert loss(f_s, f_t).item() == pytest.approx(total / 96, rel=1e-9)


def test_negative_targets_cannot_be_reached():
    torch.manual_seed(0)
    loss, f_s, f_t = fitnet.FitNet((3, 4, 4), (2, 4, 4)), torch.randn(8, 3, 4, 4), torch.randn(8, 2, 4, 4)
    floor = f_t.clamp(max=0).square().mean().item()
    for f in f_s, 100 * f_s, -f_s:
        assert loss(f, f_t).item() >= floor > 0.1


def test_batch_size_changes_nothing():
    torch.manual_seed(0)
    loss, f_s, f_t = fitnet.FitNet((3, 8, 8), (2, 4, 4)), torch.randn(8, 3, 8, 8), torch.randn(8, 2, 4, 4)
    assert loss(f_s, f_t).item() == pytest.approx(loss(f_s.repeat(2, 1, 1, 1), f_t.repeat(2, 1, 1, 1)).item(), rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_finite_for_empty_and_large_maps(size):
    torch.manual_seed(0)
    loss, f_s = fitnet.FitNet((3, 4, 4), (2, 4, 4)), size * torch.randn(2, 3, 4, 4)
    f_s.requires_grad_()
    value = loss(f_s, size * torch.randn(2, 2, 4, 4))
    value.backward()
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (f_s, *loss.parameters()))


@pytest.mark.parametrize("hint_stage", [-1, 4])
def test_a_stage_that_does_not_exist_is_refused(monkeypatch, capsys, hint_stage):
    with pytest.raises(SystemExit) as ended:
        Drive(monkeypatch, "fitnet", hint_stage=hint_stage)
    assert ended.value.code == 2
    assert f"--hint-stage {hint_stage}: resnet8 and resnet14 share the stages 0 to 3" in capsys.readouterr().err


def test_published_setting():
    args = fitnet.Args()
    assert (args.ce_weight, args.kd_weight, args.fitnet_weight, args.hint_stage) == (1.0, 0.0, 100.0, 2)
