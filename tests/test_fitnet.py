import pytest
import torch
from golden import Case, load
from running import Drive

fitnet = load("fitnet")


@pytest.mark.parametrize("name", ["fitnet_convreg_same", "fitnet_convreg_down", "fitnet_convreg_up"])
def test_golden(name):
    case = Case(name)
    loss = fitnet.FitNet(case["s"].shape[1:], case["t"].shape[1:])
    case.fill(loss, {key: key for key in ("conv.weight", "conv.bias", "bn.weight", "bn.bias")})
    case.check(loss(case["s"], case["t"]), no_gradient=("conv.bias",))  # batch norm removes the mean


@pytest.mark.parametrize(
    ("side_s", "side_t", "weight"),
    [(8, 8, (7, 5, 1, 1)), (16, 8, (7, 5, 3, 3)), (4, 8, (5, 7, 4, 4)), (8, 6, (7, 5, 3, 3)), (16, 4, (7, 5, 13, 13))],
)
def test_the_convolution_fits_the_shapes(side_s, side_t, weight):
    conv = fitnet.convolution((5, side_s, side_s), (7, side_t, side_t))
    assert conv.weight.shape == weight
    assert conv(torch.zeros(2, 5, side_s, side_s)).shape == (2, 7, side_t, side_t)


def test_slow_formula():
    torch.manual_seed(0)
    loss = fitnet.FitNet((3, 4, 4), (2, 4, 4)).double()
    f_s, f_t = torch.randn(3, 3, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    total = 0.0
    for c in range(2):
        weight = loss.conv.weight[c, :, 0, 0].detach()
        values = [[float(weight @ f_s[b, :, i, j]) for i in range(4) for j in range(4)] for b in range(3)]  # the bias cancels
        mean = sum(map(sum, values)) / 48
        variance = sum((v - mean) ** 2 for row in values for v in row) / 48
        for b in range(3):
            for v, target in zip(values[b], f_t[b, c].flatten().tolist()):
                total += (max((v - mean) / (variance + 1e-5) ** 0.5, 0) - target) ** 2
    assert loss(f_s, f_t).item() == pytest.approx(total / 96, rel=1e-9)


def test_negative_targets_are_out_of_reach():
    torch.manual_seed(0)
    loss, f_s, f_t = fitnet.FitNet((3, 4, 4), (2, 4, 4)), torch.randn(8, 3, 4, 4), torch.randn(8, 2, 4, 4)
    floor = f_t.clamp(max=0).square().mean().item()
    for f in f_s, 100 * f_s, -f_s, 0 * f_s:
        assert loss(f, f_t).item() >= floor > 0.1


def test_a_student_map_that_is_too_small_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        fitnet.convolution((5, 4, 4), (7, 16, 16))
    assert end.value.code == 2
    assert "4x4 maps of the student to 16x16" in capsys.readouterr().err


@pytest.mark.parametrize("hint_stage", [-1, 4])
def test_a_stage_that_does_not_exist_is_refused(monkeypatch, capsys, hint_stage):
    with pytest.raises(SystemExit) as end:
        Drive(monkeypatch, "fitnet", hint_stage=hint_stage)
    assert end.value.code == 2
    assert f"--hint-stage {hint_stage}: resnet8 and resnet14 have the stages 0 to 3 in common" in capsys.readouterr().err
