"""Resumes, company and strategies that adapters refuse."""

import pytest
import torch
from adapter_refusals import CONFIG, refused
from adapter_runs import Net, adapters, fit, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_stable.peft import load_adapters, merge_adapters
from lightning_stable.peft.adapters import Adapters


def test_a_resume_with_another_config_or_base_tells_the_differences() -> None:
    trainer = fit(Net(), adapters("pissa"), steps=2)
    trainer.save_checkpoint("two.ckpt")
    resume = {"ckpt_path": "two.ckpt"}
    told = refused("others than those asked for", adapters("olora", config={"r": 2, "lora_alpha": 4}), **resume)
    assert "init is 'olora' here and 'pissa' in the checkpoint" in told
    assert "r is 2" not in told  # another kind differs in all else, too
    told = refused("others than those asked for", adapters("pissa", config={"r": 2, "lora_alpha": 4}), **resume)
    assert "r is 2 here and 4 in the checkpoint" in told
    assert "lora_alpha is 4 here and 8 in the checkpoint" in told
    refused("trainable is ['head.*'] here and [] in", adapters("pissa", trainable=["head.*"]), **resume)

    other = Net()
    other.model.second.weight.data[3, 3] += 1e-3
    assert "layer 'second'" in refused("is not the one that the checkpoint's", adapters("pissa"), other, **resume)
    with pytest.raises(ValueError, match="precision that has lost digits"):
        load_adapters(Net().bfloat16(), "two.ckpt")

    fit(plain := Net(), steps=2).save_checkpoint("plain.ckpt")
    refused("the checkpoint has no adapters", adapters("pissa"), plain, ckpt_path="plain.ckpt")
    with pytest.raises(ValueError, match="has no adapters"):
        load_adapters(Net(), "plain.ckpt")


def test_a_module_with_other_adapters_is_refused() -> None:
    import peft

    module = Net()
    fit(module, adapters("pissa"), steps=2).save_checkpoint("two.ckpt")
    with pytest.raises(ValueError, match=r"the adapters of this module are others.*r is 2 here and 4 in the module"):
        fit(module, adapters("pissa", config={"r": 2}), steps=1)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapters(module, "two.ckpt")
    started_otherwise = Net()
    fit(started_otherwise, adapters("pissa", config={"use_rslora": False}, seed=0), steps=1)
    with torch.no_grad():
        torch.manual_seed(0)
        trainer = fit(Net(), adapters("lora_ga"), steps=1, data=loader(shuffle=False))
    trainer.save_checkpoint("one.ckpt")
    second = Net()
    fit(second, adapters("lora_ga"), steps=1, seed=77)
    with pytest.raises(ValueError, match="another start than the checkpoint's"):
        Trainer(callbacks=[adapters("lora_ga")], logger=False, accelerator="cpu").test(
            second, loader(shuffle=False), ckpt_path="one.ckpt", verbose=False
        )
    foreign = Net()
    peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), foreign.model)
    with pytest.raises(ValueError, match="has adapters of peft already"):
        fit(foreign, adapters("pissa"), steps=1)
    with pytest.raises(ValueError, match="no adapters that Adapters made"):
        merge_adapters(Net())


def test_a_model_that_is_built_anew_in_each_run_is_refused_in_the_second() -> None:
    class Rebuilds(Net):
        def configure_model(self) -> None:
            self.model = Net().model

    module, callback = Rebuilds(), adapters("default")
    trainer = fit(module, callback, steps=1)
    with pytest.raises(ValueError, match="had adapters and has none now"):
        trainer.test(module, loader(shuffle=False), verbose=False)


def test_company_that_copies_the_module_before_is_refused() -> None:
    with pytest.raises(ValueError, match="Adapters and StochasticWeightAveraging"):
        fit(Net(), adapters("default"), StochasticWeightAveraging(swa_lrs=0.1), steps=1)


def test_strategies_without_whole_weights_or_with_forked_processes_are_refused() -> None:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for strategy, words in ((ModelParallelStrategy(), "whole weights"), (DDPStrategy(), "spawned or forked")):
        strategy._launcher = _MultiProcessingLauncher(strategy, start_method="fork")
        trainer._accelerator_connector.strategy = strategy
        with pytest.raises(ValueError, match=words):
            adapters("default").setup(trainer, Net(), "fit")


def test_names_that_match_nothing_beside_others_are_refused() -> None:
    told = refused("target_modules has 'q_proj'", Adapters({"r": 4, "target_modules": ["first", "q_proj"]}))
    assert "first (Linear)" in told
    refused("relative to model='model': give 'first'", Adapters({"r": 4, "target_modules": ["model.first"]}))
    refused("relative to model='model': give 'first'", Adapters({"r": 4, "target_modules": "model.first"}))
    refused("model='model.first' is a single layer (Linear)", Adapters(CONFIG, model="model.first"))
    refused("trainable_token_indices, which is not offered", Adapters({**CONFIG, "trainable_token_indices": [1]}))
