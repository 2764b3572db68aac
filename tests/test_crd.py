import math
from types import SimpleNamespace

import pytest
import torch
from harness import Case, Drive, array, load
from test_ab import check_resume

crd = load("crd")
NAMES = {f"project_{side}.{end}": f"embed_{side}.linear.{end}" for side in "st" for end in ("weight", "bias")}


def prepared(case, **constants):
    """The module of a golden case, with its weights and banks."""
    loss = crd.CRD(16, 12, images=case.hyper["n_data"], temperature=case.hyper["T"], momentum=case.hyper["momentum"], width=8)
    case.fill(loss, NAMES)
    for name, value in dict(bank_s=case["bank_s"], bank_t=case["bank_t"], **constants).items():
        getattr(loss, name).copy_(torch.as_tensor(value))
    return loss


def close(bank, key):
    return torch.allclose(bank, array(key), rtol=1e-12, atol=1e-14)


def inputs(case, batch=""):
    index, picked = case[f"idx{batch}"], case[f"contrast_idx{batch}"]
    assert torch.equal(index, picked[:, 0])
    return case[f"f_s{batch}"], case[f"f_t{batch}"], index, picked[:, 1:]


def test_golden_first_batch():
    case = Case("crd_first_batch")
    loss = prepared(case)
    value = loss(*inputs(case))
    assert loss.constant_s.item() == pytest.approx(case.outputs["Z_s"], rel=1e-12)
    assert loss.constant_t.item() == pytest.approx(case.outputs["Z_t"], rel=1e-12)
    assert close(loss.bank_s, case.outputs["bank_s_after"])
    assert close(loss.bank_t, case.outputs["bank_t_after"])
    case.check(value)


def test_golden_given_constants():
    case = Case("crd_given_Z")
    loss = prepared(case, constant_s=case.hyper["Z_s"], constant_t=case.hyper["Z_t"])
    value = loss(*inputs(case))
    assert loss.constant_s.item() == 60
    assert loss.constant_t.item() == 75
    case.check(value)


def test_golden_two_steps():
    case = Case("crd_two_steps")
    loss = prepared(case)
    with torch.no_grad():
        assert loss(*inputs(case)).item() == pytest.approx(case.outputs["loss_step1"], rel=1e-9)
    value = loss(*inputs(case, "_2"))
    assert loss.constant_s.item() == pytest.approx(case.outputs["Z_s"], rel=1e-12)
    assert close(loss.bank_s, case.outputs["bank_s_after2"])
    assert close(loss.bank_t, case.outputs["bank_t_after2"])
    case.check(value)


def test_slow_formula_with_repeated_negatives():
    torch.manual_seed(0)
    loss = crd.CRD(3, 4, images=9, width=5).double()
    loss.constant_s.fill_(40.0)
    loss.constant_t.fill_(30.0)
    f_s, f_t, index = torch.randn(2, 3).double(), torch.randn(2, 4).double(), torch.tensor([7, 2])
    negatives = torch.tensor([[0, 1, 1, 8], [3, 3, 3, 5]])
    total = 0.0
    for f, project, bank, z in (f_s, loss.project_s, loss.bank_t, 40.0), (f_t, loss.project_t, loss.bank_s, 30.0):
        for i in range(2):
            e = project(f[i]).detach()
            e = e / e.norm()
            c = 4 / 9
            u = [math.exp(float(e @ bank[j]) / 0.07) / z for j in (int(index[i]), *negatives[i].tolist())]
            total -= math.log(u[0] / (u[0] + c + 1e-7)) + sum(math.log(c / (v + c + 1e-7)) for v in u[1:])
    assert loss(f_s, f_t, index, negatives).item() == pytest.approx(total / 2, rel=1e-9)


def test_banks_start_uniform_and_keep_unit_vectors():
    torch.manual_seed(0)
    loss = crd.CRD(3, 4, images=500)
    bound = math.sqrt(3 / 128)
    for bank in (loss.bank_s, loss.bank_t):
        assert bound * 0.999 < bank.abs().max() <= bound
        assert bank.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)
    before = loss.bank_s.clone()
    index = torch.tensor([3, 499])
    loss(torch.randn(2, 3), torch.randn(2, 4), index, torch.randint(500, (2, 6)))
    changed = (loss.bank_s != before).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 499]
    assert torch.allclose(loss.bank_s[index].norm(dim=1), torch.ones(2))


def test_state_holds_banks_and_constants_and_counts_two_projections():
    loss = crd.CRD(64, 256, images=50)
    assert {"bank_s", "bank_t", "constant_s", "constant_t"} <= set(loss.state_dict())
    assert sum(p.numel() for p in loss.parameters()) == 65 * 128 + 257 * 128


def test_finite_at_the_real_size_in_float32():
    torch.manual_seed(0)
    loss = crd.CRD(6, 5, images=2000)
    negatives = torch.randint(2000, (4, 1024))
    for scale in (1.0, 200.0, 0.0):
        for _ in range(2):  # the second time each positive is the image's own vector
            f_s = (scale * torch.ones(4, 6)).requires_grad_()
            value = loss(f_s, scale * torch.ones(4, 5), torch.arange(4), negatives)
            value.backward()
            assert value.isfinite()
            assert f_s.grad.isfinite().all()


def drawn(labels, k, batches, seed=0):
    train = SimpleNamespace(labels=labels, generator=torch.Generator().manual_seed(seed))
    return [batch[2:] for batch in crd.with_negatives(((None, labels[index], index) for index in batches), train, k)]


def test_negatives_are_of_other_classes_and_uniform():
    labels = torch.tensor([3, 0, 3, 3, 1, 0, 3, 4, 1, 4, 4, 4])  # class 2 has no image, the others have unequal numbers
    ((index, negatives),) = drawn(labels, 60_000, [torch.tensor([4, 0, 7, 1])])
    assert negatives.shape == (4, 60_000)
    for image, row in zip(index.tolist(), negatives):
        assert not (labels[row] == labels[image]).any()  # so the positive is not among them
        others = (labels != labels[image]).nonzero().flatten()
        counts = row.bincount(minlength=len(labels))[others]
        expected = 60_000 / len(others)
        assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-square of at most 9 degrees of freedom


def test_draws_depend_on_the_generator_alone():
    labels = torch.arange(40) % 5
    batches = [torch.arange(8), torch.arange(8, 16)]
    torch.manual_seed(1)
    first = drawn(labels, 20, batches)
    torch.manual_seed(2)
    second = drawn(labels, 20, batches)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))
    assert not torch.equal(first[0][1], first[1][1])
    assert not torch.equal(first[0][1], drawn(labels, 20, batches, seed=1)[0][1])


def test_memory_is_printed_once_and_few_images_give_fewer_negatives(monkeypatch, capsys):
    drive = Drive(monkeypatch, "crd", epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("banks")]
    assert lines == ["banks       0.0 MiB on cpu, 35 negatives an image"]
    assert all(value.isfinite().all() for value in drive.trained["crd"].state_dict().values())


@pytest.mark.parametrize("flags", [{"negatives": 0}, {"crd_temperature": 0.0}])
def test_bad_values_are_refused(flags, capsys):
    args = crd.Args(**flags)
    with pytest.raises(SystemExit) as end:
        crd.main(args)
    assert end.value.code == 2
    message = f"--crd-temperature {args.crd_temperature:g} and --negatives {args.negatives} must be above 0"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_resumes_with_banks_and_constants(monkeypatch, tmp_path):
    check_resume(monkeypatch, tmp_path, "crd", stops=(5,))
