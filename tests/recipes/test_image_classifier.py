import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_stable.data.digits import DigitsDataModule
from lightning_stable.recipes.image_classifier import ImageClassifier
from lightning_stable.testing.harness import QUIET


@pytest.mark.parametrize("architecture", ["conv", "mlp"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 5), (1, 1)])
def test_logits_have_a_row_an_image_and_a_column_a_class(architecture, channels, size):
    classifier = ImageClassifier(channels, size, num_classes=4, width=6, architecture=architecture)
    assert classifier(torch.rand(3, channels, size, size)).shape == (3, 4)


@pytest.mark.parametrize(("architecture", "reached"), [("conv", 0.9), ("mlp", 0.8)])
def test_two_epochs_learn_the_digits(architecture, reached):
    seed_everything(0)
    classifier = ImageClassifier(width=16, architecture=architecture, lr=1e-2)
    datamodule = DigitsDataModule(batch_size=64)
    trainer = Trainer(max_epochs=2, **QUIET)
    (before,) = trainer.validate(classifier, datamodule, verbose=False)
    trainer.fit(classifier, datamodule)
    after = trainer.callback_metrics
    assert set(after) == {"train_loss", "val_loss", "val_accuracy"}
    assert after["val_loss"] < before["val_loss"] / 2
    assert after["val_accuracy"] > reached
    predictions = torch.cat(trainer.predict(classifier, datamodule)).argmax(dim=-1)
    labels = torch.cat([labels for _, labels in datamodule.predict_dataloader()])
    share = (predictions == labels).double().mean()
    assert share == pytest.approx(float(after["val_accuracy"]))
    (tested,) = trainer.test(classifier, datamodule, verbose=False)
    assert tested["test_accuracy"] == pytest.approx(float(share))
    assert tested["test_loss"] == pytest.approx(float(after["val_loss"]), rel=1e-5)


def test_images_without_labels_are_predicted_too():
    classifier = ImageClassifier(width=4)
    images = torch.rand(2, 1, 8, 8)
    probabilities = classifier.predict_step(images, 0)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2))
    torch.testing.assert_close(probabilities, classifier.predict_step([images, torch.zeros(2)], 0))


def test_a_checkpoint_loads_safely_and_builds_the_module_again(tmp_path):
    classifier = ImageClassifier(width=5, architecture="mlp", lr=0.5)
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(classifier, DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hyperparameters = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert hyperparameters["lr"] == 0.5
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.hparams == classifier.hparams
    assert torch.equal(again.network[1].weight, classifier.network[1].weight)


def test_frozen_parameters_stay_out_of_the_optimizer():
    classifier = ImageClassifier(width=4, architecture="mlp", lr=0.25, weight_decay=0.125)
    classifier.network[1].requires_grad_(False)
    (group,) = classifier.configure_optimizers().param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
    assert len(group["params"]) == 4


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path):
    def run(steps, ckpt_path=None):
        seed_everything(1)
        classifier = ImageClassifier(width=4)
        trainer = Trainer(max_steps=steps, **QUIET)
        trainer.fit(classifier, DigitsDataModule(batch_size=400), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return classifier.state_dict()

    run(4)  # three batches an epoch, so this is in the middle of the second
    whole, resumed = run(8), run(8, tmp_path / "4.ckpt")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "transformer"}, "architecture must be one of conv, mlp, got 'transformer'"),
        ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"width": 0}, "width must be 1 or more, got 0"),
        ({"image_size": -1}, "image_size must be 1 or more, got -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**settings)


def test_weights_of_another_run_are_a_start_and_no_setting_of_this_one(tmp_path):
    def fit(**settings):
        module = ImageClassifier(width=4, **settings)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
        trainer.fit(module, DigitsDataModule(batch_size=400))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return before, module.state_dict()

    _, first = fit()
    start, second = fit(pretrained=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(start[name], tensor) for name, tensor in first.items())
    (tmp_path / "last.ckpt").rename(tmp_path / "moved.ckpt")  # what this run began with is gone
    again = ImageClassifier.load_from_checkpoint(tmp_path / "moved.ckpt", weights_only=True).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())
    with pytest.raises(ValueError, match=r"no weights for 'network.0.weight'.*8, 1, 3, 3.*4, 1, 3, 3"):
        ImageClassifier(width=8, pretrained=str(tmp_path / "moved.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
        ImageClassifier(pretrained=str(tmp_path / "gone.ckpt"))
