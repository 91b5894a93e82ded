"""A slow twin of LAE (arXiv 2303.10070): a slow copy of a few weights, and the surer of both at each class."""

import torch
from oracles.trajectory_twin import probabilities
from torch import Tensor

from lightning_stable.testing.harness import Net

Named = dict[str, Tensor]


class LAETwin:
    """The slow copy, in float64.

    Args:
        decay: The share of the old copy that is kept at each optimizer step.
        prefix: What the names of the weights that have one begin with.
    """

    def __init__(self, decay: float, prefix: str) -> None:
        self.decay = decay
        self.prefix = prefix
        self.offline: Named = {}

    def end_task(self, weights: Named) -> None:
        """Begin the copy where the first task ended; it goes on over all later ones."""
        if not self.offline:
            self.offline = {name: value.double() for name, value in weights.items() if name.startswith(self.prefix)}

    def update(self, weights: Named) -> None:
        """Take in the weights after an optimizer step."""
        for name, value in self.offline.items():
            self.offline[name] = self.decay * value + (1 - self.decay) * weights[name].double()

    def loss(self, weights: Named, buffers: Named, batch: tuple[Tensor, Tensor]) -> float:
        """Return what a :class:`Net` in eval mode says of a batch, when its head gives the ensemble's logits."""
        module = Net()
        module.load_state_dict({**weights, **buffers})
        module.eval()
        with torch.no_grad():
            surest = probabilities(module.head(module.body(batch[0])), 1.0)
            if self.offline:
                slow = {name: value.to(weights[name].dtype) for name, value in self.offline.items()}
                module.load_state_dict({**weights, **buffers, **slow})
                surest = surest.maximum(probabilities(module.head(module.body(batch[0])), 1.0))
            logits = surest.log().float()
            module.head.register_forward_hook(lambda head, inputs, output: logits if self.offline else output)
            return float(module.loss(batch))
