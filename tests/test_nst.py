import pytest
import torch
from harness import Case, Drive, load
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


def pieces(case):
    return [[case[key] for key in sorted(case.inputs) if key[0] == side] for side in "st"]


@pytest.mark.parametrize("name", ["nst_stages", "nst_s_larger", "nst_t_larger"])
def test_golden(name):
    case = Case(name)
    case.check(nst.nst_loss(*pieces(case)))


def broadcast(a, b):
    """The kernel's mean as the published code takes it, over all products of two channels at once."""
    return ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean()


@pytest.mark.parametrize("c_a, c_b, n", [(3, 4, 25), (6, 5, 4), (4, 4, 4), (9, 2, 1)])
def test_either_way_to_multiply_gives_the_broadcast_value(c_a, c_b, n):
    torch.manual_seed(0)
    a, b = torch.randn(3, c_a, n).double(), torch.randn(3, c_b, n).double()
    assert nst.mean_kernel(a, b).item() == pytest.approx(broadcast(a, b).item(), rel=1e-12)


def test_known_zeros():
    torch.manual_seed(0)
    f = torch.randn(4, 6, 5, 5).double()
    scaled = f * (torch.rand(1, 6, 1, 1).double() + 0.5)
    assert nst.nst_loss([f], [f]).item() == pytest.approx(0, abs=1e-14)
    assert nst.nst_loss([scaled.flip(1)], [f]).item() == pytest.approx(0, abs=1e-14)  # neither order nor size counts
    assert nst.nst_loss([f.repeat(1, 2, 1, 1)], [f]).item() == pytest.approx(0, abs=1e-14)
    assert nst.nst_loss([torch.randn(4, 6, 5, 5).double()], [f]).item() > 1e-3


@pytest.mark.parametrize(
    "shape_s, shape_t",
    [
        ((64, 32, 32), (64, 32, 32)),
        ((256, 8, 8), (256, 8, 8)),
        ((160, 2, 2), (2048, 4, 4)),
        ((12, 16, 16), (256, 32, 32)),
        ((960, 4, 4), (256, 8, 8)),
    ],
)
def test_no_large_tensor(shape_s, shape_t):
    batch = 2
    f_s, f_t = torch.randn(batch, *shape_s, requires_grad=True), torch.randn(batch, *shape_t)
    with Largest() as largest:
        nst.nst_loss([f_s], [f_t]).backward()
    channels, positions = max(shape_s[0], shape_t[0]), [shape_s[1] ** 2, shape_t[1] ** 2]
    pooled = batch * channels * min(positions)
    assert pooled <= largest.numel <= batch * channels * max(channels, *positions)
    assert largest.numel <= max(f_s.numel(), f_t.numel(), batch * min(positions) ** 2, pooled)


def test_finite_for_extreme_maps():
    for f in (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 200.0), torch.full((2, 3, 4, 4), -50.0)):
        f_s = f.clone().requires_grad_()
        value = nst.nst_loss([f_s], [torch.randn(2, 5, 4, 4)])
        value.backward()
        assert value.isfinite()
        assert f_s.grad.isfinite().all()


def test_unequal_numbers_of_stages_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        Drive(monkeypatch, "nst", student="vgg8")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: NST compares stage by stage: vgg8 has 4 stages, resnet14 3\n"
