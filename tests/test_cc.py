import pytest
import torch
from golden import Case, load
from torch import nn

cc = load("cc")


def test_golden():
    case, loss = Case("cc_embed"), cc.CC(16, 12, dim=8)
    names = {f"embed_{net}.{name}": f"embed_{net}.linear.{name}" for net in "st" for name in ("weight", "bias")}
    case.fill(loss, names)
    case.check(loss(case["f_s"], case["f_t"]))


def test_golden_without_embeddings():
    case, loss = Case("cc_plain"), cc.CC(16, 16)
    loss.embed_s = loss.embed_t = nn.Identity()
    case.check(loss(case["f_s"], case["f_t"]))


def test_slow_formula():
    torch.manual_seed(0)
    loss, f_s, f_t = cc.CC(5, 7, dim=4).double(), torch.randn(6, 5).double(), torch.randn(6, 7).double()
    d = [[abs(v.item()) for v in loss.embed_s(f_s[i]) - loss.embed_t(f_t[i])] for i in range(6)]
    expected = sum(v * w for i in range(5) for v, w in zip(d[i], d[i + 1])) / 5
    assert loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_collapsed_embeddings_are_a_zero_that_teaches_nothing():
    loss, f_s = cc.CC(5, 7), torch.randn(6, 5, requires_grad=True)
    for embed in loss.embed_s, loss.embed_t:
        nn.init.zeros_(embed.weight)
        nn.init.constant_(embed.bias, 0.3)
    value = loss(f_s, torch.randn(6, 7))
    value.backward()
    assert value.item() == 0 and f_s.grad.abs().max() == 0
    assert {name: norm.item() for name, norm in loss.norms().items()} == {"norm_s": 0, "norm_t": 0}


def test_an_equal_student_has_a_loss_unless_the_embeddings_are_equal_too():
    torch.manual_seed(0)
    loss, f = cc.CC(5, 5), torch.randn(6, 5)
    assert loss(f, f).item() > 1
    loss.embed_t.load_state_dict(loss.embed_s.state_dict())
    assert loss(f, f).item() == 0
