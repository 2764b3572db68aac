"""IE-DML: inheritance and exploration in mutual learning. After Huang, Shen, Xing et al., Revisiting Knowledge Distillation: An
Inheritance and Exploration Framework, CVPR 2021, arXiv 2107.00181, which has an IE-DML in its Table 4.

Status: our definition. The paper's text was not available and the authors' code has DML (arXiv 1706.00384) but no IE-DML.

Two untrained networks, student and peer, take turns learning from the labels, from each other's predictions, and from each
other's last map, compressed to a factor: the first half of a network's channels must reproduce the other network's factor, and
the second half must differ from it. For a network k and the other one, o, which gets no gradient:

    d(F, G) = mean |n(F) - n(G)|,   n(F) = F / norm of an image's whole factor
    L_inh   =  d(E_inh,k(f_inh,k), E_o(f_o))                           f_inh, f_exp: the halves of f, the map that is pooled
    L_exp   = -d(E_exp,k(f_exp,k), E_o(f_o))                           never below -2 / sqrt(elements)
    L_rec   = mean |f_k - D_k(E_k(f_k))|                               trains the coders E_k and D_k, but not f_k
    KD      = T^2 mean_i KL(p_o || p_k),   p = softmax(z / T),   T = kd_temperature
    L       = ce_weight CE + kd_weight KD + inheritance_weight L_inh + exploration_weight L_exp + L_rec

Terms and coders are those of methods/ie_kd.py. The turns are those of DML in the authors' code (aliyun/Revisiting-Knowledge-
Distillation-an-Inheritance-and-Exploration-Framework@3274ab0); the recipe is from its cifar100/resnet56-20-bs128 configuration.
Differences
- from the paper: checked against the abstract only; we do not know whether it keeps the KD term.
- from the code's DML: kd_weight is 1; in the code it is 0 by default, and only one of five configurations sets it, to 1.
- from the code: the last epoch is reported (the code saves the best on the test set); runs are seeded; unequal sides are pooled.
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
from common import NetworkName, Positive, Run, RunArgs, accuracy, build, cuda_graph, feature_shapes, load_data


@dataclass
class Args(RunArgs):
    student: str = "resnet20"
    peer: NetworkName = "resnet20"
    """network trained alongside the student; the test accuracy is the student's, the log has both"""
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
    kd_weight: float = 1.0
    """weight of the KD term, the KL divergence from the other network's predictions"""
    kd_temperature: Positive = 1.0
    """softmax temperature of the KD term"""
    inheritance_weight: float = 50.0
    """weight of the inheritance term; 0 leaves exploration only"""
    exploration_weight: float = 50.0
    """weight of the exploration term; 0 leaves inheritance only"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class Coder(nn.Sequential):
    """Encoder or decoder: maps (B, c_in, H, W) to (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]  # as released; no effect on a map that comes out of a ReLU
        for c, c_next in (c_in, c_in), (c_in, c_out), (c_out, c_out):
            layers += [nn.Conv2d(c, c_next, 3, padding=1, bias=False), nn.BatchNorm2d(c_next), nn.LeakyReLU(0.1)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        super().__init__(*layers)


def distance(f: Tensor, g: Tensor) -> Tensor:
    """d of two factors (B, C, H, W): from 0 to 2 / sqrt(C * H * W). If the sides differ, the larger is average-pooled (ours)."""
    side = min(f.shape[3], g.shape[3])
    f, g = (F.adaptive_avg_pool2d(each, side) if each.shape[3] > side else each for each in (f, g))
    return (F.normalize(f.flatten(1), dim=1) - F.normalize(g.flatten(1), dim=1)).abs().mean()


class IEDML(nn.Module):
    """The coders of a network whose map has c channels: E, D, E_inh and E_exp. All factors have `width` channels."""

    def __init__(self, c: int, width: int):
        super().__init__()
        self.half = c // 2
        self.encode, self.decode = Coder(c, width), Coder(width, c)
        self.encode_inh, self.encode_exp = Coder(self.half, width), Coder(c - self.half, width)

    def forward(self, f: Tensor, factor_o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_inh, L_exp and L_rec of the network's map (B, c, H, W) and the other network's factor (B, width, H', W')."""
        inheritance = distance(self.encode_inh(f[:, : self.half]), factor_o)  # L_inh
        exploration = -distance(self.encode_exp(f[:, self.half :]), factor_o)  # L_exp
        reconstruction = F.l1_loss(self.decode(self.encode(f.detach())), f.detach())  # L_rec
        return inheritance, exploration, reconstruction


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args, padding="reflect")  # as in the authors' code

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    peer = build(args.peer, train.classes, args.device)
    c_s, c_p = feature_shapes(student, train.size).last[0], feature_shapes(peer, train.size).last[0]
    iedml_s, iedml_p = IEDML(c_s, width=c_s // 2), IEDML(c_p, width=c_s // 2)
    trained = nn.ModuleDict(dict(student=student, iedml_s=iedml_s, peer=peer, iedml_p=iedml_p)).to(args.device)
    lr = args.lr or 0.1
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 4 for k in (2, 3)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    def turn(net, iedml, other, iedml_o, x, y):
        with torch.no_grad():
            z_o, features_o = other(x)  # in train mode: this updates its running statistics, as in the authors' DML
            factor_o = iedml_o.encode(features_o.last)
        z, features = net(x)

        loss_ce = F.cross_entropy(z, y)
        loss_kd = kd_loss(z, z_o, args.kd_temperature)
        loss_inh, loss_exp, loss_rec = iedml(features.last, factor_o)
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd
        loss = loss + args.inheritance_weight * loss_inh + args.exploration_weight * loss_exp + loss_rec

        optimizer.zero_grad()  # step() skips gradients of None: the other network and its coders do not move
        loss.backward()
        optimizer.step()
        terms = dict(loss=loss, ce=loss_ce, kd=loss_kd, inh=loss_inh, exp=loss_exp, rec=loss_rec)
        return terms | dict(accuracy=(z.argmax(1) == y).float().mean())

    @cuda_graph
    def step(x, y, index):
        turn(peer, iedml_p, student, iedml_s, x, y)
        return turn(student, iedml_s, peer, iedml_p, x, y)

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test), peer=accuracy(peer, test))
        scheduler.step()
    return run.finish(student)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
