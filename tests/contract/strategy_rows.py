"""The rows of the strategies. Their effect shows in two processes, in which all their contracts run."""

from typing import Any

from contract import strategy_oracles as oracles

from lightning_stable import strategies
from lightning_stable.testing.rows import STEPS, Settings, StrategySettings

# Rounds that end neither with an epoch nor, the last one, with the run.
_ROUND: dict[str, Any] = {"local_steps": 3}
# Synchronous to the end: gradients are averaged at each step, as by DDP.
_NEVER: dict[str, Any] = {**_ROUND, "warmup_steps": 10 * STEPS}
_ROUNDING = 1e-5

_CO2: dict[str, Any] = {"outer_lr": 0.8, "outer_momentum": 0.3, "staleness_penalty": "gap", "momentum_clip": 0.05}
_SLOWMO: dict[str, Any] = {"outer_lr": 0.9, "outer_momentum": 0.4}
_DILOCO: dict[str, Any] = {"outer_lr": 0.6, "outer_momentum": 0.5}

SETTINGS: dict[str, Settings] = {
    "co2": StrategySettings(
        make=lambda: strategies.CO2Strategy(**_ROUND, **_CO2, variant="corrected"),
        oracle=lambda run, plugin: oracles.local_update(
            run, plugin, oracles.co2(0.8, 0.3, 0.05, "gap"), delayed=True, keep_own=True
        ),
        identities=(lambda: strategies.CO2Strategy(**_NEVER, **_CO2),),
        alone=(lambda: strategies.CO2Strategy(**_ROUND, **_CO2),),
        rounds=True,
        tolerance=_ROUNDING,
    ),
    "local_sgd": StrategySettings(
        make=lambda: strategies.LocalSGDStrategy(local_steps=[(0, 2), (4, 3)]),
        oracle=lambda run, plugin: oracles.local_update(run, plugin, oracles.averaging, local_steps=((0, 2), (4, 3))),
        identities=(lambda: strategies.LocalSGDStrategy(**_NEVER),),
        alone=(lambda: strategies.LocalSGDStrategy(**_ROUND), lambda: strategies.LocalSGDStrategy(**_NEVER)),
        rounds=True,
        tolerance=_ROUNDING,
    ),
    "slowmo": StrategySettings(
        make=lambda: strategies.SlowMoStrategy(**_ROUND, **_SLOWMO, warmup_steps=2),
        oracle=lambda run, plugin: oracles.local_update(run, plugin, oracles.slow_momentum(0.9, 0.4), warmup=2),
        identities=(lambda: strategies.SlowMoStrategy(**_NEVER, **_SLOWMO),),
        alone=(lambda: strategies.SlowMoStrategy(**_ROUND, **_SLOWMO),),
        rounds=True,
        tolerance=_ROUNDING,
    ),
    "diloco": StrategySettings(
        make=lambda: strategies.DiLoCoStrategy(**_ROUND, **_DILOCO),
        oracle=lambda run, plugin: oracles.local_update(run, plugin, oracles.nesterov(0.6, 0.5)),
        identities=(lambda: strategies.DiLoCoStrategy(**_NEVER, **_DILOCO),),
        alone=(lambda: strategies.DiLoCoStrategy(**_ROUND, **_DILOCO),),
        rounds=True,
        tolerance=_ROUNDING,
    ),
    "compressed_ddp": StrategySettings(
        # The head's rows have equal gradients, with changing signs. As many entries are sent as leave no choice.
        make=lambda: strategies.CompressedDDPStrategy(compressor="topk", ratio=0.75),
        oracle=lambda run, plugin: oracles.top_k_with_ef21(run, plugin, 0.75),
        identities=(
            # Everything is sent.
            lambda: strategies.CompressedDDPStrategy(compressor="topk", ratio=1.0),
            lambda: strategies.CompressedDDPStrategy(compressor="sign", warmup_steps=10 * STEPS),
        ),
        alone=(lambda: strategies.CompressedDDPStrategy(compressor="topk", ratio=0.75),),
        tolerance=_ROUNDING,
    ),
    "one_bit_adam": StrategySettings(
        make=lambda: strategies.OneBitAdamStrategy(freeze_step=4),
        oracle=lambda run, plugin: oracles.one_bit(run, plugin, 4),
        identities=(lambda: strategies.OneBitAdamStrategy(freeze_step=10 * STEPS),),
        alone=(lambda: strategies.OneBitAdamStrategy(freeze_step=4),),
        conflicts={
            "stable_spam": "freezes the variance that a reset would forget",
            "balanced_ema": "processes of equal weights would have different averages",
        },
        optimizer="adam",
    ),
    "robust_ddp": StrategySettings(
        make=lambda: strategies.RobustDDPStrategy(aggregator="flag", f=0),
        oracle=lambda run, plugin: oracles.robust(run, plugin, "flag"),
        identities=(
            # What lies between two workers that are both believed is their mean.
            lambda: strategies.RobustDDPStrategy(aggregator="nna", f=0),
            lambda: strategies.RobustDDPStrategy(aggregator="trimmed_mean", f=0),
        ),
        alone=(lambda: strategies.RobustDDPStrategy(aggregator="flag", f=0),),
        saves=False,
        tolerance=_ROUNDING,
    ),
}
