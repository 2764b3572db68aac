import pytest
import torch
from golden import Case, load
from running import Drive
from test_nst import Largest

fsp = load("fsp")


def test_golden():
    case = Case("fsp")
    maps_s, maps_t = ([case[f"{side}{k}"] for k in range(1, 5)] for side in "st")
    pairs = [fsp.fsp_loss(maps_s[k : k + 2], maps_t[k : k + 2]).item() for k in range(3)]
    assert pairs == pytest.approx([case.outputs[f"pair{k}"] for k in (1, 2, 3)], rel=1e-9)
    case.check(fsp.fsp_loss(maps_s, maps_t))


def test_flow_is_the_mean_of_the_published_broadcast():
    torch.manual_seed(0)
    f, f_next = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 5, 3, 3).double()
    pooled = f.reshape(3, 4, 3, 2, 3, 2).mean((3, 5))
    expected = (pooled[:, :, None] * f_next[:, None]).mean((3, 4))
    assert torch.allclose(fsp.flow(f, f_next), expected, rtol=1e-12)
    assert torch.allclose(fsp.flow(f_next, f), expected.mT, rtol=1e-12)


def test_no_large_tensor():
    shapes = [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]  # resnet32x4
    maps_s = [torch.randn(2, *shape, requires_grad=True) for shape in shapes]
    with Largest() as largest:
        fsp.fsp_loss(maps_s, [torch.randn(2, *shape) for shape in shapes]).backward()
    assert largest.numel <= 2 * 64 * 32 * 32  # of the largest map, not of all pairs of channels


@pytest.mark.parametrize(
    ("teacher", "student", "channels"),
    [
        ("wrn_40_2", "wrn_40_1", "wrn_40_2 has 16 32 64 128, wrn_40_1 16 16 32 64"),
        ("resnet56", "vgg8", "resnet56 has 16 16 32 64, vgg8 64 128 256 512 512"),
        ("vgg13", "vgg8", None),
        ("resnet110", "resnet20", None),
    ],
)
def test_networks_of_other_widths_are_refused(teacher, student, channels, capsys):
    args = fsp.Args(teacher=teacher, student=student)
    if channels is None:
        return fsp.check_channels(args, 10, 32)
    with pytest.raises(SystemExit) as end:
        fsp.check_channels(args, 10, 32)
    assert end.value.code == 2
    assert channels in capsys.readouterr().err


def test_phase_1_trains_all_but_the_classifier_and_phase_2_continues_with_the_student(monkeypatch):
    drive = Drive(monkeypatch, "fsp")
    before, after = drive.before["init"], drive.after["init"]
    assert {name for name in before if torch.equal(before[name], after[name])} == {"student.fc.weight", "student.fc.bias"}
    assert all(torch.equal(after[name], value) for name, value in drive.before[""].items())
    assert not any(torch.equal(drive.after[""][name], value) for name, value in drive.before[""].items())
