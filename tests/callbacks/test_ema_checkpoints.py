"""What EMA leaves behind: checkpoints, resumed runs, and the fits after the first."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from averages import assert_average, loss_of, parameters, validation
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_stable.callbacks import EMA
from lightning_stable.testing.harness import OUTPUTS, Net, SaveAt, Stream, assert_same, fit

# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("validate_with", ["ema", "live", "both"])
def test_a_monitored_checkpoint_holds_the_weights_it_was_monitored_by(
    tmp_path: Path, validate_with: str, weights_only: bool
) -> None:
    saving = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=weights_only)
    run = fit(
        [saving, EMA(0.6, validate_with=validate_with)],
        validation=validation(),
        max_steps=11,
        val_check_interval=3,
        enable_checkpointing=True,
    )
    weights = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    names = parameters(run.module)
    module = Net()
    module.load_state_dict(weights)
    assert loss_of({name: weights[name] for name in names}, module) == pytest.approx(
        float(saving.best_model_score), rel=1e-5
    )


def test_both_sets_load_into_a_plain_module(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    run = fit([EMA(0.5), SaveAt(5, str(path))], validation=validation(), max_steps=8)
    head = nn.Linear(8, OUTPUTS)
    EMA.load_weights(path, "live", into=head, prefix="head.")
    assert torch.equal(head.weight, run.steps[4].weights["head.weight"])
    averaged = EMA.load_weights(path, "ema", into=Net())
    history = [run.steps[0].before, *(step.weights for step in run.steps[:5])]
    assert_average({name: averaged[name] for name in history[0]}, history, 0.5)
    with pytest.raises(ValueError, match=r"do not fit Linear\. Name the submodule that it is, as in prefix='body\.'"):
        EMA.load_weights(path, "live", into=head)
    with pytest.raises(ValueError, match="which='raw' is unknown"):
        EMA.load_weights(path, "raw")
    with pytest.raises(ValueError, match=r"prefix='body\.9' fits no weight"):
        EMA.load_weights(path, "ema", prefix="body.9")


def test_a_checkpoint_without_an_average_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    fit([SaveAt(2, str(path))], max_steps=3, limit_val_batches=0)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        EMA.load_weights(path)


def test_a_checkpoint_holds_the_average_once(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.insert(4, nn.Linear(8, 8))
            self.wide = nn.Linear(500, 500)

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.wide.weight.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    sizes = []
    for plugins in ([], [EMA(0.5)]):
        path = tmp_path / f"{len(plugins)}.ckpt"
        fit([*plugins, SaveAt(2, str(path))], module=Wide(), max_steps=3, limit_val_batches=0)
        sizes.append(path.stat().st_size)
    # Weights alone against live and averaged weights; the state_dict shares the memory of the average.
    assert 1.9 < sizes[1] / sizes[0] < 2.1


def test_saving_after_the_fit_keeps_both_sets(tmp_path: Path) -> None:
    for finish in ("ema", "live"):
        run = fit([EMA(0.5, finish_with=finish)], validation=validation(), max_steps=6)
        run.trainer.save_checkpoint(tmp_path / "end.ckpt")
        live = EMA.load_weights(tmp_path / "end.ckpt", "live")
        assert_same({name: live[name] for name in run.steps[-1].weights}, run.steps[-1].weights, f"live, {finish}")
        averaged = EMA.load_weights(tmp_path / "end.ckpt", "ema")
        history = [run.steps[0].before, *(step.weights for step in run.steps)]
        assert_average({name: averaged[name] for name in history[0]}, history, 0.5)


def test_tied_weights_are_averaged_once_and_saved_under_both_names(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(8, OUTPUTS)
            self.twin.weight = self.head.weight

    path = tmp_path / "tied.ckpt"
    fit([EMA(0.5), SaveAt(3, str(path))], module=Tied(), validation=validation(), max_steps=4)
    for which in ("ema", "live"):
        weights = EMA.load_weights(path, which, into=Tied())
        assert torch.equal(weights["twin.weight"], weights["head.weight"])
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["twin.weight"], EMA.load_weights(path, "ema")["head.weight"])


def test_resume_before_the_average_began(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")

    def run(**settings: Any) -> Any:
        extra = [] if settings else [SaveAt(4, path)]
        return fit([EMA(0.5, start_step=6), *extra], validation=validation(), max_steps=12, **settings)

    straight, resumed = run(), run(ckpt_path=path)
    assert_same(resumed.module.state_dict(), straight.module.state_dict(), "resumed before the start step")
    history = [step.weights for step in straight.steps[5:]]
    assert_average(parameters(straight.module), history, 0.5)


def test_resuming_another_module_is_a_clear_error(tmp_path: Path) -> None:
    class Fewer(Net):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, OUTPUTS, bias=False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    path = str(tmp_path / "cut.ckpt")
    fit([EMA(0.5), SaveAt(4, path)], max_steps=5, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"this module does not have, the first is 'head.bias' of 1"):
        fit([EMA(0.5)], module=Fewer(), max_steps=8, ckpt_path=path, limit_val_batches=0)


# ------------------------------------------------------------------ several fits


def test_the_average_goes_on_over_the_tasks_of_a_stream() -> None:
    callback, module = EMA(0.9, finish_with="live"), Net()
    for task in range(2):
        fit([callback], module=module, train=Stream(seed=task), validation=validation(), max_steps=6)
    history = [module.steps[0].before, *(step.weights for step in module.steps)]
    assert_same(parameters(module), module.steps[-1].weights, "live weights at the end")
    assert_average(callback.state_dict()["shadow"], history, 0.9)
    assert callback.updates == 12

    callback.reset()
    fit([callback], module=module, train=Stream(seed=2), validation=validation(), max_steps=6)
    assert_average(
        callback.state_dict()["shadow"], [module.steps[11].weights, *(s.weights for s in module.steps[12:])], 0.9
    )


def test_a_fit_that_ended_on_the_average_goes_on_from_it() -> None:
    callback, module = EMA(0.9), Net()
    fit([callback], module=module, validation=validation(), max_steps=6)
    end = parameters(module)
    fit([callback], module=module, validation=validation(), max_steps=6)
    assert_same(module.steps[6].before, end, "the second fit begins where the first ended")
    assert_average(parameters(module), [end, *(step.weights for step in module.steps[6:])], 0.9)


def test_a_failing_test_after_the_fit_leaves_the_weights() -> None:
    class FailsToTest(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("deliberate failure")

    run = fit([EMA(0.5)], module=FailsToTest(), validation=validation(), max_steps=6)
    end = parameters(run.module)
    with pytest.raises(RuntimeError, match="deliberate"):
        run.trainer.test(run.module, validation(), verbose=False)
    assert_same(parameters(run.module), end, "weights after a failing test")


@pytest.mark.parametrize("with_average", [True, False])
def test_a_used_object_resumes_like_a_fresh_one(with_average: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")
    fit([*([EMA(0.5, start_step=5)] if with_average else []), SaveAt(3, path)], max_steps=6, limit_val_batches=0)
    used, ends = EMA(0.5, start_step=5), []
    module = Net()
    fit([used], module=module, max_steps=10, limit_val_batches=0)
    for callback, target in ((used, module), (EMA(0.5, start_step=5), Net())):
        ends.append(
            parameters(fit([callback], module=target, max_steps=10, ckpt_path=path, limit_val_batches=0).module)
        )
        assert callback.updates == 5
    assert_same(ends[0], ends[1], "used against fresh")


def test_a_checkpoint_saved_on_an_exception_holds_the_validated_weights(tmp_path: Path) -> None:
    module = Net()
    module.fail_at = ("train", 5)
    saving = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([saving, EMA(0.5)], module=module, max_steps=10, enable_checkpointing=True, limit_val_batches=0)
    (saved,) = tmp_path.glob("*.ckpt")
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert_average(
        {n: state[n] for n in module.steps[0].before}, [module.steps[0].before, *(s.weights for s in module.steps)], 0.5
    )


def test_the_last_checkpoint_of_a_live_validated_run_is_live(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    run = fit([saving, EMA(0.5, validate_with="live")], validation=validation(), max_steps=6, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same({name: state[name] for name in run.steps[-1].weights}, run.steps[-1].weights, "last.ckpt")


def test_a_new_head_for_each_task_begins_a_new_average() -> None:
    class NewHead(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

        def loss(self, batch: Any) -> Tensor:
            return self(batch[0]).square().mean()

    callback, module = EMA(0.5, finish_with="live"), NewHead()
    fit([callback], module=module, max_steps=4, limit_val_batches=0)
    body = callback.state_dict()["shadow"]["body.0.weight"].clone()
    module.head = nn.Linear(8, OUTPUTS + 2)
    fit([callback], module=module, max_steps=1, limit_val_batches=0)
    shadow = callback.state_dict()["shadow"]
    assert shadow["head.weight"].shape == (OUTPUTS + 2, 8)
    assert torch.allclose(shadow["body.0.weight"], 0.5 * body + 0.5 * module.body[0].weight)


def test_a_used_callback_can_be_pickled() -> None:
    run = fit([EMA(0.5)], max_steps=4, limit_val_batches=0)
    copied = pickle.loads(pickle.dumps(run.plugins[0]))
    assert copied.updates == 4
    fit([copied], max_steps=4, limit_val_batches=0)
