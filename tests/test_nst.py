import pytest
import torch
from golden import Case, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

nst = load("nst")


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", ["nst_stages", "nst_s_larger", "nst_t_larger"])
def test_golden(name):
    case = Case(name)
    case.check(nst.nst_loss(*([case[key] for key in sorted(case.inputs) if key[0] == side] for side in "st")))


@pytest.mark.parametrize(("c_a", "c_b", "n"), [(3, 4, 25), (6, 5, 4), (4, 4, 4), (9, 2, 1)])
def test_both_forms_of_the_kernel_equal_the_published_broadcast(c_a, c_b, n):
    torch.manual_seed(0)
    a, b = torch.randn(3, c_a, n).double(), torch.randn(3, c_b, n).double()
    broadcast = ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean()
    assert nst.mean_kernel(a, b).item() == pytest.approx(broadcast.item(), rel=1e-12)


def test_zero_for_the_same_set_of_channels():
    torch.manual_seed(0)
    f = torch.randn(4, 6, 5, 5).double()
    scaled = f * (torch.rand(1, 6, 1, 1).double() + 0.5)
    for same in f, scaled.flip(1), f.repeat(1, 2, 1, 1):
        assert nst.nst_loss([same], [f]).item() == pytest.approx(0, abs=1e-14)
    assert nst.nst_loss([torch.randn(4, 6, 5, 5).double()], [f]).item() > 1e-3


@pytest.mark.parametrize(
    ("shape_s", "shape_t"),
    [((64, 32, 32), (64, 32, 32)), ((256, 8, 8), (256, 8, 8)), ((160, 2, 2), (2048, 4, 4)), ((12, 16, 16), (256, 32, 32))],
)
def test_no_large_tensor(shape_s, shape_t):
    f_s, f_t = torch.randn(2, *shape_s, requires_grad=True), torch.randn(2, *shape_t)
    with Largest() as largest:
        nst.nst_loss([f_s], [f_t]).backward()
    positions = min(shape_s[1], shape_t[1]) ** 2
    assert largest.numel <= 2 * max(positions**2, positions * max(shape_s[0], shape_t[0]), f_s.numel() // 2, f_t.numel() // 2)


@pytest.mark.parametrize("value", [0.0, 200.0, -50.0])
def test_finite_for_constant_maps(value):
    f_s = torch.full((2, 3, 4, 4), value, requires_grad=True)
    loss = nst.nst_loss([f_s], [torch.randn(2, 5, 4, 4)])
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()
