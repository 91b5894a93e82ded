"""Training on a stream of tasks: in order, followed by the datamodule, resumed exactly, split among processes."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from lightning_stable.cli.main import main
from lightning_stable.data.task_stream import TaskStream
from lightning_stable.recipes.image_classifier import ImageClassifier
from lightning_stable.testing.harness import QUIET

SETTINGS = {"tasks": 3, "batch_size": 120, "epochs_per_task": 2}
WHOLE = [0] * 8 + [1] * 6 + [2] * 6  # the task of each batch: 4 batches an epoch with four classes, 3 with three


def make(**settings):
    return TaskStream(**{**SETTINGS, **settings})


class Recorder(LightningModule):
    """A linear classifier that remembers its samples and the task that was said in each hook."""

    def __init__(self, classes=10, fail_at=None):
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(64, classes)
        self.seen, self.tasks, self.fail_at = [], [], fail_at

    def on_train_batch_start(self, batch, batch_idx):
        self.tasks.append([self.trainer.datamodule.current_task])

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("as planned")
        x, y = batch
        self.tasks[-1].append(self.trainer.datamodule.current_task)
        prints = (x.flatten(1).double() @ torch.arange(1.0, 65.0).double()).tolist()
        self.seen.append((sorted(set(y.tolist())), prints))
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.tasks[-1].append(self.trainer.datamodule.current_task)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"batch-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.folder / "failed.ckpt")


def quiet(callbacks=(), **settings):
    return Trainer(**{**QUIET, "max_epochs": 1, **settings}, callbacks=list(callbacks))


def fit(stream, *, module=None, trainer=None, ckpt_path=None, callbacks=(), **settings):
    module = module or Recorder(stream.num_classes)
    trainer = trainer or quiet(callbacks, **settings)
    trainer.fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return module


def tasks(module):
    """The task of each batch, on which all hooks agree."""
    assert all(len(set(said)) == 1 for said in module.tasks)
    return [said[0] for said in module.tasks]


def weights(module):
    return module.layer.weight.detach().clone()


def orders(stream, epoch=0):
    loader = stream.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader.sampler)


# ----------------------------------------------------------------------------- one pass


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_pass_trains_on_the_tasks_in_order_and_the_datamodule_follows(num_workers):
    stream = make(num_workers=num_workers)
    assert stream.task_steps == [8, 14]
    assert len(stream.train_dataloader()) == len(WHOLE)
    module = fit(stream)
    assert tasks(module) == WHOLE
    for task, (classes, _) in zip(tasks(module), module.seen, strict=True):
        assert set(classes) <= set(stream.task_classes[task])


def test_each_epoch_of_a_task_is_a_new_order_of_its_samples():
    stream = make(batch_size=10, epochs_per_task=3)
    seen = set()
    for indices in torch.tensor(orders(stream)).tensor_split([10 * step for step in stream.task_steps]):
        first, second, third = indices.view(3, -1)
        assert first.tolist() != second.tolist() != third.tolist()
        for epoch in (first, second, third):
            assert len(set(epoch.tolist())) == len(epoch)
        assert not seen & set(indices.tolist())
        seen |= set(indices.tolist())


def test_the_order_of_a_task_depends_on_seed_task_and_epoch_only():
    whole = orders(make())
    third = make()
    third.start_task(2)
    assert orders(third) == whole[14 * 120 :]
    assert orders(make(num_workers=2)) == whole
    assert orders(make(seed=1)) != whole
    assert orders(make(epochs_per_task=1), epoch=1)[: 4 * 120] == whole[4 * 120 : 8 * 120]


def test_further_epochs_of_the_trainer_give_the_stream_again_in_new_orders():
    stream = make()
    module = fit(stream, max_epochs=2)
    assert tasks(module) == 2 * WHOLE
    assert len({str(prints) for _, prints in module.seen}) == 2 * len(WHOLE)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    stream = make(scenario="blurry")
    for loader in (stream.train_dataloader(), stream.val_dataloader(), *stream.task_dataloaders()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_and_overfitting_stay_within_the_stream():
    assert tasks(fit(make(), limit_train_batches=10)) == [0] * 8 + [1] * 2
    assert tasks(fit(make(), fast_dev_run=True)) == [0]
    module = fit(make(), overfit_batches=2, max_epochs=2)
    assert tasks(module) == [0] * 4
    assert module.seen[:2] == module.seen[2:]


# ----------------------------------------------------------------------------- one fit a task


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_fit_for_each_task_is_the_same_as_one_fit(same_trainer):
    whole = fit(make())
    stream, module, trainer = make(), Recorder(), None
    for task in range(3):
        stream.start_task(task)
        assert stream.current_task == task
        if trainer is None or not same_trainer:
            trainer = quiet()
        else:
            trainer.fit_loop.max_epochs += 1
        fit(stream, module=module, trainer=trainer)
    assert module.seen == whole.seen
    assert tasks(module) == tasks(whole)
    assert torch.equal(weights(module), weights(whole))
    stream.start_task(None)
    assert fit(stream).seen == whole.seen


def test_a_fit_without_start_task_goes_on_with_new_epochs():
    whole = fit(make(), max_epochs=2)
    stream, module, trainer = make(), Recorder(), quiet()
    fit(stream, module=module, trainer=trainer)
    trainer.fit_loop.max_epochs = 2
    fit(stream, module=module, trainer=trainer)
    assert module.seen == whole.seen
    assert tasks(module) == tasks(whole)


def test_before_its_first_batch_a_fit_is_in_its_first_task():
    class Look(Callback):
        said = ()

        def on_train_start(self, trainer, pl_module):
            self.said += (trainer.datamodule.current_task,)

        def on_train_end(self, trainer, pl_module):
            self.said += (trainer.datamodule.current_task,)

    look, stream = Look(), make()
    trainer = quiet([look])
    fit(stream, trainer=trainer)
    trainer.fit_loop.max_epochs = 2
    fit(stream, trainer=trainer)
    assert look.said == (0, 2, 0, 2)


def test_start_task_within_a_fit_waits_for_the_next():
    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.datamodule.start_task(1)

    stream = make()
    stream.start_task(0)
    assert set(tasks(fit(stream, callbacks=[Ask()]))) == {0}
    assert set(tasks(fit(stream))) == {1}


# ----------------------------------------------------------------------------- resume


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_very_next_batch(tmp_path, num_workers):
    whole = fit(make(), callbacks=[Save(tmp_path)], max_epochs=2)
    for place in ("batch-2", "batch-8", "batch-13", "batch-20", "epoch-20", "batch-23", "batch-37"):
        resumed = fit(make(num_workers=num_workers), ckpt_path=tmp_path / f"{place}.ckpt", max_epochs=2)
        step = int(place.partition("-")[2])
        assert resumed.seen == whole.seen[step:], place
        assert tasks(resumed) == tasks(whole)[step:], place
        assert torch.equal(weights(resumed), weights(whole)), place


def test_a_batch_that_failed_is_seen_again_in_its_task(tmp_path):
    whole = fit(make())
    with pytest.raises(RuntimeError, match="as planned"):
        fit(make(), module=Recorder(fail_at=5), callbacks=[Save(tmp_path)])
    resumed = fit(make(), ckpt_path=tmp_path / "failed.ckpt")
    assert resumed.seen == whole.seen[5:]
    assert tasks(resumed) == tasks(whole)[5:]


@pytest.mark.parametrize("asked", [True, False])
def test_a_fit_of_one_task_resumes_in_it(tmp_path, asked):
    """With the Trainer's count of earlier tasks, and whether or not the task is said again."""
    stream, trainer = make(), quiet([Save(tmp_path)])
    stream.start_task(0)
    fit(stream, trainer=trainer)
    stream.start_task(1)
    trainer.fit_loop.max_epochs = 2
    whole = fit(stream, trainer=trainer)
    for place in ("batch-9", "batch-12"):
        again = make()
        if asked:
            again.start_task(1)
        resumed = fit(again, ckpt_path=tmp_path / f"{place}.ckpt", max_epochs=2)
        assert resumed.seen == whole.seen[int(place.partition("-")[2]) - 8 :]
        assert set(tasks(resumed)) == {1}
        assert torch.equal(weights(resumed), weights(whole))


def test_the_next_task_begins_from_a_checkpoint_of_the_last(tmp_path):
    whole = fit(make())
    stream = make()
    stream.start_task(0)
    fit(stream, callbacks=[Save(tmp_path)])
    again = make()
    again.start_task(1)
    resumed = fit(again, ckpt_path=tmp_path / "epoch-8.ckpt", max_epochs=2)
    assert resumed.seen == whole.seen[8:14]
    fewer = make(tasks=2)
    stream.start_task(2)
    fit(stream, callbacks=[Save(tmp_path)])
    with pytest.raises(ValueError, match=r"the checkpoint was in task 2 of a stream, this one has the tasks 0\.\.1"):
        fit(fewer, ckpt_path=tmp_path / "batch-2.ckpt")


def test_the_state_is_plain_and_another_stream_is_said(tmp_path):
    fit(make(), callbacks=[Save(tmp_path)])
    checkpoint = torch.load(tmp_path / "batch-2.ckpt", weights_only=True)
    assert checkpoint["TaskStream"] == {"task": -1, "begun": 0, "batches": 2}
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["epochs_per_task"] == 2
    assert state["sources"]["scenario"] == "class"
    other = make(scenario="blurry").train_dataloader()
    with pytest.warns(UserWarning, match=r"not the one of the checkpoint \(scenario class -> blurry\)"):
        other.load_state_dict(state)


# ----------------------------------------------------------------------------- processes


def two_process_job(settings, use_distributed_sampler=False, ckpt_path=None, save=None):
    stream = TaskStream(**settings)
    trainer = quiet(
        [Save(save)] if save else [],
        strategy="ddp",
        devices=2,
        use_distributed_sampler=use_distributed_sampler,
        limit_val_batches=0,
    )
    module = fit(stream, trainer=trainer, ckpt_path=ckpt_path)
    return {"seen": module.seen, "tasks": tasks(module), "weights": weights(module), "steps": stream.task_steps}


@pytest.mark.parametrize(
    ("scenario", "use_distributed_sampler"), [("class", True), ("blurry", False), ("domain", False)]
)
def test_two_processes_are_one_with_twice_the_batch(workers, scenario, use_distributed_sampler):
    settings = {"tasks": 3, "epochs_per_task": 2, "scenario": scenario, "disjoint_share": 0.3, "blurry_share": 0.3}
    job = "test_task_stream:two_process_job"
    first, second = workers.run(
        job, settings={**settings, "batch_size": 40}, use_distributed_sampler=use_distributed_sampler
    )
    stream = TaskStream(**settings, batch_size=80)
    single = fit(stream)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], weights(single))
    assert first["tasks"] == second["tasks"] == tasks(single)
    assert first["steps"] == stream.task_steps
    for (_, mine), (_, other), (_, both) in zip(first["seen"], second["seen"], single.seen, strict=True):
        assert sorted(mine + other) == sorted(both)


def test_two_processes_resume_in_the_middle_of_a_task(workers, tmp_path):
    settings = {"tasks": 3, "epochs_per_task": 2, "batch_size": 60}
    job = "test_task_stream:two_process_job"
    whole = workers.run(job, settings=settings, save=tmp_path)
    resumed = workers.run(job, settings=settings, ckpt_path=tmp_path / "batch-8.ckpt")
    for before, after in zip(whole, resumed, strict=True):
        assert after["seen"] == before["seen"][8:]
        assert after["tasks"] == before["tasks"][8:]
        assert torch.equal(after["weights"], before["weights"])


# ----------------------------------------------------------------------------- the command


def test_the_command_trains_on_a_stream_and_its_saved_config_builds_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "lightning_stable.recipes.image_classifier.ImageClassifier", "--trainer.max_epochs", "1"]
    arguments += ["--data", "lightning_stable.data.task_stream.TaskStream", "--data.tasks", "2"]
    arguments += ["--data.dataset", "lightning_stable.data.digits.read_digits", "--data.class_order"]
    arguments += ["[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *arguments, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.fast_dev_run", "true"]) == 0


def test_the_page_in_the_documents_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[2] / "docs" / "task_stream.md"
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        exec(compile(code, str(page), "exec"), {"__name__": "page"})  # noqa: S102  the page's own code
    printed = [line.rpartition(" ") for line in capsys.readouterr().out.splitlines() if line.startswith("classes ")]
    scores = [float(score) for _, _, score in printed]
    assert len(scores) == 5
    assert scores[-1] > 0.7 > 0.3 > max(scores[:3])
    for config in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        Path("mine.yaml").write_text(config, encoding="utf-8")
        model = ["--model", "lightning_stable.recipes.image_classifier.ImageClassifier"]
        assert main(["fit", *model, "--config", "mine.yaml", "--print_config"]) == 0


def test_validation_is_over_all_tasks():
    stream = make(class_order=list(range(10)))
    labels = torch.cat([y for _, y in stream.val_dataloader()])
    assert len(labels) == sum(len(loader.dataset) for loader in stream.task_dataloaders())
    assert labels.unique().tolist() == list(range(10))
    classifier = ImageClassifier(num_classes=stream.num_classes, architecture="mlp")
    trainer = quiet()
    trainer.fit(classifier, datamodule=stream)
    assert 0 < float(trainer.callback_metrics["val_accuracy"]) < 1
    assert trainer.test(classifier, datamodule=stream, verbose=False)
