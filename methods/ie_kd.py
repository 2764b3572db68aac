"""IE-KD: Revisiting Knowledge Distillation: An Inheritance and Exploration Framework. Huang, Shen, Xing et al., CVPR 2021,
arXiv 2107.00181. Presumably its IE-FT, the variant built on factor transfer.

Phase 1 trains an auto-encoder that compresses the teacher's last map into a factor. In phase 2 one half of the student's channels
must reproduce that factor through a small encoder of its own (inheritance), and the other half must differ from it (exploration),
so that the student does not merely repeat the teacher.

    L_rec   = mean |f_t - D_t(E_t(f_t))|                              phase 1, trains E_t and D_t; f: the map that is pooled
    d(F, G) = mean |n(F) - n(G)|,   n(F) = F / norm of an image's whole factor
    L_inh   =  d(E_inh(f_inh), E_t(f_t))                              f_inh, f_exp: the halves of the student's map f_s
    L_exp   = -d(E_exp(f_exp), E_t(f_t))                              never below -2 / sqrt(elements)
    L       = ce_weight CE + inheritance_weight L_inh + exploration_weight L_exp      phase 2, trains the student, E_inh and E_exp

Modules and recipe are those of the authors' CIFAR-10 code (aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-
Exploration-Framework@3274ab0; it does not run as released). Published (read off an image), on CIFAR-10 only (--dataset cifar10;
the default here is cifar100): resnet56/resnet20 93.43.
Differences
- from the paper: checked against the abstract only. A review says: L_rec squared, no minus in L_exp, halves drawn at random.
- from the code: it leaves the form of L_exp open (an empty default; a norm and a cosine exist); the norm is our choice.
- from the code: a factor has half the student's channels, not always 32 (half of a resnet's 64); unequal sides are pooled (ours).
- from the code: its weights of 1 have almost no effect; 50 is reportedly the value in the paper's Table 6b.
- from the code: the last epoch is reported (the code saves the best on the test set), and runs are seeded.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, PositiveInt, Run, accuracy, build, cuda_graph, feature_shapes, load_data, load_teacher


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    init_epochs: PositiveInt = 30
    """epochs of phase 1, which trains the teacher's auto-encoder"""
    epochs: int = 160
    batch_size: int = 128
    lr: float | None = None
    """initial learning rate of both phases; by default 0.1"""
    milestones: tuple[int, ...] = ()
    """epochs after which the learning rate drops 10x; by default 1/2 and 3/4 of all"""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 1.0
    """weight of the cross-entropy with the labels"""
    inheritance_weight: float = 50.0
    """weight of the inheritance term; 0 leaves exploration only"""
    exploration_weight: float = 50.0
    """weight of the exploration term; 0 leaves inheritance only"""
    split: Literal["first", "random"] = "first"
    """student channels that inherit: the first half, or a random half drawn once"""


class Coder(nn.Sequential):
    """Encoder or decoder: maps (B, c_in, H, W) to (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]  # as released; no effect on a map that comes out of a ReLU
        for c, c_next in (c_in, c_in), (c_in, c_out), (c_out, c_out):
            layers += [nn.Conv2d(c, c_next, 3, padding=1, bias=False), nn.BatchNorm2d(c_next), nn.LeakyReLU(0.1)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        super().__init__(*layers)


class AutoEncoder(nn.Module):
    """E_t and D_t: a map (B, c_t, H, W) to its factor (B, width, H, W) and back."""

    def __init__(self, c_t: int, width: int):
        super().__init__()
        self.encode, self.decode = Coder(c_t, width), Coder(width, c_t)

    def forward(self, f_t: Tensor) -> Tensor:
        return self.decode(self.encode(f_t))


def distance(f: Tensor, g: Tensor) -> Tensor:
    """d of two factors (B, C, H, W): from 0 to 2 / sqrt(C * H * W). If the sides differ, the larger is average-pooled (ours)."""
    side = min(f.shape[3], g.shape[3])
    f, g = (F.adaptive_avg_pool2d(each, side) if each.shape[3] > side else each for each in (f, g))
    return (F.normalize(f.flatten(1), dim=1) - F.normalize(g.flatten(1), dim=1)).abs().mean()


class IEKD(nn.Module):
    """Splits a student's map of c_s channels and compares each half with the teacher's factor, which has c_s // 2 channels."""

    def __init__(self, c_s: int, split: str):
        super().__init__()
        self.width = c_s // 2
        self.encode_inh, self.encode_exp = Coder(self.width, self.width), Coder(c_s - self.width, self.width)
        self.register_buffer("order", torch.randperm(c_s) if split == "random" else None)

    def halves(self, f_s: Tensor) -> tuple[Tensor, Tensor]:
        """f_inh and f_exp, which together have all channels of f_s (B, c_s, H, W)."""
        f_s = f_s if self.order is None else f_s.index_select(1, self.order)
        return f_s[:, : self.width], f_s[:, self.width :]

    def forward(self, f_s: Tensor, factor_t: Tensor) -> tuple[Tensor, Tensor]:
        """L_inh and L_exp of the student's map (B, c_s, H, W) and the teacher's factor (B, width, H', W')."""
        f_inh, f_exp = self.halves(f_s)
        inheritance = distance(self.encode_inh(f_inh), factor_t)  # L_inh
        exploration = -distance(self.encode_exp(f_exp), factor_t)  # L_exp
        return inheritance, exploration


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA (biased) of two representations (B, ...) of the same images: 1 if equal up to rotation and scale."""
    x, y = (f.flatten(1) - f.flatten(1).mean(0) for f in (x, y))
    return F.cosine_similarity((x @ x.T).flatten(), (y @ y.T).flatten(), dim=0)


@torch.no_grad()
def similarities(student: nn.Module, iekd: IEKD, teacher: nn.Module, images) -> dict[str, Tensor]:
    """Linear CKA of the student's halves and the teacher's map, averaged over the batches of `images`.

    E_exp alone can lower L_exp while f_exp still resembles the teacher's map; cka_exp_t would show it.
    """
    student.eval()
    rows = []
    for x, _ in images.batches():
        (f_inh, f_exp), f_t = iekd.halves(student(x)[1].last), teacher(x)[1].last
        rows.append(torch.stack([linear_cka(f_inh, f_exp), linear_cka(f_exp, f_t), linear_cka(f_inh, f_t)]))
    return dict(zip(("cka_inh_exp", "cka_exp_t", "cka_inh_t"), torch.stack(rows).mean(0)))


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args, padding="reflect")  # as in the authors' code
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    iekd = IEKD(feature_shapes(student, train.size).last[0], args.split)
    autoencoder = AutoEncoder(feature_shapes(teacher, train.size).last[0], iekd.width)
    lr = args.lr or 0.1

    # Phase 1
    init = nn.ModuleDict(dict(autoencoder=autoencoder)).to(args.device)
    init_optimizer = SGD(init.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    init_scheduler = MultiStepLR(init_optimizer, milestones=[])  # constant learning rate

    @cuda_graph
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)

        loss_rec = F.l1_loss(autoencoder(features_t.last), features_t.last)  # L_rec

        init_optimizer.zero_grad()
        loss_rec.backward()
        init_optimizer.step()
        return dict(loss=loss_rec)

    for epoch in run.epochs(
        args.init_epochs, trained=init, optimizer=init_optimizer, scheduler=init_scheduler, phase="autoencoder"
    ):
        init.train()
        meter = run.meter(len(train))
        for x, y, index in train.epoch(epoch, phase="autoencoder"):
            meter.add(init_step(x, y, index), len(y))
        run.log(epoch, train=meter.mean())
        init_scheduler.step()
    autoencoder.eval().requires_grad_(False)

    # Phase 2
    trained = nn.ModuleDict(dict(student=student, iekd=iekd)).to(args.device)  # optimized and checkpointed
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 4 for k in (2, 3)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
            factor_t = autoencoder.encode(features_t.last)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_inh, loss_exp = iekd(features_s.last, factor_t)
        loss = args.ce_weight * loss_ce + args.inheritance_weight * loss_inh + args.exploration_weight * loss_exp

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, inh=loss_inh, exp=loss_exp, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), **similarities(student, iekd, teacher, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
