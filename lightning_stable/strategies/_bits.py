"""One Adam object after its variance was frozen: what it sends, what it gets, and its step in the host's own call.

The object stays the optimizer that the host, schedulers and callbacks know. Its own ``step`` is called as ever, so
hooks on it run and schedulers see it; only what it would do with the gradients is done here before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_stable.functional.compression import pack_signs, unpack_signs
from lightning_stable.functional.one_bit_adam import (
    Layout,
    SignMessage,
    adam_step,
    add_momenta,
    init_one_bit_adam,
    lay_out,
    read_messages,
    server_message,
    worker_messages,
)
from lightning_stable.strategies._consolidation import all_parameters

__all__ = ["FrozenAdam", "steps_made"]


def steps_made(optimizer: Optimizer) -> int:
    """Return how many steps Adam has made: those of the parameter that had a gradient most often."""
    states = [optimizer.state[p] for p in all_parameters(optimizer) if p in optimizer.state]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


class FrozenAdam:
    """Adam from the moment at which its variance is frozen, on every process of the default group at once.

    Attributes:
        learned: For each parameter with a variance the steps in which it was learned.
        bytes_per_step: What this process sends at each step.
        bytes_sent: What it has sent so far.
        waiting: Parameters without a variance: they had no gradient yet, and stay as they are.

    Args:
        owner: Name of the strategy, for messages.
        optimizer: The Adam object; its state is used in place.
        learned: As saved, where the variance was frozen in an earlier run; ``None`` to freeze it now.

    Raises:
        ValueError: If what was saved is of other parameters.
    """

    def __init__(self, owner: str, optimizer: Optimizer, learned: Sequence[int] | None = None) -> None:
        self._owner = owner
        self._optimizer = optimizer
        self._number = len(all_parameters(optimizer))
        members = [p for p in all_parameters(optimizer) if "exp_avg_sq" in optimizer.state.get(p, {})]
        self._variances = [optimizer.state[p]["exp_avg_sq"] for p in members]
        self._versions = [variance._version for variance in self._variances]
        self._steps = [int(optimizer.state[p]["step"]) for p in members]
        self.learned = list(self._steps if learned is None else learned)
        if len(self.learned) != len(members):
            raise ValueError(
                f"{owner}: the checkpoint has a frozen variance for {len(self.learned)} parameters and this optimizer "
                f"has one for {len(members)}. Resume with the module that the checkpoint was made with."
            )
        self.waiting = sum(p.requires_grad for p in all_parameters(optimizer)) - sum(p.requires_grad for p in members)
        self._places = {parameter: place for place, parameter in enumerate(members)}
        self._trained = [p.requires_grad for p in members]
        self._layout: Layout = lay_out([p.numel() for p in members], dist.get_world_size())
        precision = reduce(torch.promote_types, (p.dtype for p in members), torch.float32)
        self._state = init_one_bit_adam(self._layout, self._variances, precision)
        self._views = self._split(self._state.worker_error, members)
        scales = max(map(len, self._layout.pieces)) * precision.itemsize
        self._width = self._layout.chunk // 8 + scales
        # One bit a tensor, behind the signs that go to the servers: whether this process had a gradient for it.
        self._all_present = self._presence([])
        self._to_servers = (dist.get_world_size() - 1) * (self._width + self._all_present.numel())
        self._to_all = (dist.get_world_size() - 1) * self._width
        self.bytes_per_step = self._to_servers + self._to_all
        self.bytes_sent = 0

    @contextmanager
    def own_step(self) -> Iterator[None]:
        """Let the optimizer's ``step`` make a step with one bit an entry, as long as the context lasts."""
        optimizer: Any = self._optimizer
        # A scheduler may have put a wrapped step on the instance, which has to come back.
        before = optimizer.__dict__.get("step")
        step = optimizer.step
        hidden: list[tuple[Tensor, Tensor]] = []

        def one_bit_step(closure: Callable[[], Any] | None = None) -> Any:
            def passes_and_update() -> Any:
                result = None if closure is None else closure()
                self._update()
                # Without gradients Adam leaves every parameter as it is: no momentum, no decay, no count.
                hidden.extend((p, p.grad) for p in all_parameters(optimizer) if p.grad is not None)
                for parameter, _ in hidden:
                    parameter.grad = None
                return result

            return step(passes_and_update)

        optimizer.step = one_bit_step
        try:
            yield
        finally:
            del optimizer.step
            if before is not None:
                optimizer.step = before
            for parameter, gradient in hidden:
                parameter.grad = gradient

    def state_dict(self) -> dict[str, Tensor]:
        """Return this process' errors."""
        return {"worker_error": self._state.worker_error, "server_error": self._state.server_error}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved errors."""
        self._state.worker_error.copy_(state["worker_error"])
        self._state.server_error.copy_(state["server_error"])

    def to_cpu(self) -> None:
        """Leave the device; only what is saved is of use after this."""
        worker_error, server_error = self._state.worker_error.cpu(), self._state.server_error.cpu()
        self._state = self._state._replace(worker_error=worker_error, server_error=server_error)
        self._views, self._variances = [], []

    @torch.no_grad()
    def _update(self) -> None:
        self._check()
        optimizer, layout, state = self._optimizer, self._layout, self._state
        missing = [place for parameter, place in self._places.items() if parameter.grad is None]
        before = {place: [(part, part.clone()) for part in self._errors_of(place)] for place in missing}
        groups = []
        for group in optimizer.param_groups:
            members = [p for p in group["params"] if p in self._places]
            groups.append((group, members, [self._places[p] for p in members]))
            add_momenta(
                [self._views[place] for place in groups[-1][2]],
                [optimizer.state[p]["exp_avg"] for p in members],
                [p.grad for p in members],
                members,
                beta1=float(group["betas"][0]),
                l2=0.0 if self._decoupled(group) else group["weight_decay"],
            )
        received, absent = self._send_to_servers(worker_messages(layout, state), missing)
        sent = self._send_to_all(server_message(layout, state, dist.get_rank(), received))
        # No process had a gradient: the tensor is left alone, as under DDP, and what was sent for it does not count.
        for part, value in [pair for place in absent for pair in before[place]]:
            part.copy_(value)
        momenta = self._split(read_messages(layout, state, sent), list(self._places))
        for group, members, places in groups:
            moved = [(p, place) for p, place in zip(members, places, strict=True) if place not in absent]
            self._step_group(group, [p for p, _ in moved], [place for _, place in moved], momenta)

    def _step_group(
        self, group: dict[str, Any], members: list[Tensor], places: list[int], momenta: list[Tensor]
    ) -> None:
        if not members:
            return
        states = [self._optimizer.state[p] for p in members]
        torch._foreach_copy_([state["exp_avg"] for state in states], [momenta[place] for place in places])
        torch._foreach_add_([state["step"] for state in states], 1)
        for place in places:
            self._steps[place] += 1
        adam_step(
            members,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            steps=[self._steps[place] for place in places],
            learned=[self.learned[place] for place in places],
            decay=group["weight_decay"] if self._decoupled(group) else 0.0,
        )

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", isinstance(self._optimizer, AdamW)))

    def _check(self) -> None:
        """Raise if the optimizer is no longer the one that was frozen: the processes would part without a word."""
        if len(all_parameters(self._optimizer)) != self._number:
            raise ValueError(
                f"{self._owner}: the optimizer has {len(all_parameters(self._optimizer))} parameters and had "
                f"{self._number} when its variance was frozen. Add parameters before freeze_step."
            )
        if any(was and not p.requires_grad for p, was in zip(self._places, self._trained, strict=True)):
            raise ValueError(
                f"{self._owner}: a parameter had requires_grad set to False after the variance was frozen. Set it "
                "before freeze_step, put freeze_step behind it, or set the learning rate of its group to 0."
            )
        for parameter, variance, version in zip(self._places, self._variances, self._versions, strict=True):
            found = self._optimizer.state[parameter].get("exp_avg_sq")
            if found is not variance or found._version != version:
                raise ValueError(
                    f"{self._owner}: the variance of Adam was changed after it was frozen, and is never learned again. "
                    "Leave out what resets or restores moments after freeze_step, such as a callback's "
                    "reset_every_n_steps or rewind_after, or put freeze_step behind the last of it."
                )

    def _split(self, flat: Tensor, members: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.split(flat[: sum(self._layout.sizes)], list(self._layout.sizes))
        return [part.view(member.shape) for part, member in zip(parts, members, strict=True)]

    def _errors_of(self, place: int) -> tuple[Tensor, Tensor]:
        """Return a tensor's error as a worker, and what of its error as a server is on this process."""
        sizes = self._layout.sizes
        start = sum(sizes[:place]) - dist.get_rank() * self._layout.chunk
        return self._views[place], self._state.server_error[max(start, 0) : max(start + sizes[place], 0)]

    # ------------------------------------------------------------------------------------------- the wire

    def _send_to_servers(
        self, messages: Sequence[SignMessage], missing: Sequence[int]
    ) -> tuple[list[SignMessage], set[int]]:
        """Send each chunk to its server; return what came for this one's, and tensors without a gradient anywhere."""
        present = self._presence(missing) if missing else self._all_present
        rows = torch.stack([torch.cat([self._row(message), present]) for message in messages])
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows)
        self.bytes_sent += self._to_servers
        pieces = len(self._layout.pieces[dist.get_rank()])
        absent: set[int] = set()
        # What is absent everywhere is missing here: a process that misses nothing need not wait for its device.
        if missing:
            flags = [unpack_signs(row[self._width :], len(self._places)) for row in received]
            found = torch.stack(flags).any(0).tolist()
            absent = {place for place in missing if not found[place]}
        return [self._message(row, pieces) for row in received], absent

    def _presence(self, missing: Sequence[int]) -> Tensor:
        flags = torch.ones(len(self._places))
        flags[list(missing)] = -1
        return pack_signs(flags).to(self._state.worker_error.device)

    def _send_to_all(self, message: SignMessage) -> list[SignMessage]:
        """Send this process' chunk to all, and return every server's."""
        row = self._row(message)
        received = row.new_empty(dist.get_world_size(), row.numel())
        dist.all_gather(list(received.unbind()), row)
        self.bytes_sent += self._to_all
        return [self._message(row, len(pieces)) for row, pieces in zip(received, self._layout.pieces, strict=True)]

    def _row(self, message: SignMessage) -> Tensor:
        # Chunks differ in how many pieces they have; rows are of one length.
        bits = torch.cat([message.signs, message.scales.view(torch.uint8)])
        return torch.nn.functional.pad(bits, (0, self._width - bits.numel()))

    def _message(self, row: Tensor, pieces: int) -> SignMessage:
        precision = self._state.worker_error.dtype
        start = self._layout.chunk // 8
        # A copy: floating-point numbers cannot begin at any byte.
        scales = row[start : start + pieces * precision.itemsize].clone().view(precision)
        return SignMessage(row[:start], scales)
