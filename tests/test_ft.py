import pytest
import torch
from golden import Case, load
from running import Drive, same
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


def names_of(case, variant, drop=0):
    """{parameter of ours: parameter of theirs}; the original's convK.x is layer 3 K of our encoder, deconvK.x of our decoder."""

    def own(key):
        layer, end = key.split(".")[0], key.split(".")[-1]
        return f"{'decoder' if layer.startswith('de') else 'encoder'}.{3 * int(layer[-1])}.{end}"

    keys = [key for key in case.inputs if key.endswith((".weight", ".bias"))]
    return {(own(key) if variant == "original" else key)[drop:]: key for key in keys}


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
def test_golden_paraphraser(variant):
    case = Case(f"ft_paraphraser_{variant}")
    paraphraser = case.fill(ft.Paraphraser(8), names_of(case, variant))
    error = paraphraser(case["x"]) - case["x"]
    case.check(error.abs().mean() if variant == "original" else error.square().mean())


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
def test_golden_translator(variant):
    case = Case(f"ft_translator_{variant}")
    translator = ft.coder([6, 6, 4, 4], nn.Conv2d, batch_norm=variant == "repdistiller")
    case.fill(translator, names_of(case, variant, drop=len("encoder.")))
    biases = () if variant == "original" else ("encoder.0.bias", "encoder.3.bias", "encoder.6.bias")
    case.check((translator(case["x"]) * case["probe"]).sum(), no_gradient=biases)  # batch norm removes the mean


def test_what_each_variant_sees():
    torch.manual_seed(0)
    factor = torch.randn(4, 6, 4, 4)
    for variant in "repdistiller", "original":
        assert ft.ft_loss(3 * factor, factor, variant).item() == pytest.approx(0, abs=1e-7)
        assert ft.ft_loss(torch.randn(4, 6, 4, 4), factor, variant).item() > 1e-3
    for other in -factor, factor.flip(1):  # signs and the order of the channels
        assert ft.ft_loss(other, factor, "repdistiller").item() == pytest.approx(0, abs=1e-7)
        assert ft.ft_loss(other, factor, "original").item() > 1e-2


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
@pytest.mark.parametrize("value", [0.0, 200.0, -50.0])
def test_finite_for_constant_factors(variant, value):
    f_s = torch.full((2, 3, 4, 4), value, requires_grad=True)
    loss = ft.ft_loss(f_s, torch.randn(2, 3, 4, 4), variant)
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["repdistiller", "original"])
def test_phase_1_trains_the_paraphraser_and_phase_2_the_rest(variant, monkeypatch):
    drive = Drive(monkeypatch, "ft", ft_variant=variant)
    assert {phase: sorted(trained) for phase, trained in drive.phases.items()} == {
        "init": ["paraphraser"],
        "": ["student", "translator"],
    }
    assert same(drive.after["init"], drive.phases["init"].state_dict())  # phase 2 leaves the paraphraser alone
    norms = [m for m in drive.phases[""]["translator"].modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (3 if variant == "repdistiller" else 0)


@pytest.mark.parametrize(("student", "init_lr"), [("resnet8", 0.01), ("wrn_16_1", 0.01), ("vgg8", 0.02)])
def test_learning_rate_of_phase_1(student, init_lr, monkeypatch):
    rates, sgd = [], torch.optim.SGD

    def spy(parameters, lr, **others):
        rates.append(lr)
        return sgd(parameters, lr, **others)

    monkeypatch.setattr(torch.optim, "SGD", spy)  # what Drive's fresh module imports
    Drive(monkeypatch, "ft", student=student, lr=0.02, batch_size=2)
    assert rates == [init_lr, 0.02]
