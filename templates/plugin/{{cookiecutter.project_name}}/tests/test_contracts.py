"""The eleven contracts of lightning-stable over the methods of this package."""

import torch
from lightning_stable.testing import Net, Settings, Stream, contract_suite

from {{ cookiecutter.package_name }}.{{ cookiecutter.method_name }} import {{ cookiecutter.class_name }}
from {{ cookiecutter.package_name }}.methods import METHODS

# Much noise: its effect has to show within a few steps.
SETTINGS = {"eta": 0.1, "gamma": 0.5, "seed": 3}


def noise_of_each_step(run, plugin):
    """The oracle: from what the run recorded, computes in another way what the optimizer should have been given."""
    accumulate = run.trainer.accumulate_grad_batches
    batches = len(Stream())
    steps_of_an_epoch = [range(first, min(first + accumulate, batches)) for first in range(0, batches, accumulate)]
    for number, step in enumerate(run.steps):
        raw = raw_gradients(run, step, steps_of_an_epoch[number % len(steps_of_an_epoch)])
        generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
        for name, gradient in raw.items():
            noise = (0.1 / (1 + number) ** 0.5) ** 0.5 * torch.randn(gradient.shape, generator=generator)
            # bf16-mixed has fewer digits, and batches that differ by rounding.
            tolerance = 2e-2 if run.trainer.precision == "bf16-mixed" else 1e-5
            assert torch.allclose(step.gradients[name], gradient + noise, atol=tolerance), f"step {number}: {name}"


def raw_gradients(run, step, batches):
    """Return the gradients of a step without any plugin, at the weights that the run recorded before it."""
    module = Net()
    module.load_state_dict(step.before, strict=False)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
            loss = module.loss(Stream().batch(batch))
        (loss / run.trainer.accumulate_grad_batches).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


TestContracts = contract_suite(
    {
        "{{ cookiecutter.method_name }}": Settings(
            make=lambda: {{ cookiecutter.class_name }}(**SETTINGS),
            oracle=noise_of_each_step,
            identities=(lambda: {{ cookiecutter.class_name }}(eta=0.0),),
        ),
    },
    methods=METHODS,
)
