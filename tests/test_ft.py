import pytest
import torch
from harness import Case, Drive, load, same
from test_ab import check_resume
from torch import nn

ft = load("ft")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("ft_repdistiller", "repdistiller"),
        ("ft_repdistiller_s_larger", "repdistiller"),
        ("ft_original", "original"),
        ("ft_torchdistill_p1", "original"),
    ],
)
def test_golden(name, variant):
    case = Case(name)
    case.check(ft.ft_loss(case["f_s"], case["f_t"], variant))


def own_names(case, to_own):
    """{parameter of ours: parameter of theirs} for the parameters among a case's inputs."""
    return {to_own(key): key for key in case.inputs if key.endswith((".weight", ".bias"))}


def original_name(key):
    """convK.x is encoder layer 3 K, deconvK.x decoder layer 3 K of ours."""
    layer, end = key.split(".")
    return f"{'decoder' if layer.startswith('de') else 'encoder'}.{3 * int(layer[-1])}.{end}"


@pytest.mark.parametrize("name", ["ft_paraphraser_repdistiller", "ft_paraphraser_original"])
def test_golden_paraphraser(name):
    case = Case(name)
    paraphraser = ft.Paraphraser(8)
    case.fill(paraphraser, own_names(case, original_name if "original" in name else str))
    error = paraphraser(case["x"]) - case["x"]
    case.check(error.abs().mean() if "original" in name else error.square().mean())


@pytest.mark.parametrize("name", ["ft_translator_repdistiller", "ft_translator_original"])
def test_golden_translator(name):
    case = Case(name)
    original = "original" in name
    translator = ft.coder([6, 6, 4, 4], nn.Conv2d, batch_norm=not original)
    names = own_names(case, (lambda key: original_name(key)[8:]) if original else (lambda key: key[8:]))
    case.fill(translator, names)
    biases = () if original else ("encoder.0.bias", "encoder.3.bias", "encoder.6.bias")  # batch norm takes the mean off
    case.check((translator(case["x"]) * case["probe"]).sum(), no_gradient=biases)


def test_the_factor_has_half_the_channels_and_comes_back_whole():
    paraphraser = ft.Paraphraser(10)
    f_t = torch.randn(2, 10, 4, 4)
    assert paraphraser.encoder(f_t).shape == (2, 5, 4, 4)
    assert paraphraser(f_t).shape == f_t.shape


def test_known_zeros_and_what_tells_the_variants_apart():
    torch.manual_seed(0)
    factor = torch.randn(4, 6, 4, 4)
    for variant in ("repdistiller", "original"):
        assert ft.ft_loss(3 * factor, factor, variant).item() == pytest.approx(0, abs=1e-7)
        assert ft.ft_loss(torch.randn(4, 6, 4, 4), factor, variant).item() > 1e-3
    assert ft.ft_loss(-factor, factor).item() == 0  # blind to the sign
    assert ft.ft_loss(factor.flip(1), factor).item() == pytest.approx(0, abs=1e-7)  # and to the order of the channels
    assert ft.ft_loss(-factor, factor, "original").item() > 1e-2


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
def test_finite_for_extreme_factors(variant):
    for f in (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 200.0), torch.full((2, 3, 2, 2), -50.0)):
        f_s = f.clone().requires_grad_()
        value = ft.ft_loss(f_s, torch.randn(2, 3, 4, 4), variant)
        value.backward()
        assert value.isfinite()
        assert f_s.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
def test_stages(variant, monkeypatch):
    drive = Drive(monkeypatch, "ft", ft_variant=variant)
    phases = {phase: sorted(trained) for phase, trained in drive.phases.items()}
    assert phases == {"paraphraser": ["paraphraser"], "": ["student", "translator"]}
    assert same(drive.after["paraphraser"], drive.phases["paraphraser"].state_dict())  # stage 2 leaves the paraphraser alone
    assert not any(p.requires_grad for p in drive.phases["paraphraser"].parameters())
    norms = [m for m in drive.trained["translator"].modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (3 if variant == "repdistiller" else 0)
    assert [(len(means), test is None) for _, means, test, _ in drive.rows] == [(1, True), (2, False)]


@pytest.mark.parametrize(("student", "rate"), [("resnet8", 0.01), ("wrn_16_1", 0.01), ("vgg8", 0.02)])
def test_learning_rate_of_stage_1(student, rate, monkeypatch):
    rates, sgd = [], torch.optim.SGD

    def spy(parameters, lr, **others):
        rates.append(lr)
        return sgd(parameters, lr, **others)

    monkeypatch.setattr(torch.optim, "SGD", spy)  # what Drive's fresh module imports
    Drive(monkeypatch, "ft", student=student, lr=0.02, batch_size=2)
    assert rates == [rate, 0.02]


def test_resumes_in_either_stage(monkeypatch, tmp_path):
    check_resume(monkeypatch, tmp_path, "ft", stops=(5, 11), init_epochs=2)  # in the second epoch of each stage
