import torch

from lightning_stable.data.digits import DigitsDataModule


def everything(datamodule):
    batches = list(datamodule.val_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_batches_are_images_in_the_unit_range_and_labels():
    datamodule = DigitsDataModule(batch_size=64)
    batches = list(datamodule.train_dataloader())
    assert len(batches) == len(datamodule.train_dataloader()) == 22
    for images, labels in batches:
        assert images.shape == (64, *datamodule.image_shape)
        assert images.dtype is torch.float32
        assert labels.shape == (64,)
        assert labels.dtype is torch.int64
    images = torch.cat([images for images, _ in batches])
    assert images.min() == 0
    assert images.max() == 1


def test_the_split_is_fixed_stratified_and_follows_the_seed():
    images, labels = everything(DigitsDataModule())
    again, _ = everything(DigitsDataModule(batch_size=7))
    other, _ = everything(DigitsDataModule(seed=1))
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert len(labels) == 360
    assert labels.bincount(minlength=10).min() >= 34  # a fifth of 174 to 183 images a class
    assert labels.bincount(minlength=10).max() <= 37


def test_training_and_validation_share_no_image():
    datamodule = DigitsDataModule(batch_size=1)
    train = torch.cat([images for images, _ in datamodule.train_dataloader()])
    held_out, _ = everything(datamodule)
    assert len(train) + len(held_out) == 1797
    distances = torch.cdist(train.flatten(1), held_out.flatten(1))
    assert distances.min() > 0


def test_there_is_no_third_split():
    datamodule = DigitsDataModule()
    datamodule.setup("test")
    for loader in (datamodule.test_dataloader(), datamodule.predict_dataloader()):
        first, expected = next(iter(loader)), next(iter(datamodule.val_dataloader()))
        assert torch.equal(first[0], expected[0])
