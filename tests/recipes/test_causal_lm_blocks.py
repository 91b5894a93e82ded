"""The causal language model's blocks: divided over two processes by FSDP2, and compiled."""

import pytest
import torch
from recipes.sharded_runs import TINY

from lightning_stable.recipes.causal_lm import CausalLM, _blocks

JOB = "recipes.sharded_runs:train"


def test_divided_over_two_processes_it_trains_as_under_ddp(workers, tmp_path):
    whole = workers.run(JOB, path=str(tmp_path / "ddp.ckpt"), sharded=False, steps=4)
    parts = workers.run(JOB, path=str(tmp_path / "fsdp2.ckpt"), sharded=True, steps=4)
    assert [len(rank["divided"]) for rank in whole] == [0, 0]
    names = [name for name, _ in CausalLM(TINY).named_parameters()]
    assert all(rank["divided"] == names for rank in parts), "every parameter is divided"
    assert all(rank["parts"] == 2 + 1 for rank in parts), "each block by itself, and the rest"
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-4)
    theirs = torch.load(tmp_path / "ddp.ckpt", weights_only=True)["state_dict"]
    # One file with plain tensors, which loads in one process without the strategy.
    ours = CausalLM.load_from_checkpoint(tmp_path / "fsdp2.ckpt", weights_only=True).state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_divided_it_goes_on_from_a_checkpoint(workers, tmp_path):
    run = {"sharded": True, "steps": 6}
    workers.run(JOB, path=str(tmp_path / "half.ckpt"), sharded=True, steps=3)
    workers.run(JOB, path=str(tmp_path / "resumed.ckpt"), ckpt_path=str(tmp_path / "half.ckpt"), **run)
    resumed = torch.load(tmp_path / "resumed.ckpt", weights_only=True)
    assert resumed["global_step"] == 6
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    moved = [not torch.equal(resumed["state_dict"][name], tensor) for name, tensor in half["state_dict"].items()]
    assert all(moved)
    (state, *_) = resumed["optimizer_states"][0]["state"].values()
    assert int(state["step"]) == 6, "AdamW's state went on"


def test_layers_divided_within_themselves_are_refused(monkeypatch):
    class Dimension:
        mesh_dim_names = ("data_parallel", "tensor_parallel")

        def __getitem__(self, name):
            return self

        def size(self):
            return 2

    module = CausalLM(TINY)
    monkeypatch.setattr(module, "_device_mesh", Dimension())
    with pytest.raises(ValueError, match=r"tensor_parallel_size=1.*got tensor_parallel_size=2"):
        module.configure_model()


def test_blocks_are_those_of_any_architecture():
    assert [type(block).__name__ for block in _blocks(CausalLM(TINY).model)] == ["LlamaDecoderLayer"] * 2
    gpt2 = CausalLM({"model_type": "gpt2", "vocab_size": 256, "n_embd": 16, "n_layer": 3, "n_head": 2})
    assert [type(block).__name__ for block in _blocks(gpt2.model)] == ["GPT2Block"] * 3


# torch's own: the compiler looks whether a tensor within the model has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_compute_the_same_and_keep_their_names(monkeypatch):
    """By the eager backend: what is tested is which parts are compiled, not the compiler."""
    plain, compiled = CausalLM(TINY), CausalLM(TINY, compile=True)
    compiled.load_state_dict(plain.state_dict())
    original, seen = torch.nn.Module.compile, []

    def eagerly(module):
        seen.append(type(module).__name__)
        original(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    for _ in range(2):  # the host calls it in each stage
        compiled.configure_model()
        plain.configure_model()
    assert seen == ["LlamaDecoderLayer"] * 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(compiled(input_ids=tokens).logits, plain(input_ids=tokens).logits)
