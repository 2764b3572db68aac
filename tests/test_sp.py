import pytest
import torch
from harness import Case, load

sp = load("sp")


def test_golden_stages():
    case = Case("sp_stages")
    terms = [sp.sp_loss(case[f"s{stage}"], case[f"t{stage}"]) for stage in (1, 2, 3)]
    for stage, term in enumerate(terms, start=1):
        assert term.item() == pytest.approx(case.outputs[f"stage{stage}"], rel=1e-9)
    case.check(sum(terms))


@pytest.mark.parametrize(("name", "stage"), [("sp_last", 3), ("sp_sizes_differ", 1)])
def test_golden_one_stage(name, stage):
    case = Case(name)
    case.check(sp.sp_loss(case[f"s{stage}"], case[f"t{stage}"]))


def test_slow_formula():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(5, 2, 4, 4).double(), torch.randn(5, 7, 2, 2).double()

    def rows(f):
        gram = [[float((f[i] * f[j]).sum()) for j in range(5)] for i in range(5)]
        return [[v / sum(w * w for w in row) ** 0.5 for v in row] for row in gram]

    expected = sum((v - w) ** 2 for row_s, row_t in zip(rows(f_s), rows(f_t)) for v, w in zip(row_s, row_t)) / 25
    assert sp.sp_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-9)


def test_zero_for_maps_that_differ_by_scale_or_rotation():
    torch.manual_seed(0)
    f = torch.randn(6, 4, 3, 3).double()
    rotation = torch.linalg.qr(torch.randn(36, 36).double())[0]
    for same in f, 5 * f, -f, f.flip(1), f.repeat(1, 2, 1, 1), (f.flatten(1) @ rotation).reshape(f.shape):
        assert sp.sp_loss(same, f).item() == pytest.approx(0, abs=1e-20)
    assert sp.sp_loss(f.flip(0), f).item() > 1e-3


@pytest.mark.parametrize("copies", [2, 4])
def test_every_image_twice_gives_half_the_loss(copies):
    torch.manual_seed(0)
    f_s, f_t = torch.randn(6, 4, 3, 3).double(), torch.randn(6, 5, 2, 2).double()
    repeated = [f.repeat(copies, 1, 1, 1) for f in (f_s, f_t)]
    assert copies * sp.sp_loss(*repeated).item() == pytest.approx(sp.sp_loss(f_s, f_t).item(), rel=1e-12)


def test_falls_as_one_over_the_batch_size():
    torch.manual_seed(0)
    f_s, f_t = (1 + torch.randn(1024, 64)).relu(), (1 + torch.randn(1024, 64)).relu()

    def mean_loss(batch):
        pairs = zip(f_s.split(batch), f_t.split(batch))
        return sum(sp.sp_loss(*pair).item() for pair in pairs) / (1024 / batch)

    for batch in 16, 32, 64:
        assert batch * mean_loss(batch) == pytest.approx(128 * mean_loss(128), rel=0.2)


def test_bounds():
    torch.manual_seed(0)
    f_s, f_t = torch.randn(8, 5), torch.randn(8, 6)
    assert torch.allclose(sp.similarity(f_s).norm(dim=1), torch.ones(8))
    for student in f_s, -f_s, torch.eye(8):
        assert 0 < sp.sp_loss(student, f_t).item() <= 4 / 8  # unit rows are at most 2 apart


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_finite_for_empty_and_large_maps(size):
    f_s = (size * torch.randn(4, 3, 4, 4)).requires_grad_()
    value = sp.sp_loss(f_s, torch.randn(4, 5, 4, 4))
    value.backward()
    assert value.isfinite()
    assert f_s.grad.isfinite().all()


@pytest.mark.parametrize(("batch_size", "lines"), [(64, 0), (16, 1), (128, 1)])
def test_a_batch_size_other_than_64_is_warned_of_in_one_line(monkeypatch, capsys, batch_size, lines):
    monkeypatch.setattr(sp, "Run", lambda script, args: 1 / 0)  # what comes before the run is enough here
    with pytest.raises(ZeroDivisionError):
        sp.main(sp.Args(batch_size=batch_size))
    printed = capsys.readouterr().out
    assert printed.count("\n") == printed.count("--sp-weight was tuned for batches of 64") == lines


def test_published_setting():
    args = sp.Args()
    assert (args.ce_weight, args.kd_weight, args.sp_weight, args.batch_size) == (1.0, 0.0, 3000.0, 64)
