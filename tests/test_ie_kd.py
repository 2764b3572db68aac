import math
from functools import partial

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Case, Drive, load, same, small_data

ie_kd = load("ie_kd")


def coder_names(own="", golden=""):
    """{parameter of a Coder: name of its golden input}"""
    names = [f"{place}.weight" for place in (1, 2, 4, 5, 7, 8)] + [f"{place}.bias" for place in (2, 5, 8)]
    return {own + name: f"{golden}layers.{name}" for name in names}


def fill_statistics(coder, case, golden=""):
    for place in (2, 5, 8):
        for buffer in ("running_mean", "running_var"):
            getattr(coder[place], buffer).copy_(case[f"{golden}layers.{place}.{buffer}"])


@pytest.mark.parametrize(("name", "sign"), [("iekd_norm_p1_positive", 1), ("iekd_norm_p1_negative", -1)])
def test_golden_distance(name, sign):
    case = Case(name)
    case.check(sign * ie_kd.distance(case["factor_s"], case["factor_t"]))


def test_golden_reconstruction(monkeypatch):
    case = Case("iekd_rec_p1")
    autoencoder = ie_kd.AutoEncoder(10, 5)
    monkeypatch.setattr(autoencoder.decode, "forward", lambda factor: case["y"])
    case.check(autoencoder.double()(case["x"]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden_coder(mode):
    case = Case(f"iekd_coder_bn_{mode}")
    coder = case.fill(ie_kd.Coder(8, 5), coder_names())
    fill_statistics(coder, case)
    case.check((coder.train(mode == "train")(case["x"]) * case["probe"]).sum())


def test_golden_autoencoder():
    case = Case("iekd_autoencoder_train")
    names = coder_names("encode.", "encoder.") | coder_names("decode.", "decoder.")
    case.check(case.fill(ie_kd.AutoEncoder(8, 6), names)(case["x"]))


def test_golden_cka():
    case = Case("iekd_cka_linear")
    case.check(ie_kd.linear_cka(case["x"], case["y"]))


def test_golden_total():
    case = Case("iekd_total")
    iekd, encode_t = ie_kd.IEKD(12), ie_kd.Coder(10, 6)
    case.fill(iekd, coder_names("encode_inh.", "enc_inh.") | coder_names("encode_exp.", "enc_exp."))
    case.fill(encode_t, coder_names("", "enc_t."))
    fill_statistics(encode_t, case, "enc_t.")
    with torch.no_grad():
        factor_t = encode_t.eval()(case["f_t"])
    inheritance, exploration = iekd(case["f_s"], factor_t)
    assert inheritance.item() == pytest.approx(case.outputs["inh"], rel=1e-9)
    assert exploration.item() == pytest.approx(case.outputs["exp"], rel=1e-9)
    args = ie_kd.Args()
    loss = F.cross_entropy(case["logits_s"], case["target"])
    case.check(args.ce_weight * loss + args.inheritance_weight * inheritance + args.exploration_weight * exploration)


def test_distance_is_zero_for_equal_largest_for_opposite_and_blind_to_scale():
    torch.manual_seed(0)
    f, g = torch.randn(2, 4, 3, 5, 5).double()
    assert ie_kd.distance(f, f).item() == 0
    unit = f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True)
    assert ie_kd.distance(f, -f).item() == pytest.approx(2 * unit.abs().mean().item())
    assert ie_kd.distance(torch.ones(2, 3, 5, 5), -torch.ones(2, 3, 5, 5)).item() == pytest.approx(2 / math.sqrt(75))  # the bound
    assert ie_kd.distance(f, g).item() <= 2 / math.sqrt(75)
    assert ie_kd.distance(7 * f, 0.1 * g).item() == pytest.approx(ie_kd.distance(f, g).item(), rel=1e-12)


def test_default_weight_makes_the_size_of_a_cross_entropy():
    torch.manual_seed(0)
    f, g = F.leaky_relu(torch.randn(2, 64, 32, 8, 8), 0.1)  # a factor comes out of one
    assert 0.8 < ie_kd.Args().inheritance_weight * ie_kd.distance(f, g).item() < 1.2


def test_the_larger_factor_is_pooled():
    torch.manual_seed(0)
    f, g = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4)
    pooled = f.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    assert ie_kd.distance(f, g).item() == pytest.approx(ie_kd.distance(pooled, g).item(), rel=1e-6)
    assert ie_kd.distance(g, f).item() == pytest.approx(ie_kd.distance(f, g).item(), rel=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4])
def test_finite_for_maps_that_are_the_same_everywhere(fill):
    f_s = torch.full((2, 6, 4, 4), fill, requires_grad=True)
    iekd = ie_kd.IEKD(6)
    loss = sum(iekd(f_s, torch.full((2, 3, 4, 4), fill)))
    loss.backward()
    assert loss.isfinite()
    assert f_s.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in iekd.parameters())


def test_inheritance_and_exploration_are_opposite_for_equal_halves():
    torch.manual_seed(0)
    iekd = ie_kd.IEKD(8)
    iekd.encode_exp.load_state_dict(iekd.encode_inh.state_dict())
    inheritance, exploration = iekd(torch.randn(4, 4, 5, 5).repeat(1, 2, 1, 1), torch.randn(4, 4, 5, 5))
    assert inheritance.item() == -exploration.item() > 0


@pytest.mark.parametrize(("c_in", "c_out", "parameters"), [(64, 32, 64_768), (32, 64, 64_832), (32, 32, 27_840)])
def test_coder(c_in, c_out, parameters):
    coder = ie_kd.Coder(c_in, c_out)
    assert sum(p.numel() for p in coder.parameters()) == parameters
    assert coder(torch.randn(2, c_in, 7, 7)).shape == (2, c_out, 7, 7)
    for place, c in (1, c_in), (4, c_out), (7, c_out):
        assert coder[place].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * c)), rel=0.03)


@pytest.mark.parametrize("split", ["first", "random"])
def test_halves_are_disjoint_and_together_everything(split):
    f = torch.arange(10.0)[None, :, None, None].expand(2, 10, 3, 3)
    f_inh, f_exp = (half[0, :, 0, 0].int().tolist() for half in ie_kd.IEKD(10, split).halves(f))
    assert len(f_inh) == len(f_exp) == 5
    assert sorted(f_inh + f_exp) == list(range(10))
    assert (f_inh == list(range(5))) == (split == "first")


def test_the_random_split_is_in_the_checkpoint():
    one, other = ie_kd.IEKD(64, "random"), ie_kd.IEKD(64, "random")
    assert not torch.equal(one.order, other.order)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.order, other.order)
    assert "order" in one.state_dict()
    assert "order" not in ie_kd.IEKD(64).state_dict()


@pytest.mark.parametrize("split", ["first", "random"])
def test_each_term_teaches_its_own_half_only(split):
    torch.manual_seed(0)
    iekd, f_s = ie_kd.IEKD(8, split), torch.randn(4, 8, 5, 5, requires_grad=True)
    for term, half in enumerate(iekd.halves(torch.arange(8)[None, :, None, None])):
        (gradient,) = torch.autograd.grad(iekd(f_s, torch.randn(4, 4, 5, 5))[term], f_s)
        taught = gradient.abs().amax((0, 2, 3)) > 0
        assert taught.nonzero().flatten().tolist() == sorted(half.flatten().tolist())


def test_cka_against_the_definition_and_its_invariances():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, 2, 2).double(), torch.randn(20, 5, 2, 2).double()
    x_c, y_c = (f.flatten(1) - f.flatten(1).mean(0) for f in (x, y))
    expected = (x_c.T @ y_c).norm() ** 2 / ((x_c.T @ x_c).norm() * (y_c.T @ y_c).norm())
    assert ie_kd.linear_cka(x, y).item() == pytest.approx(expected.item(), rel=1e-12)
    assert ie_kd.linear_cka(x, x).item() == pytest.approx(1, rel=1e-12)
    rotation = torch.linalg.qr(torch.randn(12, 12).double()).Q
    assert ie_kd.linear_cka(3 * x.flatten(1) @ rotation + 1, y).item() == pytest.approx(expected.item(), rel=1e-9)
    assert ie_kd.linear_cka(torch.ones(20, 3), y).item() == 0


def test_phases_and_what_they_move(monkeypatch):
    drive = Drive(monkeypatch, "ie_kd", split="random", epochs=2)
    assert drive.args.milestones == (1,)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in drive.optimizer.param_groups)
    first, second = drive.phases["autoencoder"], drive.phases[""]
    assert list(first) == ["autoencoder"]
    assert list(second) == ["student", "iekd"]
    assert same(drive.after["autoencoder"], first.state_dict())  # phase 2 leaves parameters and statistics alone
    assert not any(module.training for module in first["autoencoder"].modules())
    assert same(drive.teacher_before, drive.teacher.state_dict())
    for phase, trained in drive.phases.items():
        assert all(not torch.equal(drive.before[phase][name], drive.after[phase][name]) for name, _ in trained.named_parameters())
    assert torch.equal(drive.before[""]["iekd.order"], drive.after[""]["iekd.order"])
    (_, init_means, init_test, _), (_, _, _, more), _ = drive.rows
    assert len(init_means) == 1
    assert init_test is None
    assert list(more) == ["cka_inh_exp", "cka_exp_t", "cka_inh_t"]
    assert all(0 < value < 1 for value in more.values())


def test_the_logged_cka_is_that_of_the_test_images_in_eval_mode(monkeypatch):
    drive = Drive(monkeypatch, "ie_kd")
    _, test = small_data(drive.args)
    ((x, _),) = test.batches()
    with torch.no_grad():
        f_s, f_t = drive.student.eval()(x)[1].last, drive.teacher(x)[1].last
    pairs = dict(cka_inh_exp=(f_s[:, :32], f_s[:, 32:]), cka_exp_t=(f_s[:, 32:], f_t), cka_inh_t=(f_s[:, :32], f_t))
    for name, pair in pairs.items():
        assert drive.rows[-1][3][name] == pytest.approx(ie_kd.linear_cka(*pair).item(), rel=1e-5)


def plain_student(monkeypatch):
    """The student that methods/vanilla.py trains with this recipe on the same views."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", partial(torch.optim.SGD, nesterov=True))
        return Drive(patch, "vanilla", data=partial(small_data, padding="reflect"), lr=0.1).student.state_dict()


def test_without_both_terms_it_is_the_plain_student(monkeypatch):
    plain = plain_student(monkeypatch)
    assert same(plain, Drive(monkeypatch, "ie_kd", inheritance_weight=0.0, exploration_weight=0.0).student.state_dict())
    assert not same(plain, Drive(monkeypatch, "ie_kd", inheritance_weight=0.0).student.state_dict())


@pytest.mark.parametrize("student", ["resnet20", "mobilenetv2"])
def test_recipe(student):
    args = ie_kd.Args(student=student)
    harness.common.resolve(args)
    assert (args.epochs, args.batch_size, args.lr, args.milestones, args.init_epochs) == (160, 128, 0.1, (80, 120), 30)


def test_unknown_split(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ie_kd.main(ie_kd.Args(split="last", runs=tmp_path))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --split last is unknown: take first or random\n"
    assert not list(tmp_path.iterdir())
