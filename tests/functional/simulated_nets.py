"""Small nets for tests of converted layers."""

import torch
from torch import nn

from lightning_stable.functional.quantize import Quantizer

INT4 = Quantizer("int4", scaling="row")


def quantizers(recipes):
    made = [None if recipe is None else Quantizer(recipe[0], scaling=recipe[1]) for recipe in recipes]
    return dict(zip(("weights", "activations", "gradients"), made, strict=True))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def convnet():
    torch.manual_seed(2)
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 1)]
    return nn.Sequential(*parts).double()


NETS = {"mlp": (mlp, (7, 6)), "convnet": (convnet, (3, 2, 4, 4))}


def train(net, x, steps=4):
    y = torch.sin(x.flatten(1).sum(1, keepdim=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]
