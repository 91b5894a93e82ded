"""The memory of a rehearsing run: the samples that are kept, and what decides over them and draws from them."""

from typing import Any

import torch
from torch import Tensor

from lightning_stable.callbacks._samples import SampleStore
from lightning_stable.functional.replay import (
    BalancedState,
    balanced_places,
    draw_by_group,
    draw_evenly,
    init_balanced,
    power_law,
    reservoir_places,
)

__all__ = ["POLICIES", "ReplayMemory"]

# What each policy keeps equal numbers of; nothing for the first.
POLICIES = {"reservoir": "", "class_balanced": "classes", "power_law": "tasks"}


class ReplayMemory:
    """Samples kept and drawn by one policy. With the same calls, every process has the same.

    Args:
        capacity: How many samples are kept.
        policy: One of :data:`POLICIES`.
        exponent: Of the power law.
        seed: Of the random numbers that decide and draw.
    """

    def __init__(self, capacity: int, policy: str, exponent: float, seed: int) -> None:
        self.capacity = capacity
        self.policy = policy
        self.exponent = exponent
        self.store = SampleStore(capacity, "Replay")
        self._seen = 0
        self._balanced = init_balanced()
        self._generator = torch.Generator().manual_seed(seed)
        # After the last draw, as long as that does not count.
        self._drawn: Tensor | None = None

    def draw(self, count: int, task: int) -> list[int]:
        """Return the places of samples to train on again, the same at each call before :meth:`end_batch`.

        Args:
            count: How many, for all processes together.
            task: The task that is learned.
        """
        self._drawn = None
        if not len(self.store):
            return []
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        if self.policy == "reservoir":
            places = draw_evenly(len(self.store), count, generator)
        else:
            kept = torch.unique(self._balanced.groups).tolist()
            shares = power_law(task, kept, self.exponent) if self.policy == "power_law" else dict.fromkeys(kept, 1.0)
            places = draw_by_group(self._balanced.groups, shares, count, generator)
        self._drawn = generator.get_state()
        return places

    def end_batch(self) -> None:
        """Let random numbers go on: the batch that samples were drawn for has come to its end."""
        if self._drawn is not None:
            self._generator.set_state(self._drawn)
        self._drawn = None

    def choose(self, groups: list[int]) -> tuple[list[int], list[int]]:
        """Decide which of the next samples are to be kept.

        Args:
            groups: The class or the task of each; a reservoir looks at their number alone.

        Returns:
            The samples, and the place of each.

        Raises:
            ValueError: If there are more groups than places.
        """
        if self.policy == "reservoir":
            placing = reservoir_places(self._seen, len(groups), self.capacity, self._generator)
        else:
            number = len(set(groups) | self._balanced.seen.keys())
            if number > self.capacity:
                what = POLICIES[self.policy]
                raise ValueError(
                    f"Replay: capacity={self.capacity} is less than the {number} {what} that came so far, and "
                    f"policy={self.policy!r} keeps samples of each. Set capacity to several times the number of {what}."
                )
            placing, self._balanced = balanced_places(self._balanced, groups, self.capacity, self._generator)
        self._seen += len(groups)
        return placing

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load: before a draw whose batch has not come to its end."""
        return {
            "policy": self.policy,
            "capacity": self.capacity,
            "samples": self.store.state_dict(),
            "seen": self._seen,
            "groups": self._balanced.groups.clone(),
            "seen_of_group": dict(self._balanced.seen),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the memory of a checkpoint.

        Raises:
            ValueError: If it was made with other settings.
        """
        pairs = {"policy": (state["policy"], self.policy), "capacity": (state["capacity"], self.capacity)}
        other = [f"{name}={then!r} ({now!r} here)" for name, (then, now) in pairs.items() if then != now]
        if other:
            raise ValueError(f"The checkpoint's Replay has {', '.join(other)}. Resume with the same settings.")
        self.store.load_state_dict(state["samples"])
        self._seen = state["seen"]
        self._balanced = BalancedState(state["groups"].clone(), dict(state["seen_of_group"]))
        self._generator.set_state(state["generator"].cpu())
