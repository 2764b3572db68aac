"""IE-AT: inheritance and exploration with attention maps. After Huang, Shen, Xing et al., Revisiting Knowledge Distillation: An
Inheritance and Exploration Framework, CVPR 2021, arXiv 2107.00181, which has an IE-AT in its Table 1.

Status: our definition. The paper's text was not available and the authors' code has no IE-AT.

One half of the student's channels must attend where the teacher attends (inheritance, as in AT, arXiv 1612.03928), the other
half to where it does not (exploration), so that the student does not merely repeat the teacher.

    Q(f)    = q / ||q||,   q = mean over the channels of f^2, a vector of positions     f: the map that is pooled (`last`)
    D(f, g) = mean over images and positions of (Q(f) - Q(g))^2
    L_inh   =  D(f_inh, f_t)     f_inh: the first half of the student's channels
    L_exp   = -D(f_exp, f_t)     f_exp: the second half; L_exp is never below -2 / positions
    L       = ce_weight CE + inheritance_weight L_inh + exploration_weight L_exp

The recipe is that of the authors' CIFAR-10 configuration (aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-
Exploration-Framework@3274ab0). Published on CIFAR-10 (read off an image): resnet56/resnet20 93.30, AT 92.87, IE-FT 93.43.
Differences
- from the paper: checked against the abstract only.
- from AT: only the last maps are compared, not those of every stage.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Run, accuracy, build, cuda_graph, load_data, load_teacher


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    epochs: int = 160
    batch_size: int = 128
    lr: float | None = None
    """initial learning rate; by default 0.1"""
    milestones: tuple[int, ...] = ()
    """epochs after which the learning rate drops 10x; by default 1/2 and 3/4 of all"""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 1.0
    """weight of the cross-entropy with the labels"""
    inheritance_weight: float = 1000.0
    """weight of the inheritance term; 1000 is AT's usual weight for a mean of squares"""
    exploration_weight: float = 100.0
    """weight of the exploration term, not tuned: with 8x8 positions 100 keeps it above -3.13, about the size of the CE"""


def attention(f: Tensor) -> Tensor:
    """Q of maps (B, C, H, W): unit vectors (B, H * W)."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)


def distance(f: Tensor, g: Tensor) -> Tensor:
    """D of maps (B, C, H, W) and (B, C', H', W'): from 0 to 2 / positions. As in AT, the larger map is average-pooled."""
    side = min(f.shape[3], g.shape[3])
    f, g = (F.adaptive_avg_pool2d(each, side) if each.shape[3] > side else each for each in (f, g))
    return (attention(f) - attention(g)).square().mean()


def ie_at_loss(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """L_inh and L_exp of the student's map (B, C_s, H_s, W_s) and the teacher's (B, C_t, H_t, W_t)."""
    half = f_s.shape[1] // 2
    inheritance = distance(f_s[:, :half], f_t)  # L_inh
    exploration = -distance(f_s[:, half:], f_t)  # L_exp
    return inheritance, exploration


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args, padding="reflect")  # as in the authors' code
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or 0.1
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 4 for k in (2, 3)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_inh, loss_exp = ie_at_loss(features_s.last, features_t.last)
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
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
