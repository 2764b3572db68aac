import pytest
import torch
from harness import Case, Drive, load
from test_ab import check_resume
from test_nst import Largest

fsp = load("fsp")


def maps(case, side):
    return [case[f"{side}{k}"] for k in range(1, 5)]


def test_golden():
    case = Case("fsp")
    pairs = [fsp.fsp_loss(maps(case, "s")[k : k + 2], maps(case, "t")[k : k + 2]).item() for k in range(3)]
    assert pairs == pytest.approx([case.outputs[f"pair{k}"] for k in (1, 2, 3)], rel=1e-9)
    case.check(fsp.fsp_loss(maps(case, "s"), maps(case, "t")))


def test_flow_is_the_broadcast_mean():
    torch.manual_seed(0)
    f, f_next = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 5, 3, 3).double()
    pooled = f.reshape(3, 4, 3, 2, 3, 2).mean((3, 5))
    expected = (pooled[:, :, None] * f_next[:, None]).mean((3, 4))
    assert torch.allclose(fsp.flow(f, f_next), expected, rtol=1e-12)
    assert torch.allclose(fsp.flow(f_next, f), expected.mT, rtol=1e-12)


def test_zero_for_the_same_maps_and_finite():
    f = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert fsp.fsp_loss(f, f).item() == 0
    zeros = [torch.zeros(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 5, 2, 2, requires_grad=True)]
    value = fsp.fsp_loss(zeros, f)
    value.backward()
    assert value.isfinite()
    assert all(z.grad.isfinite().all() for z in zeros)


def test_no_large_tensor():
    shapes = [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]  # resnet32x4
    maps_s = [torch.randn(2, *shape, requires_grad=True) for shape in shapes]
    with Largest() as largest:
        fsp.fsp_loss(maps_s, [torch.randn(2, *shape) for shape in shapes]).backward()
    assert 2 * 64 * 32 * 32 <= largest.numel <= 2 * 64 * max(64, 32 * 32)


REFUSED = {
    ("wrn_40_2", "wrn_40_1"): "wrn_40_2 has 16 32 64 128, wrn_40_1 16 16 32 64",
    ("resnet50", "vgg8"): "resnet50 has 64 256 512 1024 2048, vgg8 64 128 256 512 512",
    ("resnet56", "vgg8"): "resnet56 has 16 16 32 64, vgg8 64 128 256 512 512",
}


@pytest.mark.parametrize("pair", REFUSED)
def test_unequal_channels_are_refused_before_anything_else(pair, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        fsp.main(fsp.Args(*pair, data=tmp_path, runs=tmp_path, device="cpu"))
    assert end.value.code == 2
    start = "error: FSP needs as many channels in the student's maps as in the teacher's: "
    assert capsys.readouterr().err == f"{start}{REFUSED[pair]}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", [("wrn_16_2", "wrn_16_2"), ("vgg8", "vgg8")])
def test_equal_channels_are_not_refused(pair):
    fsp.check_channels(fsp.Args(*pair))


def test_stage_1_trains_the_student_but_for_its_classifier_and_stage_2_goes_on_with_it(monkeypatch):
    drive = Drive(monkeypatch, "fsp")
    before, after = drive.before["init"], drive.after["init"]
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"student.fc.weight", "student.fc.bias"}
    assert all(torch.equal(after[name], value) for name, value in drive.before[""].items())
    assert not any(torch.equal(drive.after[""][name], value) for name, value in drive.before[""].items())
    assert [(len(means), test is None) for _, means, test, _ in drive.rows] == [(1, True), (2, False)]


def test_resumes_in_either_stage(monkeypatch, tmp_path):
    check_resume(monkeypatch, tmp_path, "fsp", stops=(5, 11), init_epochs=2)  # in the second epoch of each stage
