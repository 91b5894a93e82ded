"""Any causal language model of transformers, trained or fine-tuned with AdamW: the module that the text templates name.

Use it to pretrain a small model from a config, or to fine-tune one from the hub. It configures an optimizer and no
scheduler, so a schedule callback owns the learning rate; the rate stands in one place, ``lr``. Weights are float32
whatever the source says: choose the precision of the computation with ``Trainer(precision=...)``. To take the trained
model elsewhere: ``module.model.save_pretrained(directory)``.

A model that is too large for one GPU, with its gradients and AdamW's two moments, is divided over several:
``Trainer(strategy=ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1))`` shards its blocks by FSDP2.
Each process builds the whole model in main memory first.

Example:
    >>> import torch
    >>> from lightning_stable.recipes.causal_lm import DEFAULT_CONFIG, CausalLM
    >>> module = CausalLM({**DEFAULT_CONFIG, "num_hidden_layers": 1})
    >>> tokens = torch.zeros(1, 8, dtype=torch.int64)
    >>> module(input_ids=tokens, labels=tokens).logits.shape
    torch.Size([1, 8, 256])
"""

import difflib
import math
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from typing_extensions import override

__all__ = ["DEFAULT_CONFIG", "CausalLM"]

DEFAULT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
"""A Llama of 0.9 million parameters over the 256 bytes."""

_IGNORED = -100  # transformers leaves labels of this value out of the loss


class CausalLM(LightningModule):
    """A causal language model from a transformers config, or pretrained from the hub or a directory.

    Batches are dicts of what the model takes: ``input_ids`` and ``labels``, int64 of shape (N, length), optionally
    ``attention_mask``. Labels equal the inputs, with -100 where nothing is to be predicted: the model shifts them.

    Logs ``train_loss`` for each step, ``val_loss`` and ``val_bits_per_token`` (or ``test_...``) for each evaluation:
    the mean over all predicted tokens of the cross-entropy in nats and in bits. Over bytes these are bits per byte.

    Args:
        config: ``model_type`` and the fields of that model's config to change, as in a ``config.json``. Default: a
            Llama of 0.9 million parameters over 256 byte tokens (:data:`DEFAULT_CONFIG`).
        pretrained: Name of a model on the hub, or a directory written by ``save_pretrained``, instead of ``config``. It
            is read again whenever the module is built, also to load a checkpoint.
        lr: Learning rate of AdamW; its peak, when a schedule is in charge.
        weight_decay: Decoupled weight decay of AdamW, on matrices (embeddings too) and not on gains and biases.
        betas: Decay rates of AdamW's first and second moment.
        compile: Compile each block of the model by ``torch.compile``: the first steps take minutes, the others less
            time on a GPU. Names in checkpoints stay.

    Raises:
        ValueError: If both sources are given, the model type has no causal language model, or its config has not one
            of the fields given.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        compile: bool = False,  # noqa: A002  the name that users of torch look for
    ) -> None:
        super().__init__()
        if config is not None and pretrained is not None:
            raise ValueError(
                f"Give config to start from random weights or pretrained to start from trained ones, not both: got "
                f"config={config!r} and pretrained={pretrained!r}."
            )
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.compile_blocks = compile
        self._prepared = False
        model = _from_config(DEFAULT_CONFIG if config is None else config) if pretrained is None else _load(pretrained)
        # Trained weights come in evaluation mode, and either source may ask for half precision.
        self.model = model.float().train()

    @override
    def configure_model(self) -> None:
        """Compile the blocks, if asked, and shard them where the strategy has a mesh of devices for it; once."""
        if self._prepared:
            return
        self._prepared = True
        blocks = _blocks(self.model)
        if self.compile_blocks:
            for block in blocks:
                block.compile()
        if self.device_mesh is not None:
            _shard(self.model, blocks, self.device_mesh)

    @override
    def forward(self, **inputs: Tensor) -> Any:
        """Return the model's output: ``logits`` of shape (N, length, vocabulary), and ``loss`` if there are labels."""
        return self.model(**inputs, use_cache=False)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch's predicted tokens, in nats."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_bits_per_token``."""
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_bits_per_token``."""
        self._evaluate("test", batch)

    @override
    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the trainable parameters in two groups: matrices, which decay, and vectors."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        # A group without parameters (adapters have no vectors) would still be shown by rate monitors.
        return AdamW([group for group in groups if group["params"]], lr=self.lr, betas=self.betas)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        loss: Tensor = self(**batch).loss
        # Weighted by tokens, so that batches with other lengths or padding do not bias the mean.
        tokens = int((batch["labels"][:, 1:] != _IGNORED).sum())
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True, batch_size=tokens)
        self.log(f"{stage}_bits_per_token", loss / math.log(2), sync_dist=True, batch_size=tokens)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated parts of a model: what its lists of modules hold, and not the lists within those."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def _shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Divide the parameters over the processes: those of each block are gathered while it computes."""
    from torch.distributed.fsdp import fully_shard

    if "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"CausalLM shards whole layers: give ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=the "
            f"number of processes), got tensor_parallel_size={mesh['tensor_parallel'].size()}."
        )
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh["data_parallel"])


def _load(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(name)
    return model


def _from_config(fields: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, known = fields.get("model_type"), sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        raise ValueError(
            f"config must name in 'model_type' a causal language model of transformers, got {model_type!r}."
            f"{_near(str(model_type), known)} There are {len(known)}, such as 'llama', 'gpt2', 'gpt_neox' and 'qwen2'."
        )
    config = AutoConfig.for_model(**fields)
    # transformers keeps fields it does not know as plain attributes: a misspelt size would silently be the default.
    unknown = sorted((set(fields) & set(vars(config))) - set(vars(AutoConfig.for_model(model_type))))
    if unknown:
        raise ValueError(
            f"config has {unknown[0]!r}={fields[unknown[0]]!r}, which is no field of a {model_type!r} config."
            f"{_near(unknown[0], sorted(config.to_dict().keys() - set(unknown)))}"
        )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
