import pytest
import torch
import torchvision.transforms.functional as vision
from golden import load
from running import Drive, same, small_data

dual_aug = load("dual_aug")


def images(n, side=16):
    """Random colors in [0, 1], with some exactly black, white and gray pixels among them."""
    pixels = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels[:, :, 0, 0], pixels[:, :, 0, 1], pixels[:, :, 1, 0] = 0, 1, 0.4
    pixels[:, 1, 1, 1] = pixels[:, 0, 1, 1]  # two channels share the maximum or the minimum
    return pixels


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_equals_torchvision(turns):
    pixels = images(4)
    own = dual_aug.shift_hue(pixels, torch.full((4, 1, 1, 1), turns))
    assert (own - vision.adjust_hue(pixels, turns)).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_color_equals_torchvision_image_by_image(seed):
    pixels = images(24)
    own = dual_aug.color(pixels, torch.Generator().manual_seed(seed))
    random = torch.Generator().manual_seed(seed)
    draws, order = torch.rand(6, 24, generator=random).T.tolist(), torch.randperm(4, generator=random).tolist()
    for image, result, draw in zip(pixels, own, draws, strict=True):
        if draw[4] < 0.8:
            for k in order:
                adjust = getattr(vision, "adjust_" + ["brightness", "contrast", "saturation", "hue"][k])
                image = adjust(image, 0.2 * draw[3] - 0.1 if k == 3 else 0.6 + 0.8 * draw[k])
        if draw[5] < 0.2:
            image = vision.rgb_to_grayscale(image, 3)
        assert (result - image).abs().max() < 1e-5


def test_shares_and_ranges():
    pixels = torch.tensor([0.6, 0.4, 0.5])[:, None, None].expand(10_000, 3, 1, 1)  # one color, which contrast keeps
    out = dual_aug.color(pixels, torch.Generator().manual_seed(0))
    gray = (out - out[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.012)
    assert (out == pixels).flatten(1).all(1).float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.012)  # neither
    level = out[gray].mean((1, 2, 3)) / vision.rgb_to_grayscale(pixels[:1]).item()
    assert 0.55 < level.min() < 0.65 and 1.35 < level.max() < 1.45


@pytest.mark.parametrize("side", [8, 5])
def test_cutout(side):
    n, size = 200, 16
    x = torch.ones(n, 3, size, size)
    out = dual_aug.cutout(x, side, torch.Generator().manual_seed(0))
    rows, columns = torch.randint(size, (2, n), generator=torch.Generator().manual_seed(0)).tolist()
    for image, row, column in zip(out, rows, columns, strict=True):
        expected = torch.ones(3, size, size)
        top, left = row - side // 2, column - side // 2
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert torch.equal(image, expected)
    assert x.min() == 1  # a copy


class Views(Drive):
    """Keeps the batches that `step` was given."""

    def call_step(self, step, tensors):
        self.batches = [*getattr(self, "batches", []), tensors]
        return step(*tensors)


@pytest.mark.parametrize("kinds", [("weak", "weak"), ("color", "weak"), ("weak", "cutout"), ("cutout", "color")])
@pytest.mark.parametrize("same_view", [False, True])
def test_views(monkeypatch, kinds, same_view):
    """One crop for each network, changed in pixels, with all draws from the epoch's generator."""
    drive = Views(monkeypatch, "dual_aug", student_aug=kinds[0], teacher_aug=kinds[1], same_view=same_view)
    train, _ = small_data(drive.args)

    def expected(kind, x):
        if kind == "color":
            return (dual_aug.color(x * train.std + train.mean, train.generator) - train.mean) / train.std
        return x if kind == "weak" else dual_aug.cutout(x, 8, train.generator)

    for given, (x_1, x_2, *rest) in zip(drive.batches, train.epoch(1, views=2), strict=True):
        x_s = expected(kinds[0], x_1)
        x_t = x_s if same_view else expected(kinds[1], x_2)
        assert all(torch.equal(a, b) for a, b in zip(given, (x_s, x_t, *rest), strict=True))
        assert same_view or not torch.equal(x_s, x_t)


def test_each_network_sees_its_own_view(monkeypatch):
    seen = {}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda net, x: seen.setdefault(net, []).append(x[0]))
    try:
        drive = Views(monkeypatch, "dual_aug")
    finally:
        hook.remove()
    for k, net in enumerate((drive.student, drive.teacher)):
        assert all(any(x is batch[k] for x in seen[net]) for batch in drive.batches)


def test_weak_and_same_view_is_icd_bit_for_bit(monkeypatch):
    icd = Drive(monkeypatch, "icd", epochs=2, kd_weight=1.0)
    own = Drive(monkeypatch, "dual_aug", epochs=2, kd_weight=1.0, student_aug="weak", same_view=True)
    assert same(icd.after[""], own.after[""])
    assert icd.rows == own.rows
    assert not same(icd.after[""], Drive(monkeypatch, "dual_aug", epochs=2, kd_weight=1.0).after[""])
