"""SAM against a loop by hand, and what its second pass must not leave behind."""

from collections import Counter, UserDict
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from pytorch_optimizer import SAM as PeerSAM
from sam_loops import RHO, STEPS, SkipsThem, TurnsNan, loop
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import Net, Run, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair


def weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in run.module.named_parameters()}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain, two groups": ({}, {}),
    "clipping": ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "accumulation and clipping": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"accumulate": 2, "clip": 0.05},
    ),
    "bf16": ({"precision": "bf16-mixed"}, {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_by_hand(case: str) -> None:
    settings, by_hand = CASES[case]
    run = fit([SAM(rho=RHO)], max_steps=STEPS, **settings)
    assert_same(weights(run), loop(**by_hand), case, tolerance=1e-6)


def test_two_processes_equal_a_loop_by_hand(workers: Pair) -> None:
    first, second = workers.run("sam_loops:two_process_job")
    assert_same(second, first, "rank 1 against rank 0")
    assert_same(first, loop(shares=2, norm=False), "two processes", tolerance=1e-6)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("settings", [{"variant": "gsam"}, {"variant": "looksam", "interval": 3}])
def test_variants_that_compare_gradients_are_the_same_in_two_processes(
    settings: dict[str, Any], bucket_view: bool, workers: Pair
) -> None:
    first, second = workers.run("sam_loops:two_process_job", bucket_view=bucket_view, **settings)
    assert_same(second, first, "rank 1 against rank 0")
    single = fit([SAM(rho=RHO, **settings)], module=Net(norm=False), max_steps=STEPS)
    assert_same(first, weights(single), "two processes against one", tolerance=1e-5)


class Outside(Net):
    """Its optimizer trains a scale that the module does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.nn.Parameter(torch.ones(()))]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.hidden[0]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": self.hidden, "lr": 0.1})
        return optimizer


@pytest.mark.parametrize("settings", [{}, {"variant": "looksam", "interval": 2}, {"variant": "gsam"}])
def test_parameters_that_the_module_does_not_hold(settings: dict[str, Any]) -> None:
    seen: list[float] = []

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append(float(pl_module.hidden[0].grad))

    fit([SAM(**settings), Looks()], module=Outside(), max_steps=3)
    if not settings:
        assert seen == [1.0, 1.0, 1.0]
    assert all(value < 2 for value in seen), f"gradients of both passes were added up: {seen}"


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.table(torch.tensor([1])).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ReturnsAMapping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return UserDict(loss=super().training_step(batch, batch_idx))


def test_outputs_may_be_any_mapping() -> None:
    found, expected = fit([SAM()], module=ReturnsAMapping(), max_steps=4), fit([SAM()], max_steps=4)
    assert_same(weights(found), weights(expected), "a mapping against the loss alone")


class LooksAround(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert any(isinstance(callback, SAM) for callback in self.trainer.callbacks)
        return super().training_step(batch, batch_idx)


def test_the_trainer_keeps_its_callbacks_in_the_second_pass() -> None:
    """Threads of the host, such as a progress bar's, and the module itself may look at them at any time."""
    assert len(fit([SAM()], module=LooksAround(), max_steps=3).steps) == 3


class CutsEpochs(Net):
    """Ends the first epoch in the middle of an accumulated step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)


def test_micro_batches_of_a_step_that_was_cut_are_not_of_the_next() -> None:
    run = fit([SAM()], module=CutsEpochs(), max_epochs=2, accumulate_grad_batches=2)
    # Both batches of the first step, both again; one that is left; and so on.
    assert run.module.seen[:9] == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 0), (1, 1)]


class TurnsInfThere(Net):
    """Overflows at the perturbed weights only, at step 4."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        steps = len(self.steps)
        moved = steps == 4 and not torch.equal(self.head.weight, self.steps[-1].weights["head.weight"])
        return loss * float("inf") if self.training and moved else loss


def test_a_second_pass_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="gradient of the second pass is not finite at optimizer step 4"):
        fit([SAM()], module=TurnsInfThere(), max_steps=8)
    sam = SAM(variant="looksam", interval=4)
    run = fit([sam, SkipsThem()], module=TurnsInfThere(), max_steps=8)
    skipped = [number for number, step in enumerate(run.steps) if not step.gradients]
    assert skipped == [4], "the steps after it have the component of before"
    assert all(bool(part.isfinite().all()) for part in sam.state_dict()["component"].values())


def test_two_processes_agree_that_one_has_no_finite_gradient(workers: Pair) -> None:
    """The pass of rank 1 alone is not finite: both stop with the same message, or both leave the step to who skips."""
    first, second = workers.run("sam_loops:nan_job", skips=False)
    assert "not finite at optimizer step 3" in first["error"]
    assert "not finite at optimizer step 3" in second["error"]
    assert_same(second["weights"], first["weights"], "rank 1 against rank 0")
    first, second = workers.run("sam_loops:nan_job", skips=True)
    assert first["error"] == second["error"] == ""
    assert_same(second["weights"], first["weights"], "rank 1 against rank 0, skipping")
    assert all(bool(value.isfinite().all()) for value in first["weights"].values())


def test_a_gradient_scaler_keeps_its_meaning() -> None:
    def run(*plugins: Any) -> Run:
        return fit([SAM(rho=RHO), *plugins], max_steps=STEPS)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = run(MixedPrecision("16-mixed", "cpu", scaler))
    assert_same(weights(scaled), weights(run()), "float16 with a scaler against float32", tolerance=5e-3)


def test_a_gradient_scaler_skips_an_overflow() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    run = fit([SAM(rho=RHO), MixedPrecision("16-mixed", "cpu", scaler)], max_steps=40)
    before = [step.before for step in run.steps]
    # The optimizer of the host is not called at a skipped step, so there are fewer records than steps.
    assert 0 < len(before) < 40
    assert scaler.get_scale() < 2.0**40
    assert all(bool(value.isfinite().all()) for value in weights(run).values())


class Curious(Net):
    """Has dropout, batch statistics and torchmetrics, logs, and remembers what it saw at each pass."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.several = nn.ModuleDict({"inner": MetricCollection({"mean": MeanMetric()})})
        self.masks: list[Tensor] = []
        self.body[3].register_forward_hook(lambda part, inputs, output: self.masks.append(output == 0))
        self.calls: Counter[str] = Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.several["inner"].update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_after_backward(self) -> None:
        self.calls["module on_after_backward"] += 1


class Counts(Callback):
    """Counts the hooks of a step."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls["on_before_zero_grad"] += 1

    def on_before_backward(self, *_: Any) -> None:
        self.calls["on_before_backward"] += 1

    def on_after_backward(self, *_: Any) -> None:
        self.calls["on_after_backward"] += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.calls["on_before_optimizer_step"] += 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_second_pass_leaves_nothing_behind(accumulate: int) -> None:
    """Logs, metrics, batch statistics and hooks are those of the first pass; dropout draws its masks again."""
    torch.manual_seed(3)
    counts, module = Counts(), Curious()
    fit([SAM(rho=RHO), counts], module=module, max_steps=6 // accumulate, accumulate_grad_batches=accumulate)
    steps = 6 // accumulate
    assert counts.calls == {
        "on_before_zero_grad": steps,
        "on_before_backward": 6,
        "on_after_backward": 6,
        "on_before_optimizer_step": steps,
    }
    assert module.calls == {"module on_after_backward": 6}
    assert int(module.body[1].num_batches_tracked) == 6
    first = [module.masks[2 * accumulate * step : 2 * accumulate * step + accumulate] for step in range(steps)]
    again = [module.masks[2 * accumulate * step + accumulate : 2 * accumulate * (step + 1)] for step in range(steps)]
    assert_same(again, first, "dropout masks")
    assert not torch.equal(first[0][0], first[-1][-1]), "all masks are alike, so the comparison says nothing"


def test_what_is_logged_is_the_first_pass() -> None:
    """With rho so small that both passes have one loss, logs equal those of plain training."""
    torch.manual_seed(3)
    plain = fit([], module=Curious(), max_steps=12)
    torch.manual_seed(3)
    sharp = fit([SAM(rho=1e-30)], module=Curious(), max_steps=12)
    assert_same(sharp.logged, plain.logged, "logged values", tolerance=1e-6)
    assert_same(sharp.module.state_dict(), plain.module.state_dict(), "weights and batch statistics", tolerance=1e-6)
    assert_same(
        float(sharp.trainer.callback_metrics["mean"]), float(plain.trainer.callback_metrics["mean"]), "metric", 1e-6
    )


def test_logged_losses_are_those_at_the_weights() -> None:
    """With a large radius the two passes differ much, and the log is the first one's."""
    run = fit([SAM(rho=2.0)], max_steps=6)
    fresh = Net().train()
    fresh.load_state_dict({**fresh.state_dict(), **run.steps[0].before})
    assert run.logged[0][1]["train_loss"] == pytest.approx(fresh.loss(Stream().batch(0)).item(), rel=1e-6)


class FailsInTheSecondPass(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes == 8:  # the second pass of the fourth step
            raise RuntimeError("deliberate failure")
        return super().training_step(batch, batch_idx)


def test_a_failure_in_the_second_pass_gives_the_weights_back() -> None:
    module = FailsInTheSecondPass()
    trainer_callbacks: list[Any] = []

    class Looks(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            trainer_callbacks.extend(trainer.callbacks)

    with pytest.raises(RuntimeError, match="deliberate"):
        fit([SAM(rho=1.0), Looks()], module=module, max_steps=9)
    assert_same(weights(Run(None, module, [])), module.steps[-1].weights, "weights after the failure")
    assert any(isinstance(callback, SAM) for callback in trainer_callbacks), "the Trainer lost its callbacks"
    assert "training_step" not in vars(module)
    assert "optimizer_step" not in vars(module)
    assert "log" not in vars(module)


def test_a_loss_that_is_nan_is_named_and_nothing_is_lost() -> None:
    module = TurnsNan()
    with pytest.raises(ValueError, match=r"SAM: .* not finite at optimizer step 3 \(the loss at the weights is nan\)"):
        fit([SAM()], module=module, max_steps=6)
    assert_same(weights(Run(None, module, [])), module.steps[-1].weights, "weights")


def test_a_loss_that_is_nan_is_left_to_who_skips_it() -> None:
    # The optimizer is called with no gradients, and takes no step.
    module = TurnsNan()
    fit([SAM(), SkipsThem()], module=module, max_steps=6)
    assert_same(module.steps[3].weights, module.steps[3].before, "weights at the skipped step")
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_looksam_goes_on_between() -> None:
    """Between the steps with two passes there is one, and another update than the plain one."""
    run = fit([SAM(rho=0.3, variant="looksam", interval=4)], module=Curious(), max_steps=6)
    assert len(run.module.masks) == 6 + 2
    assert run.plugins[0].state_dict()["component"].keys() == dict(run.module.named_parameters()).keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0}, "rho=0 is not a finite number above 0"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"interval": 0}, "interval=0"),
        ({"start_step": -1}, "start_step=-1"),
        ({"variant": "esam"}, "variant='esam' is unknown. Choose one of 'sam', 'looksam', 'gsam'"),
        ({"variant": "asam"}, "variant='sam' with adaptive=True"),
        ({"variant": "looksam"}, "Set interval to 2 or more"),
        ({"alpha": 0.5}, "has no meaning for variant='sam'"),
        ({"variant": "gsam", "alpha": 0.0}, "alpha=0.0"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM(**settings)


class WithLBFGS(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class TakesAnIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (WithLBFGS, "SAM does not work with LBFGS"),
        (TakesAnIterator, "SAM .*dataloader_iter"),
        (Sparse, r"SAM does not work with sparse gradients, and that of 'table.weight'"),
    ],
)
def test_refuses_modules(module: type[Net], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit([SAM()], module=module(), max_steps=2)


class CountsPasses(Net):
    """Trains with pytorch-optimizer's SAM, and counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def loss(self, batch: Any) -> Tensor:
        self.passes += 1
        return super().loss(batch)

    def configure_optimizers(self) -> Any:
        return PeerSAM(self.parameters(), torch.optim.SGD, lr=0.05, rho=0.2)


def test_an_optimizer_that_wraps_another_takes_one_pass_a_step_here() -> None:
    """Why this is a callback: under automatic optimisation the peer takes one pass a step, so it is not SAM."""
    module = CountsPasses()
    fit([], module=module, max_steps=6)
    assert module.passes == 6, "pytorch-optimizer's SAM now takes another number of passes: say so in the card"

    ours = Curious()
    fit([SAM()], module=ours, max_steps=6)
    assert len(ours.masks) == 12
