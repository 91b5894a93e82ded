"""SAF: what it records, what it reads, and what it refuses; the contracts compare whole runs with a twin."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from lightning_stable.callbacks import _records
from lightning_stable.callbacks import saf as module_of_saf
from lightning_stable.callbacks.saf import SAF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.data.digits import DigitsDataModule
from lightning_stable.functional.trajectory_loss import soften
from lightning_stable.recipes.image_classifier import ImageClassifier
from lightning_stable.testing.harness import QUIET, Net, Run, Stream, assert_same, fit
from lightning_stable.testing.streams import BATCH_SIZE, BATCHES


def short(**settings: Any) -> SAF:
    return SAF(**{"logits": "head", "lam": 2.0, "temperature": 2.0, "start_epoch": 1, "lag_epochs": 1, **settings})


def logits_at(weights: dict[str, Tensor], index: int) -> Tensor:
    """Return the head's output for a batch, in training mode at given weights."""
    module = Net()
    module.load_state_dict({**module.state_dict(), **weights})
    with torch.no_grad():
        return module.train().head(module.body(Stream().batch(index)[0]))


def test_records_are_the_predictions_of_the_epoch_before() -> None:
    saf = short(store_dtype="float32")
    run = fit([saf], max_steps=2 * BATCHES)
    state = saf.state_dict()
    assert state["epochs"].tolist() == [[1] * BATCHES * BATCH_SIZE]
    for index in range(BATCHES):
        expected = soften(logits_at(run.steps[BATCHES + index].before, index), 2.0)
        found = state["log_probs"][0, BATCH_SIZE * index : BATCH_SIZE * (index + 1)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_added_before_the_first_epoch_with_a_record() -> None:
    """Until its start epoch it only records; then the logged term is what was added."""
    plain, run = fit([], max_steps=12), fit([short()], max_steps=12)
    assert_same(run.steps[BATCHES - 1].weights, plain.steps[BATCHES - 1].weights, "weights after the first epoch")
    assert "saf_loss" not in {name for step, entry in run.logged for name in entry if step < BATCHES}
    terms = [entry["saf_loss"] for _, entry in run.logged if "saf_loss" in entry]
    assert len(terms) == BATCHES
    assert all(term > 0 for term in terms)


class OtherSamples(BatchSampler):
    """Its second batch holds other samples in each pass."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(48)), 8, drop_last=False)
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        yield list(range(8))
        yield list(range(8 * self.passes, 8 * self.passes + 8))

    def __len__(self) -> int:
        return 2


def test_a_sample_without_a_record_counts_as_zero() -> None:
    run = fit([short()], train=DataLoader(Stream().dataset, batch_sampler=OtherSamples()), max_epochs=2)
    terms = [entry["saf_loss"] for _, entry in run.logged if "saf_loss" in entry]
    assert terms[0] > 0
    assert terms[1:] == [0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_beside_sam_records_are_of_the_first_pass_and_both_passes_have_the_term(accumulate: int) -> None:
    """With a radius of nearly nothing the two passes are one, so the gradient has the term in the second pass too."""
    settings = {"max_steps": 12 // accumulate, "accumulate_grad_batches": accumulate}
    alone, beside = short(), short()
    expected = fit([alone], **settings)
    found = fit([SAM(rho=1e-30), beside], **settings)
    assert_same(_weights(found), _weights(expected), "weights", tolerance=1e-5)
    assert_same(beside.state_dict(), alone.state_dict(), "records", tolerance=2e-3)


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in run.module.named_parameters()}


def test_top_k_keeps_less_and_does_nearly_the_same() -> None:
    def run(top_k: int | None) -> tuple[SAF, dict[str, Tensor]]:
        torch.manual_seed(0)
        saf = SAF(start_epoch=1, lag_epochs=1, top_k=top_k)
        model = ImageClassifier(width=8, lr=0.01)
        Trainer(**QUIET, max_epochs=3, callbacks=[saf]).fit(model, DigitsDataModule(batch_size=64))
        return saf, model.state_dict()

    whole, weights = run(None)
    part, others = run(9)
    assert part.state_dict()["classes"].dtype == torch.int16
    # Nine classes apart and one lumped are all ten: the order of the sum is the only difference.
    assert_same(others, weights, "nine of ten classes", tolerance=5e-3)
    small, _ = run(2)
    assert small.state_dict()["log_probs"].shape == (1, 1437, 3)
    assert whole.state_dict()["log_probs"].shape == (1, 1437, 10)


def test_says_what_it_needs_and_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit([short()], max_steps=7)
    assert "SAF: the records take 0.0 MiB of main memory in each process (48 samples, 1 epochs" in caplog.text
    monkeypatch.setattr(module_of_saf, "available_memory", lambda: 400)
    with pytest.raises(ValueError, match=r"SAF's records need 0.0 MiB .* Lower lag_epochs, set top_k"):
        fit([short()], max_steps=7)


def test_free_memory_is_known_here() -> None:
    assert _records.available_memory() > 2**20


def test_bytes_needed_are_those_of_the_table() -> None:
    for top_k in (None, 3):
        settings = (2, 50, (4, 10), torch.float16, top_k)
        table = _records.RecordTable(*settings)
        tensors = [table.log_probs, table.epochs, *([table.classes] if top_k else [])]
        assert _records.RecordTable.bytes_needed(*settings) == sum(tensor.nbytes for tensor in tensors)


def test_logits_that_float16_cannot_hold_stay_finite() -> None:
    table = _records.RecordTable(1, 2, (3,), torch.float16)
    table.put(0, [0, 1], soften(torch.tensor([[1e6, 0.0, 0.0], [0.0, 1.0, 2.0]]), 1.0))
    past = table.get(0, [1, 0], torch.device("cpu"))
    assert bool(past.log_probs.isfinite().all())
    assert past.present.tolist() == [True, True]
    assert not table.get(1, [0], torch.device("cpu")).present.item()


class Repeats(BatchSampler):
    """Draws the first samples again at the end of each epoch."""

    def __iter__(self) -> Any:
        yield from super().__iter__()
        yield [0, 1]

    def __len__(self) -> int:
        return super().__len__() + 1


def test_refuses_a_sampler_that_repeats_indices() -> None:
    sampler = Repeats(SequentialSampler(range(48)), 8, drop_last=False)
    with pytest.raises(ValueError, match="SAF: 2 samples of epoch 0 came more than once"):
        fit([short()], train=DataLoader(Stream().dataset, batch_sampler=sampler), max_epochs=2)
    weighted = DataLoader(Stream().dataset, batch_size=8, sampler=WeightedRandomSampler([1.0] * 48, 48))
    with pytest.raises(ValueError, match=r"SAF .*WeightedRandomSampler draws with replacement.* MESA"):
        fit([short()], train=weighted, max_epochs=2)


def test_refuses_a_checkpoint_of_other_data(tmp_path: Any) -> None:
    run = fit([short()], max_epochs=2)
    run.trainer.save_checkpoint(tmp_path / "saf.ckpt")
    with pytest.raises(ValueError, match=r"made its records with samples=48 \(32 here\)"):
        fit([short()], train=Stream(4), max_epochs=3, ckpt_path=str(tmp_path / "saf.ckpt"))
    with pytest.raises(ValueError, match=r"with lag_epochs=1 \(2 here\)"):
        fit([short(start_epoch=2, lag_epochs=2)], max_epochs=3, ckpt_path=str(tmp_path / "saf.ckpt"))
    others = {"temperature": 1.0, "store_dtype": "float32", "top_k": 2}
    with pytest.raises(ValueError, match=r"temperature=2.0 \(1.0 here\), store_dtype=torch.float16 .*, top_k=None \(2"):
        fit([short(**others)], max_epochs=3, ckpt_path=str(tmp_path / "saf.ckpt"))


def test_resumes_in_an_epoch_that_a_plain_loader_begins_again(tmp_path: Any) -> None:
    """The host repeats batches then, which is no fault of the sampler's."""
    loader = DataLoader(Stream().dataset, batch_size=8)
    run = fit([short()], train=loader, max_steps=9)
    run.trainer.save_checkpoint(tmp_path / "saf.ckpt")
    resumed = fit([short()], train=loader, max_steps=20, ckpt_path=str(tmp_path / "saf.ckpt"))
    assert resumed.trainer.global_step == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -1.0}, "lam=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"start_epoch": -1}, "start_epoch=-1"),
        ({"lag_epochs": 0}, "lag_epochs=0"),
        ({"start_epoch": 1, "lag_epochs": 2}, "Set start_epoch to lag_epochs or more"),
        ({"store_dtype": "int8"}, "'int8' is not a floating-point dtype"),
        ({"top_k": 0}, "top_k=0"),
        ({"logits": ""}, "logits=''"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAF(**settings)


def test_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="top_k=3 is not less than the 3 classes of 'head'"):
        fit([short(top_k=3)], max_steps=7)
    with pytest.raises(ValueError, match="'head' put out 16 predictions for a batch of 8 samples"):
        fit([short()], module=_Twice(), max_steps=7)
    with pytest.raises(ValueError, match=r"logits='haed' of SAF is no submodule of Net. Candidates: 'body.0', 'head'"):
        fit([short(logits="haed")], max_steps=7)


class _Twice(Net):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + super().loss(batch)


class AsksForTheLoaders(Net):
    """Sizes a schedule by the number of steps, for which the host prepares the loaders before the fit starts."""

    def configure_optimizers(self) -> Any:
        self.planned = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_a_module_that_asks_for_the_number_of_steps() -> None:
    module = AsksForTheLoaders()
    found, expected = fit([short()], module=module, max_steps=12), fit([short()], max_steps=12)
    assert module.planned == 12
    assert_same(_weights(found), _weights(expected), "weights")
    terms = [[entry.get("saf_loss") for _, entry in run.logged] for run in (found, expected)]
    assert terms[0] == terms[1]
