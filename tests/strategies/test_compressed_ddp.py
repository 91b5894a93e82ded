"""CompressedDDPStrategy in real gloo processes, against a NumPy twin."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from oracles.compressed_ddp_twin import SIZES, Setting, initial_weights, random_batches, simulate
from strategies.compressed_jobs import BATCHES, Net
from strategies.compressed_settings import ALL, WITH_MEMORY
from strategies.groups import Group
from strategies.local_update_jobs import Batches

from lightning_stable.strategies import CompressedDDPStrategy
from lightning_stable.testing.harness import QUIET, assert_same
from lightning_stable.testing.workers import Pair

STEPS = 8


JOB = "strategies.compressed_jobs:train"


# Each parameter in a bucket of its own.
SMALL_BUCKETS = 1e-5


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with Group(3) as group:
        yield group


def settings(setting: Setting, **more: Any) -> dict[str, Any]:
    """Return the strategy's arguments for the twin's setting."""
    found: dict[str, Any] = {"compressor": setting.compressor, "warmup_steps": setting.warmup}
    if setting.error:
        found["error"] = setting.error
    if setting.compressor == "topk":
        found["ratio"] = setting.ratio
    if setting.compressor == "powersgd":
        found["rank"] = setting.rank
    if setting.error == "econtrol":
        found["eta"] = setting.eta
    return {**found, **more}


def make(compressor: str, error: str, **more: Any) -> Setting:
    return Setting(compressor, error, **({"warmup": 2} if compressor == "powersgd" else {}), **more)


def check(
    answers: list[dict[str, Any]],
    setting: Setting,
    tolerance: float = 1e-12,
    steps: int = STEPS,
    batches: int = BATCHES,
) -> None:
    """The ranks agree in every bit, and with the twin at every step."""
    for other in answers[1:]:
        assert_same(other["weights"], answers[0]["weights"], "another rank against rank 0")
    if setting.compressor == "powersgd":
        # torch adds 1e-8 where the twin divides by a length.
        setting, tolerance = replace(setting, buckets=answers[0]["buckets"]), max(tolerance, 1e-6)
    twin = simulate(setting, random_batches(len(answers), batches), steps)
    found = [{name: tensor.double() for name, tensor in weights.items()} for weights in answers[0]["weights"]]
    expected = [{name: torch.tensor(value) for name, value in weights.items()} for weights in twin]
    assert_same(found, expected, f"{setting.compressor} with {setting.error}", tolerance)


@pytest.mark.parametrize(("compressor", "error"), ALL)
@pytest.mark.parametrize("bucket_cap_mb", [25, SMALL_BUCKETS])
def test_it_does_what_the_equations_say(compressor: str, error: str, bucket_cap_mb: float, workers: Pair) -> None:
    setting = make(compressor, error)
    answers = workers.run(JOB, settings=settings(setting, bucket_cap_mb=bucket_cap_mb), steps=STEPS)
    check(answers, setting)
    if compressor != "bf16":
        assert len(answers[0]["buckets"]) == (1 if bucket_cap_mb == 25 else 2 * (len(SIZES) - 1))


@pytest.mark.parametrize(("compressor", "error"), ALL)
def test_accumulation_clipping_and_warmup(compressor: str, error: str, workers: Pair) -> None:
    setting = make(compressor, error, accumulate=2, clip=0.4)
    setting = replace(setting, warmup=3)
    more = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.4}
    # With 5 batches an epoch the host would end an epoch in the middle of an accumulation.
    answers = workers.run(JOB, settings=settings(setting), steps=STEPS, batches=6, **more)
    check(answers, setting, batches=6)


@pytest.mark.parametrize(("compressor", "error"), [("topk", "econtrol"), ("sign", "ef"), ("powersgd", "ef")])
def test_three_processes(compressor: str, error: str, three: Group) -> None:
    setting = make(compressor, error)
    check(three.run(JOB, settings=settings(setting), steps=STEPS), setting)


@pytest.mark.parametrize("rank", [1, 3])
def test_powersgd_of_other_ranks(rank: int, workers: Pair) -> None:
    """Up to rank 2 torch makes columns orthogonal itself, from 3 on by a QR factorisation."""
    setting = make("powersgd", "ef", rank=rank)
    check(workers.run(JOB, settings=settings(setting, bucket_cap_mb=SMALL_BUCKETS), steps=STEPS), setting)


@pytest.mark.parametrize("how", ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"])
@pytest.mark.parametrize(("compressor", "error"), [("topk", "ef21"), ("powersgd", "ef"), ("bf16", "")])
def test_ways_of_ddp(compressor: str, error: str, how: str, workers: Pair) -> None:
    if (compressor, how) == ("powersgd", "find_unused_parameters"):
        pytest.skip("refused")
    setting = make(compressor, error)
    more: dict[str, Any] = {how: True, "bucket_cap_mb": SMALL_BUCKETS}
    check(workers.run(JOB, settings=settings(setting, **more), steps=STEPS), setting)


@pytest.mark.parametrize(("compressor", "error"), ALL)
def test_a_gradient_that_is_not_finite_leaves_no_trace(compressor: str, error: str, workers: Pair) -> None:
    """It is not finite on one process; both see that, and go on as if the step had not been."""
    setting = make(compressor, error, broken=frozenset({3, 5}))
    how = settings(setting, bucket_cap_mb=SMALL_BUCKETS)
    check(workers.run(JOB, settings=how, steps=STEPS, broken=(3, 5)), setting)


@pytest.mark.parametrize(("compressor", "error"), WITH_MEMORY)
def test_one_tensor_that_is_not_finite_does_not_spoil_the_others(compressor: str, error: str, workers: Pair) -> None:
    how = settings(make(compressor, error, warmup=2))
    for answer in workers.run(JOB, settings=how, steps=STEPS, broken=(1, 4), broken_tensor="layers.1.weight"):
        assert all(tensor.isfinite().all() for tensor in answer["weights"][-1].values())
        kept = [*answer["own"].values(), answer["shared"]["mean"]]
        assert all(t.isfinite().all() for streams in kept for part in streams.values() for t in part.values())


def test_single_precision(workers: Pair) -> None:
    setting = make("sign", "ef")
    check(workers.run(JOB, settings=settings(setting), steps=6, dtype="float32"), setting, 1e-5, 6)


def test_half_precision_is_remembered_in_full(workers: Pair) -> None:
    answers = workers.run(JOB, settings=settings(make("topk", "econtrol")), steps=4, dtype="bfloat16")
    assert_same(answers[1]["weights"], answers[0]["weights"], "rank 1 against rank 0")
    kept = answers[0]["own"]["error"][0]
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.parametrize("error", ["ef21", "econtrol"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_starts_without_a_bias(error: str, dtype: str, workers: Pair) -> None:
    """After the warm-up what is known of the mean is the mean of what is known of the workers."""
    answers = workers.run(JOB, settings=settings(make("topk", error, warmup=3)), steps=5, dtype=dtype)
    assert_same(answers[1]["weights"], answers[0]["weights"], "rank 1 against rank 0")
    mean, estimates = answers[0]["shared"]["mean"][0], [answer["own"]["estimate"][0] for answer in answers]
    assert any(not torch.equal(estimates[0][name], estimates[1][name]) for name in mean)
    assert_same({name: (estimates[0][name] + estimates[1][name]) / 2 for name in mean}, mean, "the means", 1e-6)


def test_all_entries_are_plain_ddp(workers: Pair) -> None:
    all_of_it = workers.run(JOB, settings={"compressor": "topk", "ratio": 1.0, "error": "ef"}, steps=STEPS)
    plain = workers.run(JOB, settings={}, steps=STEPS)
    assert_same(all_of_it[0]["weights"], plain[0]["weights"], "every entry against DDP")


@pytest.mark.parametrize(("compressor", "error"), WITH_MEMORY)
def test_a_layer_that_a_step_leaves_out_is_kept(compressor: str, error: str, workers: Pair) -> None:
    """DDP throws away what is returned for it, and with it what the memory would have given."""
    steps = (1, 2, 5)
    setting = make(compressor, error, without=frozenset(steps))
    how = settings(setting, find_unused_parameters=True)
    check(workers.run(JOB, settings=how, steps=STEPS, without=steps), setting)


@pytest.mark.parametrize(("compressor", "error"), ALL)
def test_two_optimizers_each_remember_their_own(compressor: str, error: str, workers: Pair) -> None:
    """Both losses reach all weights; what a pass finds for the other optimizer's weights is thrown away."""
    passes = (((0, 1, 2, 3), (0, 1)), ((0, 1, 2, 3), (2, 3)))
    setting = make(compressor, error, passes=passes)
    check(workers.run(JOB, settings=settings(setting), steps=STEPS, kind="two"), setting)


@pytest.mark.parametrize(("compressor", "error"), [("topk", "ef"), ("sign", "econtrol"), ("bf16", "")])
def test_one_optimizer_at_a_time(compressor: str, error: str, workers: Pair) -> None:
    """As for adversarial networks: the other's weights are switched off for a pass."""
    setting = make(compressor, error, passes=(((0, 1), (0, 1)), ((2, 3), (2, 3))))
    how = settings(setting, find_unused_parameters=True)
    check(workers.run(JOB, settings=how, steps=STEPS, kind="toggled"), setting)


@pytest.mark.parametrize(("compressor", "error"), ALL)
@pytest.mark.parametrize("kind", ["plain", "two"])
def test_a_resumed_run_is_the_uninterrupted_one(
    compressor: str, error: str, kind: str, workers: Pair, tmp_path: Path
) -> None:
    # Buckets of some parameters each, which DDP lays out anew in the second pass of every run.
    how, path = settings(make(compressor, error), bucket_cap_mb=2e-3), str(tmp_path / "some.ckpt")
    save_at = 5 if kind == "plain" else 10
    whole = workers.run(JOB, settings=how, steps=STEPS, kind=kind, save_at=save_at, path=path)
    again = workers.run(JOB, settings=how, steps=STEPS, kind=kind, resume=path)
    for before, after in zip(whole, again, strict=True):
        assert_same(after["weights"], before["weights"][5:], "weights of the resumed run")
        for run in (before, after):
            # A bucket's message is filled up to eight bytes, and a run begins with other buckets than it goes on with.
            run["shared"].pop("bytes_sent")
        for key in ("optimizers", "own", "shared"):
            assert_same(after[key], before[key], f"{key} of the resumed run")
        assert after["bytes"] == pytest.approx(before["bytes"], rel=0.05)
        assert not [text for text in after["warnings"] if "CompressedDDP" in text]
    saved = torch.load(path, weights_only=True)["CompressedDDPStrategy"]
    assert saved["compressor"] == compressor
    assert len(saved["ranks"]) == 2
    if error in ("ef", "econtrol"):
        first, second = (state["error"][0] for state in saved["ranks"])
        assert any(not torch.equal(first[name], second[name]) for name in first), "both ranks saved the same"


@pytest.mark.parametrize(("compressor", "error"), [("topk", "econtrol"), ("powersgd", "ef")])
def test_a_checkpoint_after_the_fit_holds_all(compressor: str, error: str, workers: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "end.ckpt")
    answers = workers.run(JOB, settings=settings(make(compressor, error)), steps=4, path=path)
    saved = torch.load(path, weights_only=True)["CompressedDDPStrategy"]
    assert all(saved["ranks"][0]["error"][0][name].any() for name in ("layers.0.weight", "layers.2.weight"))
    assert_same(saved["ranks"], [answer["own"] for answer in answers], "what was saved after the fit")
    assert_same(saved["shared"], answers[0]["shared"], "what was saved after the fit for all")


def test_another_number_of_processes_begins_anew_and_says_so(workers: Pair, three: Group, tmp_path: Path) -> None:
    how, path = settings(make("topk", "ef21")), str(tmp_path / "two.ckpt")
    workers.run(JOB, settings=how, steps=5, save_at=5, path=path)
    answers = three.run(JOB, settings=how, steps=7, resume=path)
    assert_same(answers[2]["weights"], answers[0]["weights"], "rank 2 against rank 0")
    told = [text for text in answers[0]["warnings"] if "made by 2 process(es) and this run has 3" in text]
    assert len(told) == 1
    assert "CompressedDDPStrategy" in told[0]


def test_another_compressor_begins_anew_and_says_so(workers: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "sign.ckpt")
    workers.run(JOB, settings={"compressor": "sign"}, steps=5, save_at=5, path=path)
    answer, _ = workers.run(JOB, settings={"compressor": "powersgd"}, steps=7, resume=path)
    assert any("was made with compressor='sign' and error='ef21'" in text for text in answer["warnings"])
    workers.run(JOB, settings={}, steps=5, save_at=5, path=path)
    answer, _ = workers.run(JOB, settings={"compressor": "sign"}, steps=7, resume=path)
    assert any("holds no state of this strategy" in text for text in answer["warnings"])
    answer, _ = workers.run(JOB, settings={"compressor": "bf16"}, steps=7, resume=path)
    assert not [text for text in answer["warnings"] if "CompressedDDP" in text]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_another_rank_keeps_what_was_not_sent_and_says_so(rank: int, workers: Pair, tmp_path: Path) -> None:
    """With rank 8 no matrix is worth compressing: what was not sent is sent, and nothing is left."""
    how, path = {"compressor": "powersgd", "rank": 2, "bucket_cap_mb": 2e-3}, str(tmp_path / "two.ckpt")
    workers.run(JOB, settings=how, steps=5, save_at=5, path=path)
    answers = workers.run(JOB, settings={**how, "rank": rank}, steps=7, resume=path)
    assert_same(answers[1]["weights"], answers[0]["weights"], "rank 1 against rank 0")
    assert [text for text in answers[0]["warnings"] if f"made with rank=2 and this run has rank={rank}" in text]
    first, second = (answer["own"]["error"][0] for answer in answers)
    # torch keeps how far a worker is from the mean too, which adds up to nothing.
    left = max(float((first[name] + second[name]).abs().max()) for name in first)
    assert (left > 1e-6) == (rank < 8)


@pytest.mark.parametrize("compressor", ["topk", "bf16"])
def test_one_process_says_what_it_drops(
    compressor: str, workers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "two.ckpt")
    workers.run(JOB, settings={"compressor": compressor}, steps=5, save_at=5, path=path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    strategy: Any = CompressedDDPStrategy(compressor=compressor, start_method="popen")  # type: ignore[arg-type]
    trainer = Trainer(**QUIET, devices=1, strategy=strategy, max_steps=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(), Batches(random_batches(1, BATCHES)[0]), ckpt_path=path)
    torch.distributed.destroy_process_group()
    told = [str(w.message) for w in caught if "made by 2 process(es) and this run has 1" in str(w.message)]
    assert len(told) == (1 if compressor == "topk" else 0)
    assert all("CompressedDDPStrategy" in text for text in told)


def test_a_checkpoint_after_a_failure_does_not_wait(workers: Pair, tmp_path: Path) -> None:
    texts = workers.run(
        "strategies.compressed_jobs:fail_and_save", settings={"compressor": "sign"}, path=str(tmp_path / "failed.ckpt")
    )
    assert all("deliberate" in text for text in texts)
    assert "CompressedDDPStrategy" not in torch.load(tmp_path / "failed.ckpt", weights_only=True)


def test_weights_alone_are_saved_alone(workers: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "weights.ckpt")
    workers.run("strategies.compressed_jobs:save_weights", settings={"compressor": "sign"}, path=path)
    assert "CompressedDDPStrategy" not in torch.load(path, weights_only=True)


def test_a_second_fit_begins_anew(workers: Pair) -> None:
    for first, second in workers.run("strategies.compressed_jobs:twice", settings={"compressor": "topk"}):
        assert_same(second, first, "the second fit of a strategy against its first")


def test_what_is_sent_is_counted(workers: Pair) -> None:
    sizes = [value.size for value in initial_weights().values()]
    entries, tensors = sum(sizes), len(sizes)

    def aligned(size: int) -> int:
        return 8 * math.ceil(size / 8)

    def sent(**how: Any) -> int:
        answer, other = workers.run(JOB, settings=how, steps=3, dtype="float32")
        assert answer["bytes"] == other["bytes"]
        return answer["bytes"] / 3

    kept = sum(max(1, math.ceil(0.1 * size)) for size in sizes)
    assert sent(compressor="topk", ratio=0.1) == 2 * aligned(4 * kept) + aligned(tensors)
    assert sent(compressor="sign") == aligned(4 * tensors) + aligned(math.ceil(entries / 8)) + aligned(tensors)
    assert sent(compressor="bf16") == 2 * entries
    assert sent(compressor="bf16", warmup_steps=3) == 4 * entries
    assert sent(compressor="sign", warmup_steps=3) == 4 * entries
    low = 2 * (2 * (16 + 16)) + 1 * 2 * (16 + 6)  # rank 2
    rest = entries - 2 * 256 - 96
    answer, _ = workers.run(JOB, settings={"compressor": "powersgd", "rank": 2}, steps=3, dtype="float32")
    assert answer["bytes"] == 4 * (2 * entries + low + rest)
