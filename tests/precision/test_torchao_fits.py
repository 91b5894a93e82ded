"""Precision plugins on torchao in fits: first steps, evaluation, processes, strategies and settings."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from precision.torchao_runs import LOW, PLUGINS, STEPS, Mlp, batches, train, trainer_of
from precision.torchao_samples import each, needs_torchao

from lightning_stable.precision import _torchao
from lightning_stable.precision.float8 import Float8Precision
from lightning_stable.testing.workers import Pair

pytestmark = needs_torchao


@each
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_steps_are_exact(name: str, accumulate: int) -> None:
    first, steps = 3, STEPS // accumulate
    settings = {"max_steps": steps, "accumulate_grad_batches": accumulate}
    exact, found = train(None, **settings), train(PLUGINS[name](first_steps_high_precision=first), **settings)
    passes = first * accumulate
    assert found.kinds == ["Linear"] * passes + [LOW[name]] * (STEPS - passes)
    assert found.losses[:passes] == exact.losses[:passes]
    assert found.losses[passes] != exact.losses[passes]


@each
def test_evaluation_computes_as_the_steps_made_say(name: str, tmp_path: Any) -> None:
    plugin = PLUGINS[name](first_steps_high_precision=4)
    module = Mlp()
    trainer = trainer_of(plugin, max_steps=3)
    trainer.fit(module, batches())
    assert plugin.state_dict() == {"steps": 3}
    path = tmp_path / "early.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)[type(plugin).__name__] == {"steps": 3}
    # The object, another one told by the checkpoint, and one that knows nothing.
    others = PLUGINS[name](first_steps_high_precision=4), PLUGINS[name](first_steps_high_precision=4)
    for other, told, expected in ((plugin, None, "Linear"), (others[0], path, "Linear"), (others[1], None, LOW[name])):
        fresh = Mlp()
        trainer_of(other).validate(fresh, batches(), ckpt_path=told)
        assert set(fresh.kinds) == {f"validated {expected}"}


@each
def test_the_rest_computes_as_asked(name: str) -> None:
    for compute, weights, outputs in (
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ):
        plugin, module, dtypes = PLUGINS[name](compute=compute), Mlp(), []
        module.net[0].register_forward_hook(lambda layer, inputs, output, dtypes=dtypes: dtypes.append(output.dtype))
        assert trainer_of(plugin).precision == compute
        train(plugin, module)
        assert {parameter.dtype for parameter in module.parameters()} == {weights}
        assert set(dtypes) == {outputs}
        assert module.losses[-1] < 0.8 * module.losses[0]


@each
def test_bf16_mixed_is_that_of_the_host_with_low_bit_layers(name: str) -> None:
    found = train(PLUGINS[name](compute="bf16-mixed"))
    host = train(MixedPrecision("bf16-mixed", "cpu"))
    assert found.losses == pytest.approx(host.losses, rel=0.06)
    assert found.losses != host.losses
    never = train(PLUGINS[name](compute="bf16-mixed", first_steps_high_precision=STEPS))
    assert never.losses == host.losses


@each
def test_a_compiled_module_is_one_graph_and_follows_the_switch(name: str) -> None:
    torch._dynamo.reset()
    module, plain = Mlp(), Mlp()
    module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    settings = {"first_steps_high_precision": 2}
    train(PLUGINS[name](**settings), module, max_steps=5)
    train(PLUGINS[name](**settings), plain, max_steps=5)
    assert module.losses == pytest.approx(plain.losses, rel=1e-5)
    exact = train(None, max_steps=5)
    assert module.losses[2] != pytest.approx(exact.losses[2], rel=1e-5)


@each
def test_sharded_by_fsdp2_in_two_processes(name: str, workers: Pair, tmp_path: Any) -> None:
    path = str(tmp_path / "sharded.ckpt")
    settings = {"name": name, "first_steps_high_precision": 2}
    sharded = workers.run("precision.torchao_runs:fsdp_job", path=path, **settings)
    whole = workers.run("precision.torchao_runs:ddp_job", **settings)
    for ours, theirs in zip(sharded, whole, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
        assert ours["losses"][:2] != ours["losses"][2:4]
        assert ours["during"] == ["FSDPLinear"] * 2 + [LOW[name]] * 4
        assert ours["after"] == ["FSDPLinear", "Linear", "Linear"]
        assert ours["resumed"] == [LOW[name]] * 2
    checkpoint = torch.load(path, weights_only=True)
    Mlp().load_state_dict(checkpoint["state_dict"])
    assert checkpoint[PLUGINS[name].__name__] == {"steps": 6}


@each
def test_strategies_that_cannot_work_are_refused(name: str) -> None:
    plugin = PLUGINS[name]()
    deepspeed = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match=f"{PLUGINS[name].__name__} does not work with DeepSpeedStrategy"):
        _torchao._check_strategy(PLUGINS[name].__name__, deepspeed)
    parallel = ModelParallelStrategy.__new__(ModelParallelStrategy)
    parallel._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 4)}
    with pytest.raises(ValueError, match=f"{PLUGINS[name].__name__} does not work with tensor_parallel_size=4"):
        _torchao._check_strategy(PLUGINS[name].__name__, SimpleNamespace(strategy=parallel))
    # By the host.
    with pytest.raises(TypeError, match=f"FSDPPrecision.*{PLUGINS[name].__name__}"):
        FSDPStrategy(precision_plugin=plugin)
    with pytest.raises(ValueError, match="Received both `precision=bf16-mixed` and `plugins="):
        trainer_of(plugin, precision="bf16-mixed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute": "16-mixed"}, "compute='16-mixed' is unknown. Choose one of '32-true'"),
        ({"width_multiple": 0}, "width_multiple=0 is not a whole number of features from 1 on"),
        ({"first_steps_high_precision": -1}, "first_steps_high_precision=-1 is not a whole number of optimizer steps"),
        ({"exclude": [3]}, r"exclude=\[3\] is not a list of patterns"),
        ({"include": None}, "include=None is not a list of patterns"),
    ],
)
@each
def test_settings_that_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLUGINS[name](**settings)


def test_a_single_pattern_may_stand_alone() -> None:
    plugin = Float8Precision(include="net.*", exclude="*.2")
    assert (plugin.include, plugin.exclude) == (["net.*"], ["*.2"])
