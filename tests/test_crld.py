import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import CASES, Case, load
from PIL import Image, ImageEnhance, ImageOps

crld = load("crld")
mlld = load("mlld")
VIEWS = "weak_s", "strong_s", "weak_t", "strong_t"


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] == "CRLD"])
def test_golden(name):
    case, h = Case(name), CASES[name][0]["hyper"]
    ce = F.cross_entropy(case["weak_s"], case["target"]) + F.cross_entropy(case["strong_s"], case["target"])
    within, cross = crld.crld_losses(*(case[view] for view in VIEWS), h["T"], h["tau_w"], h["tau_s"])
    terms = h["ce_weight"] * ce, h["wv_weight"] * within, h["cv_weight"] * cross
    assert [term.item() for term in terms] == pytest.approx([case.outputs[f"loss_{k}"] for k in ("ce", "kd_wv", "kd_cv")])
    case.check(sum(terms))


@pytest.mark.parametrize("method", [crld, mlld])
@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
@pytest.mark.parametrize("classes", [2, 100])
def test_extremes(method, classes, size):
    torch.manual_seed(0)
    logits = [size * torch.randn(6, classes).sign() for _ in range(4)]
    logits[0].requires_grad_()
    settings = [(1.0, 0.9, 0.2)] if method is crld else [(4.0, "half"), (4.0, "image")]
    for setting in settings:
        terms = (crld.crld_losses if method is crld else mlld.mlld_losses)(*logits, *setting)
        sum(terms).backward()
        assert all(term.isfinite() for term in terms)
        assert logits[0].grad.isfinite().all()


# What PIL does, in the order of RANDAUGMENT
def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


PIL = [
    lambda image, v: image,
    lambda image, v: ImageOps.autocontrast(image),
    lambda image, v: ImageOps.equalize(image),
    *(partial(lambda kind, image, v: kind(image).enhance(v), kind) for kind in (ImageEnhance.Brightness, ImageEnhance.Color)),
    *(partial(lambda kind, image, v: kind(image).enhance(v), kind) for kind in (ImageEnhance.Contrast, ImageEnhance.Sharpness)),
    lambda image, v: ImageOps.posterize(image, int(v)),
    lambda image, v: ImageOps.solarize(image, v),
    lambda image, v: image.rotate(math.degrees(v)),
    lambda image, v: affine(image, 1, v, 0, 0, 1, 0),
    lambda image, v: affine(image, 1, 0, 0, v, 1, 0),
    lambda image, v: affine(image, 1, 0, v * image.width, 0, 1, 0),
    lambda image, v: affine(image, 1, 0, 0, 0, 1, v * image.height),
]


def smooth_images(n, side):
    torch.manual_seed(side)
    pixels = 200 * F.interpolate(torch.rand(n, 3, 6, 6), side, mode="bicubic") + 5 * torch.randn(n, 3, side, side)
    return pixels.add(20).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize("k", range(len(PIL)))
def test_operations_are_those_of_pil(k, side):
    low, high, operation = crld.RANDAUGMENT[k]
    x, v = smooth_images(8, side), low + (high - low) * torch.rand(8, 1, 1, 1)
    ours = operation(x, v)
    images = [PIL[k](Image.fromarray(image.permute(1, 2, 0).numpy()), value.item()) for image, value in zip(x, v)]
    theirs = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    assert ((ours.int() - theirs.int()).abs() > 1).float().mean() < 1e-3  # a rotation may take another nearest pixel
    assert ours.dtype == torch.uint8


@pytest.mark.parametrize("method", [crld, mlld])
@pytest.mark.parametrize("side", [17, 32])
def test_randaugment(method, side, monkeypatch):
    pixels = smooth_images(600, side) / 255
    first, again = (method.randaugment(pixels, 2, torch.Generator().manual_seed(1)) for _ in range(2))
    other = method.randaugment(pixels, 2, torch.Generator().manual_seed(2))
    assert first.equal(again)
    assert not first.equal(other)
    changed = (first != (255 * pixels).round()).any(1).flatten(1).float().mean(1)
    assert (changed > 0).float().mean() > 0.95

    monkeypatch.setattr(method, "RANDAUGMENT", [(0.0, 1.0, lambda x, v: 0 * x)])
    square = method.randaugment(pixels, 1, torch.Generator().manual_seed(1))
    color = torch.tensor([125, 123, 114])[:, None, None]
    inside = (square == color).all(1)
    assert ((square == 0).all(1) | inside).all()
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    assert (height * width == inside.sum((1, 2))).all()  # one rectangle
    assert height.max() <= side // 2 + 1 and height.float().mean() > 0.15 * side
    assert inside.any(0).all()  # every place can be covered


def test_the_two_methods_draw_the_same_view():
    pixels = smooth_images(20, 32) / 255
    a, b = (method.randaugment(pixels, 3, torch.Generator().manual_seed(1)) for method in (crld, mlld))
    assert a.equal(b)
