"""A fit that is refused."""

import copy
import re
from typing import Any

import pytest
import torch
from adapter_runs import Net, fit

from lightning_stable.peft.adapters import Adapters

CONFIG = {"r": 4, "target_modules": ["first"]}


def refused(words: str, callback: Adapters, module: Net | None = None, **settings: Any) -> str:
    """Fit, expect an error that has these words, and that the module is as it was."""
    module = Net() if module is None else module
    before = copy.deepcopy(module.state_dict())
    flags = [parameter.requires_grad for parameter in module.parameters()]
    gradients = [parameter.grad for parameter in module.parameters()]
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        fit(module, callback, **{"steps": 1, **settings})
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if value.device.type != "meta")
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(p.grad is grad for p, grad in zip(module.parameters(), gradients, strict=True))
    return str(caught.value)
