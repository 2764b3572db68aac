import pytest
import torch
from harness import Case, Drive, load
from torch import nn

cc = load("cc")
NAMES = {f"embed_{side}.{name}": f"embed_{side}.linear.{name}" for side in "st" for name in ("weight", "bias")}


def test_golden():
    case = Case("cc_embed")
    loss = case.fill(cc.CC(16, 12, width=8), NAMES)
    case.check(loss(case["f_s"], case["f_t"]))


def test_golden_without_embeddings():
    case, loss = Case("cc_plain"), cc.CC(16, 16)
    loss.embed_s = loss.embed_t = nn.Identity()
    case.check(loss(case["f_s"], case["f_t"]))


def test_slow_formula():
    torch.manual_seed(0)
    loss, f_s, f_t = cc.CC(5, 7, width=4).double(), torch.randn(6, 5).double(), torch.randn(6, 7).double()
    d = [[abs(v.item()) for v in loss.embed_s(f_s[i]) - loss.embed_t(f_t[i])] for i in range(6)]
    expected = sum(v * w for i in range(5) for v, w in zip(d[i], d[i + 1])) / 5
    assert loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_only_neighbours_count():
    loss = cc.CC(2, 2, width=2)
    loss.embed_s, loss.embed_t = nn.Identity(), nn.Identity()
    difference = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-4.0, 0.0], [0.0, 5.0]])
    assert loss(difference, torch.zeros(4, 2)).item() == 0
    assert loss(difference[[0, 2, 1, 3]], torch.zeros(4, 2)).item() == pytest.approx((2 * 4 + 3 * 5) / 3)


def test_collapsed_embeddings_are_a_zero_that_teaches_nothing():
    loss, f_s = cc.CC(5, 7), torch.randn(6, 5, requires_grad=True)
    for embed in loss.embed_s, loss.embed_t:
        nn.init.zeros_(embed.weight)
        nn.init.constant_(embed.bias, 0.3)
    value = loss(f_s, torch.randn(6, 7))
    value.backward()
    assert value.item() == 0
    assert f_s.grad.abs().max() == 0
    assert {name: norm.item() for name, norm in loss.norms().items()} == {"norm_s": 0, "norm_t": 0}


def test_an_equal_student_has_a_loss_unless_the_embeddings_are_equal_too():
    torch.manual_seed(0)
    loss, f = cc.CC(5, 5), torch.randn(6, 5)
    assert loss(f, f).item() > 1
    loss.embed_t.load_state_dict(loss.embed_s.state_dict())
    assert loss(f, f).item() == 0


def test_batch_size_changes_little():
    torch.manual_seed(0)
    loss, f_s, f_t = cc.CC(64, 64), torch.randn(4096, 64), torch.randn(4096, 64)
    with torch.no_grad():
        small = sum(loss(f_s[i : i + 32], f_t[i : i + 32]).item() for i in range(0, 4096, 32)) / 128
        assert small == pytest.approx(loss(f_s, f_t).item(), rel=0.02)


def test_finite_for_identical_rows():
    loss, f_s = cc.CC(5, 7), torch.ones(4, 5, requires_grad=True)
    value = loss(f_s, torch.ones(4, 7))
    value.backward()
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (f_s, *loss.parameters()))


@pytest.mark.parametrize(("d_s", "d_t", "extra"), [(64, 64, 16_640), (1280, 2048, 426_240)])
def test_extra_parameters(d_s, d_t, extra):
    assert sum(p.numel() for p in cc.CC(d_s, d_t).parameters()) == extra


def test_norms_are_logged(monkeypatch):
    drive = Drive(monkeypatch, "cc")
    norms = {f"norm_{side}": drive.after[""][f"cc.embed_{side}.weight"].norm().item() for side in "st"}
    assert drive.rows[-1][3] == pytest.approx(norms)


def test_published_setting():
    args = cc.Args()
    assert (args.ce_weight, args.kd_weight, args.cc_weight) == (1.0, 0.0, 0.02)
