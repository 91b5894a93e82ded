"""What local updates do at the edges: signals, counters, optimizers in turns, half precision, odd modules."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, Timer
from strategies import local_update_detail_jobs as jobs

from lightning_stable.strategies import CO2Strategy, LocalSGDStrategy
from lightning_stable.strategies._local_update_checks import check_callbacks, check_optimizers
from lightning_stable.strategies._progress import Progress
from lightning_stable.strategies._workers import _parts
from lightning_stable.testing.harness import fit
from lightning_stable.testing.modules import Net
from lightning_stable.testing.streams import Stream

JOBS = "strategies.local_update_detail_jobs"


@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 100}], ids=["in rounds", "in the warm-up"])
@pytest.mark.parametrize("to", [0, 1])
def test_a_signal_to_one_rank_ends_all_at_one_step_with_the_mean_of_their_weights(workers, to, settings):
    first, second = workers.run(f"{JOBS}:stop_by_signal", to=to, **settings)
    # Sent at step 4: heard of by a delayed exchange two rounds later at most, in the warm-up at the next step.
    assert first["step"] == second["step"] <= (6 if settings else 12)
    for name, value in first["saved"].items():
        assert torch.equal(value, first["weights"][name]), name
        assert torch.equal(value, second["weights"][name]), name
    # Code 0 would say that training is over; and the host kills rank 0 if a process that it started ends otherwise.
    assert (first["code"], second["code"]) == (143, None)
    told = f"SIGTERM ended training after step {first['step']}, on all ranks"
    assert any(told in line and "end.ckpt" in line for line in first["said"]), first["said"]


def test_a_signal_says_what_was_not_saved(workers):
    first, _ = workers.run(f"{JOBS}:stop_by_signal", to=0, saving=False)
    assert any("CO2Strategy: sent SIGTERM" in line for line in first["said"]), first["said"]
    assert any("No checkpoint of this step was saved" in line and "save_on_exception" in line for line in first["said"])
    assert first["code"] == 143


def test_checkpoints_within_rounds_are_warned_of_before_the_first_step(workers):
    plans = {
        "every_n_train_steps=2 saves a checkpoint every 2 optimizer steps, and a round has 4": [
            {"every_n_train_steps": 2},
            {"every_n_train_steps": 2, "every_n_epochs": None, "save_top_k": 0, "save_last": True},
        ],
        "val_check_interval=6 with ModelCheckpoint saves a checkpoint every 3 optimizer steps, and a round has 4": [
            {"val_check_interval": 6, "accumulate_grad_batches": 2},
        ],
        "at the end of an epoch, saves a checkpoint every 3 optimizer steps, and a round has 4": [
            {"accumulate_grad_batches": 2},
        ],
        "": [
            {"every_n_train_steps": 4},
            {"every_n_train_steps": 2, "save_top_k": 0},
            {"every_n_epochs": 2, "accumulate_grad_batches": 2},
            {"val_check_interval": 4},
            {},
        ],
    }
    wanted = [words for words, settings in plans.items() for _ in settings]
    given = [plan for settings in plans.values() for plan in settings]
    heard = workers.run(f"{JOBS}:listen_to_plans", plans=given, local_steps=[(0, 2), (3, 4)])[0]
    for plan, words, lines in zip(given, wanted, heard, strict=True):
        assert len(lines) == bool(words), (plan, lines)
        assert words in "".join(lines), (plan, lines)


def test_counters_go_on_from_the_checkpoint_and_the_largest_numbers_have_a_mean(workers):
    first, second = workers.run(f"{JOBS}:keep_buffers")
    assert first["counted"] == second["counted"] == 5
    assert torch.equal(first["mask"], torch.full((2,), torch.finfo(torch.float32).min))
    # Three more batches, of one on rank 0 and of two on rank 1; the end brings them together again.
    assert first["ended"] == second["ended"] == 8


@pytest.mark.parametrize("save_at", [3, 4])
def test_optimizers_in_turns_resume_in_the_same_rounds(workers, save_at):
    for found in workers.run(f"{JOBS}:take_turns", save_at=save_at):
        resumed = found["resumed"]
        for straight, again in zip(found["straight"][-len(resumed) :], resumed, strict=True):
            assert torch.equal(straight, again)
        assert len(resumed) == 10 - save_at


def test_the_warm_up_lasts_to_the_end_of_a_batch_for_every_optimizer(workers):
    first, second = workers.run(f"{JOBS}:warm_up_with_two")
    equal = [all(map(torch.equal, one, other)) for one, other in zip(first, second, strict=True)]
    assert equal == [True, True, True, False, False]


def test_a_final_merge_reads_any_loaders_and_leaves_no_trace(workers):
    first, second = workers.run(f"{JOBS}:merge_with_two_loaders")
    # Six steps and one pass over the six batches of an epoch.
    assert first["calls"] == second["calls"] == 12
    assert torch.equal(first["mean"], second["mean"])
    assert first["momentum"] == 0.1
    assert not first["log"]


@pytest.mark.parametrize("settings", [{"variant": "paper"}, {"variant": "corrected", "comm_dtype": "bfloat16"}])
def test_half_precision_weights_move_and_end_equal(workers, settings):
    first, second = workers.run(f"{JOBS}:train_in_half", **settings)
    assert first["weights"].dtype == torch.bfloat16
    assert torch.equal(first["weights"], second["weights"])
    assert torch.isfinite(first["moved"]).all()
    assert first["moved"].abs().max() > 0.01


def test_parameters_on_one_memory_are_refused_by_name():
    with pytest.raises(ValueError, match=r"CO2Strategy .*'one.weight' and 'other.weight' share their memory"):
        fit([CO2Strategy()], module=jobs.Tied(), train=Stream(), max_steps=1)


def test_the_hosts_averages_are_refused_and_clocks_warned_of():
    for callback in (StochasticWeightAveraging(swa_lrs=0.1), EMAWeightAveraging()):
        with pytest.raises(ValueError, match=f"CO2Strategy does not work with {type(callback).__name__}"):
            check_callbacks("CO2Strategy", [callback])
    with pytest.warns(UserWarning, match="Timer asks rank 0 for the time at every batch"):
        check_callbacks("CO2Strategy", [Timer(duration="00:00:01:00")])


def test_a_measured_round_wants_one_optimizer():
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2)]
    check_optimizers("CO2Strategy", optimizers, timed=False)
    with pytest.raises(ValueError, match="times the steps of one optimizer, and there are 2"):
        check_optimizers("CO2Strategy", optimizers, timed=True)


@pytest.mark.parametrize("kind", ["LBFGS"])
def test_an_optimizer_without_a_mean_is_refused(kind):
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=f"not {kind}"):
        check_optimizers("LocalSGDStrategy", [optimizer], timed=False)


def test_settings_that_are_no_settings_are_refused():
    with pytest.raises(ValueError, match="no setting called momentum"):
        LocalSGDStrategy(workers="node", momentum=0.9)
    with pytest.raises(ValueError, match="final_merge='yes' is neither True nor False"):
        LocalSGDStrategy(final_merge="yes")
    with pytest.raises(ValueError, match="timeout=30 is not a duration"):
        LocalSGDStrategy(timeout=30)


def test_a_checkpoint_of_one_worker_says_nothing_to_one_worker(tmp_path):
    run = fit([LocalSGDStrategy()], module=Net(), max_steps=2)
    run.trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert "LocalSGDStrategy" not in torch.load(tmp_path / "one.ckpt", weights_only=True)


def test_a_run_says_what_became_of_its_rounds():
    progress = Progress(4, warmup_steps=2)
    assert progress.summary() == "all 0 steps were synchronous, since the warm-up has 2."
    for step in range(1, 9):
        progress.count(0)
        if step == 2:
            progress.begin_round()
        if step == 4:
            # A checkpoint in the middle, and one where nothing has moved since.
            progress.come_together(saving=True)
            progress.come_together(saving=True)
    assert progress.round_is_over
    told = "rounds that ended with an exchange: 0, cut short by a checkpoint: 1. Each checkpoint waits for the link"
    assert progress.summary().startswith(told)
    progress.finished_rounds += 1
    progress.come_together(saving=False)
    assert progress.summary() == "rounds that ended with an exchange: 1, cut short by a checkpoint: 1."


def test_means_are_taken_in_small_parts(monkeypatch):
    monkeypatch.setattr("lightning_stable.strategies._workers._NUMBERS_AT_ONCE", 5)
    tensors = [torch.zeros(size) for size in (3, 2, 9, 1, 1)]
    assert [[tensor.numel() for tensor in part] for part in _parts(tensors)] == [[3, 2], [9], [1, 1]]
    assert list(_parts([])) == []
