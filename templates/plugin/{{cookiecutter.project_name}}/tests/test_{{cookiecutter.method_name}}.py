"""What the contracts do not ask: the formula at its ends, and values that cannot be."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from {{ cookiecutter.package_name }}.{{ cookiecutter.method_name }} import {{ cookiecutter.class_name }}

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Wide(BoringModel):
    """A module with many weights and no gradient of its own: what arrives at the optimizer is the noise."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Parameter(torch.zeros(50_000))
        self.noise = []

    def training_step(self, batch, batch_idx):
        return {"loss": (0.0 * self.wide).sum()}

    def on_before_optimizer_step(self, optimizer):  # runs after the callbacks'
        self.noise.append(self.wide.grad.clone())


def noise_of(plugin, steps=2):
    module = Wide()
    Trainer(max_steps=steps, callbacks=[plugin], **QUIET).fit(module)
    return module.noise


def test_the_noise_is_as_wide_as_the_formula_says():
    first, second = noise_of({{ cookiecutter.class_name }}(eta=0.3, gamma=2.0))
    assert float(first.std()) == pytest.approx(math.sqrt(0.3), rel=0.02)
    assert float(second.std()) == pytest.approx(math.sqrt(0.3 / 4), rel=0.02)
    assert float(first.mean()) == pytest.approx(0, abs=0.01)


def test_steps_and_seeds_have_noise_of_their_own():
    first, second = noise_of({{ cookiecutter.class_name }}(eta=1.0, gamma=0.0))
    other, _ = noise_of({{ cookiecutter.class_name }}(eta=1.0, gamma=0.0, seed=1))
    for one, two in ((first, second), (first, other), (second, other)):
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.02


def test_the_variance_falls_to_nothing():
    plugin = {{ cookiecutter.class_name }}(eta=0.01, gamma=0.55)
    assert plugin.deviation(0) == pytest.approx(0.1)
    assert plugin.deviation(99) == pytest.approx(math.sqrt(0.01 / 100**0.55))


@pytest.mark.parametrize("settings", [{"eta": -0.1}, {"eta": math.nan}, {"gamma": math.inf}, {"seed": -1}], ids=str)
def test_a_value_that_cannot_be_is_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be 0 or more.*{value}"):
        {{ cookiecutter.class_name }}(**settings)


def test_sparse_gradients_are_refused():
    class Sparse(BoringModel):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.embedding(torch.zeros(1, dtype=torch.int64)).sum()

    with pytest.raises(ValueError, match="sparse"):
        Trainer(max_steps=1, callbacks=[{{ cookiecutter.class_name }}()], **QUIET).fit(Sparse())
