"""1-bit Adam in real processes: equal to the simulation of its workers, exactly resumed, and what it refuses."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from oracles.one_bit_adam_twin import COUNTS, ENTRIES, HIDDEN, INPUTS, Settings, batch, simulate
from strategies.groups import Group
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable.strategies import OneBitAdamStrategy
from lightning_stable.testing.harness import AdamNet, assert_same, fit

JOBS = "strategies.one_bit_jobs:"
TRAIN = JOBS + "train"

RUNS = {
    "adam": Settings(),
    "adamw": Settings(decoupled=True, decay=(0.1, 0.3)),
    "adam with L2 decay": Settings(decay=(0.1, 0.3), dead_input=False),
    "scheduler": Settings(factors=[1.0, 0.5, 0.9, 1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1]),
    "clipping": Settings(clip=0.3),
    "accumulation": Settings(accumulate=3),
    "everything": Settings(decoupled=True, decay=(0.1, 0.0), clip=0.5, accumulate=2, freeze_step=5, steps=14),
    "frozen at once": Settings(freeze_step=1),
}


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with Group(3) as group:
        # On a busy machine the imports alone may take minutes.
        group.run(JOBS + "rank", timeout=500)
        yield group


def assert_as_twin(runs, settings, workers):
    twin = simulate(settings, workers)
    for rank, run in enumerate(runs):
        assert len(run["weights"]) == settings.steps
        for name in ("weights", "momentum"):
            found = run[name].double().numpy()
            np.testing.assert_allclose(
                found, np.stack(getattr(twin, name)), rtol=1e-6, atol=1e-6, err_msg=f"{name} of {rank}"
            )
        own = run["errors"]["worker_error"][:ENTRIES].double().numpy()
        np.testing.assert_allclose(own, twin.worker_errors[rank], atol=1e-6)
        assert (run["errors"]["worker_error"][ENTRIES:] == 0).all()
        assert_same(run["state"], runs[0]["state"], f"rank {rank} against rank 0")
    served = torch.cat([run["errors"]["server_error"] for run in runs])[:ENTRIES].double().numpy()
    np.testing.assert_allclose(served, twin.server_errors, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_two_workers_do_as_the_simulation(workers, name):
    # A variance of one step makes steps so long that float32 is not enough to compare them.
    precision = "64-true" if name == "frozen at once" else "32-true"
    runs = workers.run(TRAIN, settings=RUNS[name], precision=precision)
    assert_as_twin(runs, RUNS[name], 2)
    assert runs[0]["steps"] == [RUNS[name].steps] * 4
    # What a scheduler had put on the optimizer is there again, and nothing else.
    assert runs[0]["step_is_own"] is (name == "scheduler")


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_it_works_with_each_implementation_of_adam(workers, options):
    settings = RUNS["adamw"]
    assert_as_twin(workers.run(TRAIN, settings=settings, options=options), settings, 2)


def test_three_workers_do_as_the_simulation(three):
    assert_as_twin(three.run(TRAIN, settings=RUNS["everything"]), RUNS["everything"], 3)


def test_gradients_are_common_before_the_freeze_and_a_workers_own_after_it(workers):
    settings = Settings(accumulate=2)
    first, second = workers.run(TRAIN, settings=settings)
    same = [torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True)]
    assert same == [step < settings.freeze_step for step in range(settings.steps)]


def test_a_schedule_is_followed_through_the_freeze(workers):
    settings = RUNS["scheduler"]
    run = workers.run(TRAIN, settings=settings)[0]
    # Recorded before the scheduler's step of that batch, or after it, as the host has it.
    expected = [settings.rates[0] * factor for factor in [*settings.factors[1:], 0.0]]
    assert run["rates"] == pytest.approx(expected)


def test_it_counts_what_is_sent(workers):
    settings = Settings()
    frozen, sent = zip(*workers.run(TRAIN, settings=settings)[0]["traffic"], strict=True)
    assert frozen == tuple(step > settings.freeze_step for step in range(1, settings.steps + 1))
    per_step = [after - before for before, after in zip((0, *sent), sent, strict=False)]
    # A ring's share of 31 gradients in float32; then 16 bits and up to 5 scales, to the server and from it,
    # and a bit for each of the 4 tensors to the server.
    assert per_step[:3] == [4 * ENTRIES] * 3
    assert set(per_step[3:]) == {2 * (16 // 8 + 5 * 4) + 1}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_training_in_bf16_goes_on_after_the_freeze(workers, precision):
    settings = Settings(steps=40, freeze_step=10, rates=(0.03, 0.03))
    first, second = workers.run(TRAIN, settings=settings, precision=precision)
    assert_same(second["state"], first["state"], "rank 1 against rank 0")
    assert torch.isfinite(first["weights"]).all()
    # As well as in double precision, and better than at the freeze.
    reached = [loss_of(weights.double().numpy()) for weights in first["weights"][[settings.freeze_step - 1, -1]]]
    assert reached[1] < 0.95 * reached[0]
    assert reached[1] == pytest.approx(loss_of(simulate(settings, 2).weights[-1]), rel=0.05)


def loss_of(weights):
    total = 0.0
    for index in range(40):
        for worker in range(2):
            x, y = batch(index, worker)
            w1, b1, w2, b2 = np.split(weights, np.cumsum(COUNTS)[:-1])
            hidden = np.tanh(x @ w1.reshape(HIDDEN, INPUTS).T + b1)
            total += np.mean((hidden @ w2.reshape(1, HIDDEN).T + b2 - y) ** 2) / 80
    return total


@pytest.mark.parametrize("save_at", [2, 3, 4, 8])
def test_a_resumed_run_is_the_uninterrupted_one(workers, tmp_path, save_at):
    path = str(tmp_path / "saved.ckpt")
    runs = workers.run(JOBS + "resume", settings=RUNS["adamw"], save_at=save_at, path=path)
    for run in runs:
        assert run["steps"] == RUNS["adamw"].steps - save_at
        assert_same(run["resumed"], run["through"], f"resumed after step {save_at}")
        assert_same(run["resumed"], runs[0]["resumed"], "rank against rank 0")
    saved = torch.load(path, weights_only=True)
    assert ("OneBitAdamStrategy" in saved) is (save_at > 3)
    # Rank 0's, which sees what it saw.
    assert_same(runs[0]["callbacks"][1], runs[0]["callbacks"][0], "the state of a callback on rank 0")


def test_a_checkpoint_after_the_fit_has_the_errors_too(workers, tmp_path):
    for run in workers.run(JOBS + "go_on_after_the_end", settings=RUNS["adamw"], end=7, path=str(tmp_path / "a.ckpt")):
        assert_same(run["in two"], run["through"], "two fits against one")


def test_a_checkpoint_serves_another_number_of_processes_and_plain_ddp(workers, three, tmp_path):
    path = str(tmp_path / "saved.ckpt")
    workers.run(JOBS + "resume", settings=RUNS["adamw"], save_at=8, path=path)
    runs = three.run(JOBS + "resume_from", settings=RUNS["adamw"], path=path)
    assert [run["steps"] for run in runs] == [4, 4, 4]
    assert all(run["frozen"] for run in runs)
    assert any("made by 2 process(es) and this run has 3" in said for said in runs[0]["said"])
    for run in runs:
        assert_same(run["state"], runs[0]["state"], "rank against rank 0")
    plain = workers.run(JOBS + "resume_from", settings=RUNS["adamw"], path=path, strategy="ddp")
    assert plain[0]["steps"] == 4
    # What is frozen stays frozen, also where a later freeze is asked for.
    later = dataclasses.replace(RUNS["adamw"], freeze_step=10)
    runs = workers.run(JOBS + "resume_from", settings=later, path=path)
    assert runs[0]["frozen"]
    assert not [said for said in runs[0]["said"] if "OneBitAdam" in said]


def test_a_freeze_behind_the_end_is_told(workers):
    settings = dataclasses.replace(RUNS["adamw"], freeze_step=RUNS["adamw"].steps)
    first, _ = workers.run(JOBS + "resume_from", settings=settings, path=None)
    assert not first["frozen"]
    told = f"freeze_step={settings.steps} is {settings.steps} steps, and the run ends after {settings.steps}:"
    assert any(told in said for said in first["said"]), first["said"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_follow_rank_zero_as_under_ddp(workers, accumulate):
    settings = Settings(steps=8, accumulate=accumulate)
    first, second = workers.run(JOBS + "buffers", settings=settings, broadcast=True)
    equal = [torch.equal(a, b) for a, b in zip(first["seen"], second["seen"], strict=True)]
    # Between the micro-batches of a step each process goes its own way.
    assert equal == [index % accumulate == 0 for index in range(8 * accumulate)]
    assert torch.equal(first["weights"], second["weights"])
    first, second = workers.run(JOBS + "buffers", settings=settings, broadcast=False)
    assert not torch.equal(first["seen"][-1], second["seen"][-1])
    assert torch.equal(first["weights"], second["weights"])


def test_two_optimizers_under_manual_optimisation_freeze_when_each_has_made_its_steps(workers):
    first, second = workers.run(JOBS + "manual", steps=9)
    # The second one steps at the second and the fourth batch.
    assert first["frozen"] == [False] * 4 + [True] * 5
    assert first["counts"] == [[9, 9], [4, 4]]
    # Thirteen steps: six before the freeze, on common gradients.
    equal = [torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True)]
    assert equal == [True] * 6 + [False] * 7
    assert first["hooks"] == ["before", "after"] * 9
    assert all(first["kept"])
    assert_same(second["state"], first["state"], "rank 1 against rank 0")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("reset", "the variance of Adam was changed after it was frozen"),
        ("restore", "the variance of Adam was changed after it was frozen"),
        ("add", "has 5 parameters and had 4 when its variance was frozen"),
        ("untrain", "a parameter had requires_grad set to False after the variance was frozen"),
        ("fail", "deliberate failure"),
    ],
)
def test_meddling_after_the_freeze_is_an_error(workers, how, words):
    for said in workers.run(JOBS + "meddle", how=how, step=5):
        assert words in said


def test_parameters_without_a_variance_stay_and_are_told(workers):
    first, second = workers.run(JOBS + "late", steps=8)
    assert any("2 parameter(s) had no gradient while the variance was learned" in said for said in first["said"])
    assert_same(first["head"][1], first["head"][0], "parameters without a variance")
    assert_same(second["weights"], first["weights"], "rank 1 against rank 0")


def test_a_parameter_without_a_gradient_on_any_process_is_left_alone(workers):
    used = ("both", "both", "both", "none", "first", "none", "both", "none")
    first, second = (run["seen"] for run in workers.run(JOBS + "sometimes", used=used))
    for step in range(3, len(used)):
        now, before = first[step], first[step - 1]
        assert not torch.equal(now["hidden"], before["hidden"])
        for run in (first, second):
            parts = [[run[at][key] for key in ("head", "state", "errors")] for at in (step, step - 1)]
            if used[step] == "none":
                assert_same(parts[0], parts[1], f"what belongs to the head in step {step}")
            else:
                assert not torch.equal(parts[0][0][0], parts[1][0][0])
        assert [int(state["step"]) for state in now["state"]] == [sum(u != "none" for u in used[: step + 1])] * 2
        same = ("hidden", "head", "state")
        assert_same([second[step][key] for key in same], [now[key] for key in same], "rank 1 against rank 0")


def test_the_freeze_may_be_a_share_of_the_run(workers):
    assert workers.run("strategies.one_bit_shares:share_of_the_run", share=0.25, steps=9)[0] == [False] * 3 + [True] * 6


def test_a_share_is_of_each_optimizers_steps_where_the_host_counts_all(workers):
    # Twenty steps are ten of each optimizer.
    told = workers.run("strategies.one_bit_shares:share_of_two_optimizers", share=0.2, max_steps=20)
    assert told[0] == [False] * 2 + [True] * 8


# ------------------------------------------------------------------------------------------- one process


def test_one_process_is_plain_adam(caplog):
    states = []
    for strategy in ("auto", OneBitAdamStrategy(freeze_step=2)):
        with caplog.at_level("INFO"):
            run = fit([], module=AdamNet(), strategy=strategy, max_steps=6)
        states.append({**run.snapshot(), "steps": [step._asdict() for step in run.steps]})
    assert_same(states[1], states[0], "one process against plain Adam")
    assert "there is only one process, so it adds nothing to plain Adam" in caplog.text
    assert strategy.bytes_sent == 0
    assert not strategy.frozen


def test_it_is_found_by_name():
    trainer = Trainer(strategy="one_bit_adam", accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is OneBitAdamStrategy
    assert trainer.strategy.freeze_step == 0.2


@pytest.mark.parametrize("freeze_step", [0, -1, 0.0, 1.0, 2.5, True, "3", None])
def test_a_freeze_that_is_neither_steps_nor_a_share_is_refused(freeze_step):
    with pytest.raises(ValueError, match=re.escape(f"freeze_step={freeze_step!r}")):
        OneBitAdamStrategy(freeze_step=freeze_step)


def test_communication_hooks_are_refused():
    with pytest.raises(ValueError, match="cannot take ddp_comm_hook"):
        OneBitAdamStrategy(ddp_comm_hook=lambda state, bucket: None)


def test_settings_that_are_no_settings_are_refused():
    with pytest.raises(ValueError, match="no setting called freeze_steps"):
        OneBitAdamStrategy(freeze_steps=3)


class Configured(AdamNet):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "configure_optimizers returned SGD"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "does not know amsgrad of Adam"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "does not know maximize of AdamW"),
        (lambda p: torch.optim.Adam([{"params": p, "differentiable": True}]), "does not know differentiable"),
        (lambda p: [], "returned no optimizer"),
        (lambda p: torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "torch.complex64"),
    ],
)
def test_what_it_cannot_drive_is_refused(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        fit([], module=Configured(make), strategy=OneBitAdamStrategy(freeze_step=2), max_steps=2)
    assert "OneBitAdamStrategy" in str(caught.value)


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_fp16_is_refused(precision):
    settings = {"precision": precision}
    if precision == "16-mixed":
        # The host has it on a GPU only, unless it is given the plugin.
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    strategy = OneBitAdamStrategy(freeze_step=2)
    plugins = settings.pop("plugins", [])
    with pytest.raises(ValueError, match="OneBitAdamStrategy does not work with precision='16"):
        fit(plugins, module=AdamNet(), strategy=strategy, max_steps=2, **settings)


def test_a_share_of_a_run_without_end_is_refused():
    with pytest.raises(ValueError, match="is a share of a run that has no end"):
        fit([], module=AdamNet(), strategy=OneBitAdamStrategy(freeze_step=0.5), max_epochs=-1)


class WithoutLength(IterableDataset):
    def __iter__(self):
        return iter([batch(0, 0)])


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_epochs": -1}])
def test_a_share_of_a_loader_without_length_is_refused(settings):
    loader = DataLoader(WithoutLength(), batch_size=None)
    with pytest.raises(ValueError, match="whose loader has no length"):
        fit([], module=AdamNet(), train=loader, strategy=OneBitAdamStrategy(freeze_step=0.5), **settings)
