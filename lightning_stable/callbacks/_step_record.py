"""What StabilityReport keeps of optimizer steps: on the device until they are read, then in a table of bounded size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stable._report.spikes import Spike, SpikeBand, SpikeRule

__all__ = ["SIGNALS", "StepRecord", "StepRow"]

SIGNALS = ("loss", "gradient_norm")
_KNOWN = 2 + len(SIGNALS)

# Rows of the table, and spikes, that are kept at most.
_MOST_ROWS = 8192
_MOST_SPIKES = 4096


class StepRow(NamedTuple):
    """One optimizer step.

    Attributes:
        step: How many steps this optimizer has made with it.
        optimizer: Its place among the Trainer's.
        values: The loss that was trained on and the norm of the gradient; ``None`` for what is not known.
        rates: The learning rate of each parameter group.
        seconds: Time since training began.
    """

    step: int
    optimizer: int
    values: tuple[float | None, ...]
    rates: tuple[float, ...]
    seconds: float


class _Waiting(NamedTuple):
    """A step whose values have not been read from the device."""

    row: StepRow
    values: Tensor
    known: tuple[bool, ...]
    rates: list[Any]
    at: int


class StepRecord:
    """The steps of a run, their spikes, and what a fit that goes on needs to know of them.

    Args:
        rule: When the loss is a spike; the norm by the same rule, without the share of what was gained.

    Attributes:
        latest: What was read last, of each optimizer.
        spikes: The spikes of each signal.
        counts: How many there were, also where they were more than are kept.
        unknown: At how many steps each signal was not known, as where a batch was skipped.
        phases: From which step on the learning rate is in which phase.
        rounds: Steps at whose end workers have exchanged their weights, the last ones.
        finished_rounds: How many such exchanges there were.
    """

    def __init__(self, rule: SpikeRule) -> None:
        self._rules = {"loss": rule, "gradient_norm": rule._replace(gained=0.0)}
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.latest: dict[int, StepRow] = {}
        self.spikes: dict[str, list[Spike]] = {signal: [] for signal in SIGNALS}
        self.counts: dict[str, int] = dict.fromkeys(SIGNALS, 0)
        self.unknown: dict[str, int] = dict.fromkeys(SIGNALS, 0)
        self.phases: list[tuple[int, str]] = []
        self.rounds: list[int] = []
        self.finished_rounds = 0
        self._tables: dict[int, list[StepRow]] = {}
        self._stride = 1
        self._made: dict[int, int] = {}
        self._bands: dict[tuple[str, int], SpikeBand] = {}
        self._waiting: list[_Waiting] = []

    @property
    def rows(self) -> list[StepRow]:
        """What was read: each step, and of a long record two of each so many."""
        rows = [row for table in self._tables.values() for row in table]
        return sorted(rows, key=lambda row: (row.step, row.optimizer))

    @property
    def steps(self) -> int:
        """Steps so far, of the optimizer that has made the most."""
        return max(self._made.values(), default=0)

    @property
    def steps_of_all(self) -> int:
        """Steps so far of all optimizers, which is what the host counts."""
        return sum(self._made.values())

    @property
    def waits(self) -> bool:
        """Whether values are on the device that have not been read."""
        return bool(self._waiting)

    def begin(self, done: int, optimizers: int) -> None:
        """Begin, or go on, after so many steps of each optimizer."""
        for place in range(optimizers):
            self._made.setdefault(place, done)

    def note(
        self,
        at: int,
        optimizer: int,
        values: Tensor,
        rates: Sequence[Any],
        seconds: float,
        known: Sequence[bool] = (True,) * len(SIGNALS),
    ) -> None:
        """Note a step, without waiting for its values.

        Args:
            at: The host's count of steps before it. Of several notes with one count the last one holds.
            optimizer: The optimizer's place.
            values: Loss and norm, of shape (2,).
            rates: The learning rate of each parameter group, numbers or scalars on the device.
            seconds: Time since training began.
            known: Which of the values are known; the others are 0.
        """
        last = self._waiting[-1] if self._waiting else None
        if last is not None and (last.at, last.row.optimizer) == (at, optimizer):
            self._waiting.pop()  # an optimizer that computes gradients several times a step
        else:
            self._made[optimizer] = self._made.get(optimizer, 0) + 1
        row = StepRow(self._made[optimizer], optimizer, (), (), seconds)
        self._waiting.append(_Waiting(row, values, tuple(known), list(rates), at))

    def note_phase(self, phase: str) -> None:
        """Note the phase of the step that is under way."""
        if not self.phases or self.phases[-1][1] != phase:
            self.phases.append((self.steps, phase))

    def note_round(self) -> None:
        """Note that a round of local steps has ended."""
        self.finished_rounds += 1
        self.rounds = [*self.rounds, self.steps][-_MOST_SPIKES:]

    def flush(self, exchange: Callable[[Tensor], Tensor] | None = None) -> None:
        """Read what waits, in one transfer.

        Args:
            exchange: Returns the mean over processes of a tensor; ``None`` for this process's own.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = torch.stack([entry.values for entry in waiting])
        known = torch.tensor([entry.known for entry in waiting])
        if exchange is not None:
            # The mean over the processes that know a value: the others have put 0 for it.
            both = exchange(torch.cat([values, known.to(values)], dim=1))
            shares = both[:, len(SIGNALS) :]
            values, known = both[:, : len(SIGNALS)] / shares, shares > 0
        on_device = [rate.float() for entry in waiting for rate in entry.rates if isinstance(rate, Tensor)]
        read = iter(torch.stack(on_device).tolist() if on_device else [])
        for entry, numbers, flags in zip(waiting, values.tolist(), known.tolist(), strict=True):
            rates = tuple(next(read) if isinstance(rate, Tensor) else rate for rate in entry.rates)
            self._take(entry.row._replace(values=_told(numbers, flags), rates=rates))

    def not_finite(self, signal: str) -> tuple[int, int | None]:
        """Return how many values of a signal were not finite, and the step of the first of them."""
        bands = [band for (name, _), band in self._bands.items() if name == signal]
        firsts = [band.first_not_finite for band in bands if band.first_not_finite is not None]
        return sum(band.not_finite for band in bands), min(firsts, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return what was read, safe to load; without times, which no other run has."""
        rows = self.rows
        width = max((len(row.rates) for row in rows), default=0)
        table = [
            (row.step, row.optimizer, *_numbers(row), *row.rates, *[math.nan] * (width - len(row.rates)))
            for row in rows
        ]
        known = [[value is not None for value in row.values] for row in rows]
        return {
            "rows": torch.tensor(table, dtype=torch.float64).reshape(len(table), _KNOWN + width if table else _KNOWN),
            "known": torch.tensor(known, dtype=torch.bool).reshape(len(known), len(SIGNALS)),
            "spikes": {signal: [list(spike) for spike in found] for signal, found in self.spikes.items()},
            "counts": dict(self.counts),
            "unknown": dict(self.unknown),
            "bands": [[signal, place, band.state_dict()] for (signal, place), band in self._bands.items()],
            "phases": [list(phase) for phase in self.phases],
            "rounds": list(self.rounds),
            "finished_rounds": self.finished_rounds,
            "made": dict(self._made),
            "stride": self._stride,
        }

    def load_state_dict(self, state: dict[str, Any], seconds: Sequence[float] = ()) -> None:
        """Go on from a state.

        Args:
            state: The state.
            seconds: The time of each row, where it is known.
        """
        self.forget()
        times = seconds if len(seconds) == len(state["rows"]) else [math.nan] * len(state["rows"])
        table = zip(state["rows"].tolist(), state["known"].tolist(), times, strict=True)
        for (step, optimizer, *numbers), flags, time in table:
            rates = tuple(rate for rate in numbers[len(SIGNALS) :] if not math.isnan(rate))
            row = StepRow(int(step), int(optimizer), _told(numbers[: len(SIGNALS)], flags), rates, time)
            self._tables.setdefault(row.optimizer, []).append(row)
        self.spikes = {signal: [Spike(*spike) for spike in found] for signal, found in state["spikes"].items()}
        self.counts, self.unknown = dict(state["counts"]), dict(state["unknown"])
        for signal, place, band in state["bands"]:
            self._band(signal, place).load_state_dict(band)
        self.phases = [(step, phase) for step, phase in state["phases"]]
        self.rounds, self.finished_rounds = list(state["rounds"]), state["finished_rounds"]
        self._made, self._stride = dict(state["made"]), state["stride"]

    def _take(self, row: StepRow) -> None:
        """Take in what was read."""
        for signal, value in zip(SIGNALS, row.values, strict=True):
            if value is None:
                self.unknown[signal] += 1
                continue
            spike = self._band(signal, row.optimizer).take(row.step, value)
            if spike is not None:
                self.counts[signal] += 1
                self.spikes[signal] = [*self.spikes[signal], spike][-_MOST_SPIKES:]
        self.latest[row.optimizer] = row
        self._keep(row)
        if sum(map(len, self._tables.values())) >= _MOST_ROWS:
            self._stride = max(4, 2 * self._stride)
            before, self._tables = self._tables, {}
            for kept in (kept for table in before.values() for kept in table):
                self._keep(kept)

    def _keep(self, row: StepRow) -> None:
        """Put a row into the table; of the steps of one stretch the lowest and the highest loss stay."""
        table = self._tables.setdefault(row.optimizer, [])
        stretch = [row]
        while self._stride > 1 and table and (table[-1].step - 1) // self._stride == (row.step - 1) // self._stride:
            stretch.insert(0, table.pop())
        if len(stretch) > 1:
            ordered = sorted(stretch, key=_height)
            stretch = sorted({ordered[0].step: ordered[0], ordered[-1].step: ordered[-1]}.values(), key=_step_of)
        table.extend(stretch)

    def _band(self, signal: str, optimizer: int) -> SpikeBand:
        key = (signal, optimizer)
        if key not in self._bands:
            self._bands[key] = SpikeBand(self._rules[signal])
        return self._bands[key]


def _step_of(row: StepRow) -> int:
    return row.step


def _height(row: StepRow) -> float:
    """Return a row's loss for its order in a stretch: what is not finite is the highest, what is not known is not."""
    loss = row.values[0]
    if loss is None:
        return -math.inf
    return loss if math.isfinite(loss) else math.inf


def _told(numbers: Sequence[float], known: Sequence[bool]) -> tuple[float | None, ...]:
    return tuple(number if told else None for number, told in zip(numbers, known, strict=True))


def _numbers(row: StepRow) -> list[float]:
    return [0.0 if value is None else value for value in row.values]
