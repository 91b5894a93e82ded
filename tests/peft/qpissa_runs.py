"""What the tests of QPiSSA train."""

from typing import Any

from adapter_runs import Net, adapters, fit

NF4 = {"quantize_residual": "nf4"}


def trained(kind: str = "mlp", path: str = "last.ckpt", steps: int = 6, **settings: Any) -> Net:
    """Return a module with bases in 4 bits that was trained, of which a checkpoint was saved."""
    module = Net(kind)
    fit(module, adapters("pissa", kind, **{"init_options": NF4, **settings}), steps=steps).save_checkpoint(path)
    return module
