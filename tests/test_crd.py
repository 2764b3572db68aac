import math

import pytest
import torch
from golden import Case, load

crd = load("crd")


def prepared(case):
    """The module of a golden case, with its weights, banks and, where they are given, constants Z."""
    loss = crd.CRD(16, 12, case.hyper["n_data"], case.hyper["T"], momentum=case.hyper["momentum"], dim=8)
    case.fill(loss, {f"project_{net}.{end}": f"embed_{net}.linear.{end}" for net in "st" for end in ("weight", "bias")})
    for net in "st":
        getattr(loss, f"bank_{net}").copy_(case[f"bank_{net}"])
        if case.hyper.get(f"Z_{net}"):
            getattr(loss, f"Z_{net}").fill_(case.hyper[f"Z_{net}"])
    return loss


def inputs(case, batch=""):
    index, picked = case[f"idx{batch}"], case[f"contrast_idx{batch}"]
    assert torch.equal(index, picked[:, 0])
    return case[f"f_s{batch}"], case[f"f_t{batch}"], index, picked[:, 1:]


@pytest.mark.parametrize(
    ("name", "batch", "after"), [("crd_first_batch", "", "after"), ("crd_given_Z", "", None), ("crd_two_steps", "_2", "after2")]
)
def test_golden(name, batch, after):
    case = Case(name)
    loss = prepared(case)
    if batch:  # the first of two steps
        with torch.no_grad():
            assert loss(*inputs(case)).item() == pytest.approx(case.outputs["loss_step1"], rel=1e-9)
    value = loss(*inputs(case, batch))
    constants = {name: case.hyper.get(name) or case.outputs[name] for name in ("Z_s", "Z_t")}
    assert dict(Z_s=loss.Z_s.item(), Z_t=loss.Z_t.item()) == pytest.approx(constants, rel=1e-12)
    if after:
        assert torch.allclose(loss.bank_s, case.array(case.outputs[f"bank_s_{after}"]), rtol=1e-12, atol=1e-14)
        assert torch.allclose(loss.bank_t, case.array(case.outputs[f"bank_t_{after}"]), rtol=1e-12, atol=1e-14)
    case.check(value)


def test_slow_formula_with_repeated_negatives():
    torch.manual_seed(0)
    loss = crd.CRD(3, 4, 9, temperature=0.07, dim=5).double()
    loss.Z_s.fill_(40.0)
    loss.Z_t.fill_(30.0)
    f_s, f_t, index = torch.randn(2, 3).double(), torch.randn(2, 4).double(), torch.tensor([7, 2])
    negatives = torch.tensor([[0, 1, 1, 8], [3, 3, 3, 5]])
    total = 0.0
    for f, project, bank, z in (f_s, loss.project_s, loss.bank_t, 40.0), (f_t, loss.project_t, loss.bank_s, 30.0):
        for i in range(2):
            e = project(f[i]).detach()
            e, c = e / e.norm(), 4 / 9
            u = [math.exp(float(e @ bank[j]) / 0.07) / z for j in (int(index[i]), *negatives[i].tolist())]
            total -= math.log(u[0] / (u[0] + c + 1e-7)) + sum(math.log(c / (v + c + 1e-7)) for v in u[1:])
    assert loss(f_s, f_t, index, negatives).item() == pytest.approx(total / 2, rel=1e-9)


def test_banks_start_uniform_and_only_the_images_of_the_batch_move():
    torch.manual_seed(0)
    loss = crd.CRD(3, 4, 500, temperature=0.07)
    assert {"bank_s", "bank_t", "Z_s", "Z_t"} <= set(loss.state_dict())  # so that a resumed run goes on with them
    before, index = (loss.bank_s.clone(), loss.bank_t.clone()), torch.tensor([3, 499])
    loss(torch.randn(2, 3), torch.randn(2, 4), index, torch.randint(500, (2, 6)))
    for old, bank in zip(before, (loss.bank_s, loss.bank_t)):
        assert math.sqrt(3 / 128) * 0.999 < old.abs().max() <= math.sqrt(3 / 128)
        assert old.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)
        assert (bank != old).any(1).nonzero().flatten().tolist() == [3, 499]
        assert torch.allclose(bank[index].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("scale", [1.0, 200.0, 0.0])
def test_finite_in_float32(scale):
    torch.manual_seed(0)
    loss, negatives = crd.CRD(6, 5, 2000, temperature=0.07), torch.randint(2000, (4, 1024))
    for _ in range(2):  # the second time each positive is the image's own vector
        f_s = torch.full((4, 6), scale, requires_grad=True)
        value = loss(f_s, torch.full((4, 5), scale), torch.arange(4), negatives)
        value.backward()
        assert value.isfinite() and f_s.grad.isfinite().all()


LABELS = torch.tensor([3, 0, 3, 3, 1, 0, 3, 4, 1, 4, 4, 4])  # class 2 has no image, the others have unequal numbers


def draws(seed, k, batches=1):
    sampler = crd.NegativeSampler(LABELS, torch.Generator().manual_seed(seed))
    return [sampler.draw(torch.tensor([1, 3, 4, 0]), k) for _ in range(batches)]


def test_negatives_are_uniform_over_the_other_classes():
    (negatives,) = draws(seed=0, k=60_000)
    for label, row in zip((1, 3, 4, 0), negatives):
        others = (label != LABELS).nonzero().flatten()
        counts = row.bincount(minlength=len(LABELS))
        assert counts[others].sum() == 60_000  # so the positive is not among them
        expected = 60_000 / len(others)
        assert ((counts[others] - expected) ** 2 / expected).sum() < 30  # chi-square of at most 9 degrees of freedom


def test_draws_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = draws(seed=0, k=20, batches=2)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(seed=0, k=20, batches=2)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], draws(seed=1, k=20)[0])
