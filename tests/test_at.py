import pytest
import torch
from harness import Case, Drive, load

at = load("at")


def maps(*shapes):
    return [torch.randn(shape) for shape in shapes]


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


def test_slow_formula():
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
    (f,) = maps((4, 6, 8, 8))
    assert at.attention(f).norm(dim=1) == pytest.approx(torch.ones(4))
    for same in 3 * f, -f, f.flip(1), f.repeat(1, 2, 1, 1):
        assert at.at_loss([same], [f]).item() == pytest.approx(0, abs=1e-12)
    assert at.at_loss([f.flip(2)], [f]).item() > 1e-4


def test_the_larger_map_is_pooled():
    torch.manual_seed(0)
    large, small = maps((2, 3, 8, 8), (2, 5, 4, 4))
    expected = large.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    for f_s, f_t in (large, small), (small, large):
        pooled_s, pooled_t = at.same_side(f_s, f_t)
        assert pooled_s.shape[2:] == pooled_t.shape[2:] == (4, 4)
        assert torch.allclose(pooled_s if f_s is large else pooled_t, expected, atol=1e-6)
    assert at.same_side(small, small) == (small, small)


def test_batch_size_and_memory_format_change_nothing():
    torch.manual_seed(0)
    f_s, f_t = maps((4, 3, 8, 8), (4, 6, 4, 4))
    value = at.at_loss([f_s], [f_t]).item()
    assert at.at_loss([f_s.repeat(2, 1, 1, 1)], [f_t.repeat(2, 1, 1, 1)]).item() == pytest.approx(value, rel=1e-5)
    strange = [f.to(memory_format=torch.channels_last) for f in (f_s, f_t)]
    assert at.at_loss(strange[:1], strange[1:]).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_finite_for_empty_and_large_maps(size):
    f_s = (size * torch.randn(2, 3, 4, 4)).requires_grad_()
    value = at.at_loss([f_s], [torch.randn(2, 5, 4, 4)])
    value.backward()
    assert value.isfinite()
    assert f_s.grad.isfinite().all()


def test_unequal_numbers_of_stages_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        Drive(monkeypatch, "at", teacher="vgg8")
    assert ended.value.code == 2
    assert "resnet8 has 3 stages, vgg8 4" in capsys.readouterr().err


def test_published_setting():
    args = at.Args()
    assert (args.ce_weight, args.kd_weight, args.at_weight) == (1.0, 0.0, 1000.0)
