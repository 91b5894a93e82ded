"""The training order of both datamodules: resumed exactly, split among processes, independent of everything else."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DistributedSampler

from lightning_stable.data._resumable import EpochSampler
from lightning_stable.data.digits import DigitsDataModule
from lightning_stable.data.text import TextDataModule
from lightning_stable.testing.harness import QUIET

EPOCH = 5  # batches of an epoch, for both datamodules below


def make(name, num_workers=0, **settings):
    if name == "digits":
        return DigitsDataModule(batch_size=287, num_workers=num_workers, **settings)
    root = Path(warnings.__file__).parent / "json"
    return TextDataModule(
        str(root), sequence_length=64, batch_size=90, num_workers=num_workers, validation_share=0.2, **settings
    )


def fingerprint(batch):
    """One number a sample, which no two samples share in practice."""
    samples = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    rows = samples.double().flatten(1)
    return (rows @ torch.arange(1.0, rows.shape[1] + 1).double()).tolist()


class Recorder(LightningModule):
    """Remembers what it trained on; its single weight depends on every batch and on their order."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen, self.validated_after, self.fail_at = [], [], fail_at

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("as planned")
        prints = fingerprint(batch)
        self.seen.append((self.trainer.current_epoch, batch_idx, prints))
        return self.weight * sum(prints) * 1e-6

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated_after.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, hook):
        trainer.save_checkpoint(self.folder / f"{hook}-{trainer.global_step}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch_end")


class SaveOnException(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def batches(module):
    return [prints for _, _, prints in module.seen]


def fit(datamodule, length, *, ckpt_path=None, callbacks=(), module=None):
    module = module or Recorder()
    trainer = Trainer(**length, **QUIET, callbacks=list(callbacks))
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("name", "length"), [("digits", {"max_epochs": 3}), ("text", {"max_steps": 3 * EPOCH})])
def test_every_checkpoint_continues_with_the_very_next_batch(tmp_path, name, length):
    whole = fit(make(name), length, callbacks=[SaveEverywhere(tmp_path)])
    assert [epoch for epoch, *_ in whole.seen] == [0] * EPOCH + [1] * EPOCH + [2] * EPOCH
    assert len({str(entry[2]) for entry in whole.seen}) == 3 * EPOCH  # each epoch has another order
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 3 * (EPOCH * 2 + 2)
    for checkpoint in checkpoints:
        step = int(checkpoint.stem.rpartition("-")[2])
        resumed = fit(make(name), length, ckpt_path=checkpoint)
        assert resumed.seen == whole.seen[step:], checkpoint.name
        if step < 3 * EPOCH:
            torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["digits", "text"])
def test_resume_with_workers_that_read_ahead(tmp_path, name):
    length = {"max_epochs": 2}
    whole = fit(make(name, num_workers=2), length, callbacks=[SaveEverywhere(tmp_path)])
    assert whole.seen == fit(make(name), length).seen
    for place in ("batch_end-3", "batch_end-5", "epoch_end-5", "batch_end-7"):
        resumed = fit(make(name, num_workers=2), length, ckpt_path=tmp_path / f"{place}.ckpt")
        assert resumed.seen == whole.seen[int(place[-1]) :], place


def test_a_batch_that_failed_is_seen_again_and_the_epoch_ends_as_it_should(tmp_path):
    length = {"max_epochs": 2}
    whole = fit(make("digits"), length)
    failing = Recorder(fail_at=3)
    with pytest.raises(RuntimeError, match="as planned"):
        fit(make("digits"), length, callbacks=[SaveOnException(tmp_path / "failed.ckpt")], module=failing)
    resumed = fit(make("digits"), length, ckpt_path=tmp_path / "failed.ckpt")
    assert resumed.seen == whole.seen[3:]
    assert resumed.validated_after == whole.validated_after == [EPOCH, 2 * EPOCH]


@pytest.mark.parametrize("steps", [2, EPOCH, EPOCH + 3])
def test_a_fit_cut_by_max_steps_goes_on_where_it_was_cut(tmp_path, steps):
    whole = fit(make("digits"), {"max_steps": 3 * EPOCH})
    trainer = Trainer(max_steps=steps, **QUIET)
    trainer.fit(Recorder(), datamodule=make("digits"))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = fit(make("digits", num_workers=2), {"max_steps": 3 * EPOCH}, ckpt_path=tmp_path / "cut.ckpt")
    assert batches(resumed) == batches(whole)[steps:]
    assert torch.equal(resumed.weight, whole.weight)


def test_the_state_is_ints_and_loads_safely(tmp_path):
    fit(make("text"), {"max_steps": 2}, callbacks=[SaveEverywhere(tmp_path)])
    checkpoint = torch.load(tmp_path / "batch_end-2.ckpt", weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["global_batch_size"] == 90
    assert all(type(value) is int for value in state.values())


def test_other_data_under_a_checkpoint_is_said():
    datamodule, other = make("digits"), make("digits", seed=1)
    state = datamodule.train_dataloader().state_dict()
    with pytest.warns(UserWarning, match=r"not the one of the checkpoint \(seed 0 -> 1\)"):
        other.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_disjoint_and_together_one_large_batch(world_size):
    data = range(101)
    parts = [EpochSampler(data, seed=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    single = EpochSampler(data, seed=7)
    for sampler in [*parts, single]:
        assert isinstance(sampler, DistributedSampler)  # so that Lightning leaves it in place
        sampler.set_epoch(4)
    orders = [list(sampler) for sampler in parts]
    assert {len(order) for order in orders} == {len(parts[0])} == {101 // world_size}
    assert len({index for order in orders for index in order}) == world_size * (101 // world_size)
    together = [index for group in zip(*orders, strict=True) for index in group]
    assert together == list(single)[: len(together)]


def test_neighbouring_seeds_and_epochs_have_their_own_orders():
    def order(seed, epoch):
        sampler = EpochSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == order(2, 3)


class WriteSeen(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save([entry[2] for entry in pl_module.seen], self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_processes_see_disjoint_halves(tmp_path, use_distributed_sampler):
    trainer = Trainer(
        max_epochs=2,
        strategy="ddp_fork",
        devices=2,
        callbacks=[WriteSeen(tmp_path)],
        limit_val_batches=0,
        **{**QUIET, "use_distributed_sampler": use_distributed_sampler},
    )
    trainer.fit(Recorder(), datamodule=DigitsDataModule(batch_size=140))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    single = fit(DigitsDataModule(batch_size=280), {"max_epochs": 2})
    assert len(first) == len(second) == len(single.seen) == 10
    for mine, other, entry in zip(first, second, single.seen, strict=True):
        assert sorted(mine + other) == sorted(entry[2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_the_global_generator_alone(num_workers):
    datamodule = make("digits", num_workers)
    before = torch.get_rng_state()
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_overfitting_gives_the_same_batches_in_each_epoch():
    module = fit(make("digits"), {"max_epochs": 2, "overfit_batches": 2})
    assert [entry[2] for entry in module.seen[:2]] == [entry[2] for entry in module.seen[2:]]
    assert len(module.seen) == 4


class ReadInBetween(Callback):
    """Reads the training loader while it is being read."""

    def __init__(self):
        self.lengths = []

    def read(self, trainer):
        self.lengths.append(len(list(trainer.train_dataloader)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.read(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.read(trainer)


def test_other_readers_get_whole_passes_and_disturb_nothing(tmp_path):
    whole = fit(make("text"), {"max_epochs": 2}, callbacks=[SaveEverywhere(tmp_path)])
    reader = ReadInBetween()
    resumed = fit(make("text"), {"max_epochs": 2}, callbacks=[reader], ckpt_path=tmp_path / "batch_end-2.ckpt")
    assert resumed.seen == whole.seen[2:]
    assert set(reader.lengths) == {EPOCH}


def test_a_second_fit_goes_on_with_new_epochs():
    whole = fit(make("digits"), {"max_epochs": 4})
    module, datamodule = Recorder(), make("digits")
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, datamodule=datamodule)
    assert len(list(datamodule.train_dataloader())) == EPOCH
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=datamodule)
    assert module.seen == whole.seen


def test_partial_epochs_each_begin_a_new_order(tmp_path):
    whole = fit(make("digits"), {"max_epochs": 3})
    limit = {"max_epochs": 3, "limit_train_batches": 2}
    limited = fit(make("digits", num_workers=2), limit, callbacks=[SaveEverywhere(tmp_path)])
    assert limited.seen == [entry for entry in whole.seen if entry[1] < 2]
    resumed = fit(make("digits"), limit, ckpt_path=tmp_path / "batch_end-3.ckpt")
    assert resumed.seen == limited.seen[3:]


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(
        ValueError, match=r"batch_size=2000 on 1 process\(es\) needs 2000 training samples.*there are 1437"
    ):
        DigitsDataModule(batch_size=2000).train_dataloader()


@pytest.mark.parametrize("datamodule", [DigitsDataModule, TextDataModule])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more samples, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 .* or more, got -1"),
        ({"validation_share": 1.0}, "validation_share must lie between 0 and 1, both excluded, got 1.0"),
        ({"batch_size": "32"}, "batch_size must be 1 or more samples, got '32'"),
        ({"batch_size": 2.5}, "batch_size must be 1 or more samples, got 2.5"),
        ({"batch_size": True}, "batch_size must be 1 or more samples, got True"),
        ({"num_workers": None}, "num_workers must be 0 .* or more, got None"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"validation_share": "0.2"}, "validation_share must lie between 0 and 1, both excluded, got '0.2'"),
    ],
)
def test_bad_settings_are_named(datamodule, settings, message):
    with pytest.raises(ValueError, match=f"{datamodule.__name__}: {message}"):
        datamodule(**settings)
