import pytest
import torch
from golden import Case, load
from running import Drive

at = load("at")


def test_golden_stages():
    case = Case("at_stages")
    s, t = ([case[f"{side}{stage}"] for stage in (1, 2, 3)] for side in "st")
    for stage, pair in enumerate(zip(s, t), start=1):
        assert at.at_loss(*([f] for f in pair)).item() == pytest.approx(case.outputs[f"stage{stage}"], rel=1e-9)
    case.check(at.at_loss(s, t))


@pytest.mark.parametrize(("name", "stage"), [("at_s_larger", "1"), ("at_t_larger", "1"), ("at_original", "")])
def test_golden_one_stage(name, stage):
    case = Case(name)
    case.check(at.at_loss([case[f"s{stage}"]], [case[f"t{stage}"]]))


def test_slow_formula_with_a_larger_student_map():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 5, 2, 2).double()
    total = 0.0
    for b in range(3):
        cells = [(i, j) for i in range(2) for j in range(2)]
        pooled = [f_s[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum((1, 2)) / 4 for i, j in cells]
        q_s = [sum(v.item() ** 2 for v in row) / 2 for row in pooled]
        q_t = [sum(f_t[b, c, i, j].item() ** 2 for c in range(5)) / 5 for i, j in cells]
        norm_s, norm_t = sum(v * v for v in q_s) ** 0.5, sum(v * v for v in q_t) ** 0.5
        total += sum((v / norm_s - w / norm_t) ** 2 for v, w in zip(q_s, q_t))
    assert at.at_loss([f_s], [f_t]).item() == pytest.approx(total / 12, rel=1e-9)


def test_attention_ignores_scale_sign_and_order_of_channels():
    torch.manual_seed(0)
    f = torch.randn(4, 6, 8, 8)
    for same in 3 * f, -f, f.flip(1), f.repeat(1, 2, 1, 1), f.to(memory_format=torch.channels_last):
        assert at.at_loss([same], [f]).item() == pytest.approx(0, abs=1e-12)
    assert at.at_loss([f.flip(2)], [f]).item() > 1e-4


def test_finite_for_an_empty_map():
    f_s = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = at.at_loss([f_s], [torch.randn(2, 5, 4, 4)])
    value.backward()
    assert value.isfinite() and f_s.grad.isfinite().all()


@pytest.mark.parametrize("method", ["at", "vid", "nst", "ab"])
def test_different_numbers_of_stages_are_refused(method, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        Drive(monkeypatch, method, teacher="vgg8")
    assert end.value.code == 2
    assert f"{method.upper()} compares stage by stage, but resnet8 has 3 stages and vgg8 4" in capsys.readouterr().err
