"""EVA: components against scikit-learn's and peft's, bounded memory, ranks against the slow twin, scaling kept."""

import pickle

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import adapter_init_twin as twin
from sklearn.decomposition import PCA, IncrementalPCA
from torch import nn

from lightning_stable.functional.eva import (
    converged,
    eva_alpha,
    eva_components,
    eva_factor,
    init_pca,
    merge_pca,
    redistribute_ranks,
    update_pca,
    variance_ratios,
)

FEATURES, COMPONENTS = 48, 6


def stream(batches=8, rows=64, features=FEATURES, seed=0, decay=1.0, offset=3.0):
    """Return batches whose mean is far from 0 and moves from one batch to the next."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    sizes = (1.0 + torch.arange(features)) ** -decay
    drift = offset * torch.randn(features, generator=generator)
    return [
        (torch.randn(rows, features, generator=generator) * sizes) @ turn + drift * (1 + 0.01 * index)
        for index in range(batches)
    ]


def followed(batches, components=COMPONENTS, dtype=torch.float32, **search):
    state = init_pca(batches[0].shape[-1], components, dtype=dtype)
    for batch in batches:
        state = update_pca(state, batch, **search)
    return state


def pefts_eva(model, batches, config):
    return peft.get_eva_state_dict(
        model,
        batches,
        config,
        forward_fn=lambda model, inputs: model(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )


# ----------------------------------------------------------------------------- components


@pytest.mark.parametrize(("iterations", "tolerance"), [(None, 1e-3), (2, 1e-3)])
def test_all_components_are_exactly_those_of_the_rows_at_once(iterations, tolerance):
    # With as many components as features nothing is dropped between batches.
    batches = stream(features=12)
    state = followed(batches, 12, torch.float64, iterations=iterations)
    every = torch.cat(batches).double()
    full = PCA().fit(every.numpy())
    for rank in (1, 4, 11):
        assert twin.widest_angle(state.components[:rank], torch.tensor(full.components_[:rank])) < tolerance * 1e-3
    assert np.allclose(state.values, full.singular_values_, rtol=1e-9)
    assert np.allclose(variance_ratios(state), full.explained_variance_ratio_, rtol=1e-9)
    assert np.allclose(state.mean, full.mean_, rtol=1e-9)
    assert float(state.spread) == pytest.approx(float((every - every.mean(0)).square().sum()), rel=1e-9)
    assert state.rows == len(every)


@pytest.mark.parametrize("iterations", [None, 2])
def test_components_are_sklearns_on_streamed_batches(iterations):
    batches = stream(decay=1.2)
    state = followed(batches, iterations=iterations)
    full, streamed = PCA(COMPONENTS).fit(torch.cat(batches).numpy()), IncrementalPCA(COMPONENTS)
    for batch in batches:
        streamed.partial_fit(batch.numpy())
    ours, theirs, best = state.components, torch.tensor(streamed.components_), torch.tensor(full.components_)
    for rank in (1, 2, 4):
        assert twin.widest_angle(ours[:rank], best[:rank]) < 0.1
        assert twin.widest_angle(ours[:rank], theirs[:rank]) < (0.02 if iterations is None else 0.1)
        # No farther from the truth than scikit-learn's own stream is, but for the search.
        assert twin.widest_angle(ours[:rank], best[:rank]) < 1.2 * twin.widest_angle(theirs[:rank], best[:rank]) + 0.02
    assert np.allclose(variance_ratios(state), full.explained_variance_ratio_, rtol=0.05)
    # The rows are centred: uncentred, the mean would be the first component.
    assert abs(float(state.components[0] @ nn.functional.normalize(state.mean, dim=0))) < 0.9


@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_those_of_pefts_on_the_same_batches(whiten):
    batches = stream(2, rows=128, features=32)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))
    # Of any cosine, so that peft stops once it has seen both batches.
    eva = peft.EvaConfig(rho=1.0, whiten=whiten)
    eva.tau = -1.0
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="eva", eva_config=eva)
    theirs = pefts_eva(model, batches, config)
    with torch.no_grad():
        inputs = {"0": batches, "2": [model[:2](batch) for batch in batches]}
    for name, rows in inputs.items():
        ours, unit = eva_factor(followed(rows, 4), 4, whiten), nn.functional.normalize
        for rank in (1, 2, 4):
            assert twin.widest_angle(unit(ours[:rank]), unit(theirs[name][:rank])) < 0.02
        assert torch.allclose(ours.norm(dim=1), theirs[name].norm(dim=1).float(), rtol=1e-3)
        # The mean of these inputs is large: rows that are not centred would have another first component.
        assert twin.widest_angle(unit(ours[:1]), torch.linalg.svd(torch.cat(rows)).Vh[:1]) > 0.1


def test_search_loses_little_and_iterations_find_more():
    batches = stream(3, rows=192, features=192, decay=0.3, offset=0.1)
    best = float(followed(batches, iterations=None).values.square().sum())
    lost = [1 - float(followed(batches, iterations=each).values.square().sum()) / best for each in (0, 1, 2)]
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.002 < lost[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype_and_shape(dtype):
    batches = [batch.reshape(4, 16, FEATURES).to(dtype) for batch in stream(offset=0.1)]
    state = followed(batches)
    assert {state.components.dtype, state.values.dtype, state.mean.dtype, state.spread.dtype} == {torch.float32}
    best = torch.tensor(PCA(2).fit(torch.cat(batches).flatten(0, 1).double().numpy()).components_)
    assert twin.widest_angle(state.components[:2], best) < 0.05
    assert torch.equal(followed([*batches, batches[0][:0]]).components, state.components)


def test_nothing_given_is_changed_and_the_search_is_seeded():
    batches = stream(3, features=96)
    kept = [batch.clone() for batch in batches]
    first = followed(batches[:2])
    copy = [part.clone() for part in first[:4]]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(update_pca(first, batches[2]))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(found[0][:4], found[1][:4], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first[:4], copy, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(batches, kept, strict=True))
    assert not torch.equal(found[0].components, first.components)


def test_memory_does_not_grow_with_the_number_of_batches():
    sizes = [len(pickle.dumps(followed(stream(batches)))) for batches in (1, 4, 16)]
    assert max(sizes) - min(sizes) < 16
    state = followed(stream(16))
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state[:4]}
    assert sum(held.values()) == 4 * (COMPONENTS * FEATURES + COMPONENTS + FEATURES + 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_fewer_rows_than_components_are_used(rows):
    every = torch.cat(stream(4))
    state = followed(list(every.split(rows)))
    assert twin.widest_angle(state.components[:3], torch.tensor(PCA(3).fit(every.numpy()).components_)) < 0.2
    early = followed([every[:3]])
    assert int((variance_ratios(early) > 0).sum()) == 2
    assert float(variance_ratios(early).sum()) == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(ValueError, match="rank=3 is above 2, the number of directions in which the 3 inputs"):
        eva_factor(early, 3)


def test_merged_states_are_those_of_all_rows():
    batches = stream(6, features=10)
    both = merge_pca(followed(batches[:2], 10, torch.float64), followed(batches[2:], 10, torch.float64))
    once = followed(batches, 10, torch.float64)
    assert both.rows == once.rows
    for one, other in zip(both[:4], once[:4], strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    empty = init_pca(10, 10, dtype=torch.float64)
    assert merge_pca(once, empty) is once
    assert torch.allclose(merge_pca(empty, once).components, once.components, atol=1e-9)
    few = merge_pca(followed(batches[:2], 4), followed(batches[2:], 4))
    assert twin.widest_angle(few.components[:2], once.components[:2]) < 0.1


# ----------------------------------------------------------------------------- convergence


def test_components_that_stay_have_converged_whatever_their_sign():
    state = followed(stream())
    turned = state._replace(components=state.components * torch.tensor([1.0, -1, 1, -1, 1, -1]).unsqueeze(1))
    assert converged(state, turned, 0.999).all()
    angle = torch.tensor(0.3)
    moved = state.components.clone()
    moved[0] = angle.cos() * state.components[0] + angle.sin() * state.components[1]
    after = state._replace(components=moved)
    assert converged(state, after, 0.95).all()
    assert converged(state, after, 0.96).tolist() == [False, True, True, True, True, True]
    assert not converged(init_pca(FEATURES, COMPONENTS), state, 0.01).any()


def test_leading_components_converge_and_others_have_not_yet():
    batches = stream(6, decay=1.5, offset=0.1)
    before = followed(batches[:-1])
    after = update_pca(before, batches[-1])
    assert converged(before, after, 0.99)[:2].all()
    assert not converged(followed(batches[:1]), followed(batches[:2]), 0.9999).all()


# ----------------------------------------------------------------------------- the factor


def test_factor_is_orthonormal_or_whitened():
    state = followed(stream(), dtype=torch.float64)
    a = eva_factor(state, 4)
    assert a.shape == (4, FEATURES)
    assert torch.allclose(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    white = eva_factor(state, 4, whiten=True)
    assert torch.allclose(white @ white.T, (1 / state.values[:4]).diag(), atol=1e-12)
    a.zero_()
    assert state.components.any()


@pytest.mark.parametrize(("rslora", "scaling"), [(False, lambda a, r: a / r), (True, lambda a, r: a / r**0.5)])
@pytest.mark.parametrize("new_rank", [1, 5, 16])
def test_alpha_keeps_the_scaling(new_rank, rslora, scaling):
    alpha = eva_alpha(12.0, 8, new_rank, rslora)
    assert scaling(alpha, new_rank) == pytest.approx(scaling(12.0, 8), rel=1e-12)
    layer = peft.inject_adapter_in_model(
        peft.LoraConfig(r=new_rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"]),
        nn.Sequential(nn.Linear(20, 20)),
    )[0]
    assert layer.scaling["default"] == pytest.approx(scaling(12.0, 8), rel=1e-12)


# ----------------------------------------------------------------------------- ranks


@given(
    shares=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    members=st.lists(st.integers(0, 3), max_size=3),
    first=st.integers(1, 4),
    second=st.integers(1, 4),
    rho=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
@settings(max_examples=80, deadline=None)
def test_ranks_are_the_twins(shares, members, first, second, rho):
    ratios = {
        f"layer{index}": torch.tensor(sorted(share, reverse=True), dtype=torch.float64) / 100
        for index, share in enumerate(shares)
    }
    groups = {}
    for index, owner in enumerate(members):
        groups.setdefault(f"layer{owner % len(shares)}", []).append(f"member{index}")
    names = [*ratios, *(name for rest in groups.values() for name in rest)]
    ranks = {name: first if index % 2 else second for index, name in enumerate(names)}
    found = redistribute_ranks(ratios, ranks, rho, groups)
    assert found == twin.redistributed(ratios, ranks, rho, groups)
    assert sum(found.values()) <= sum(ranks.values())
    for owner, rest in groups.items():
        assert found[owner] == max(found[name] for name in (owner, *rest))


def test_ranks_are_pefts():
    batches = stream(2, rows=128, features=32)
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 8)

        def forward(self, inputs):
            return self.out((self.q(inputs) * self.k(inputs)).tanh())

    model = Shared()
    # Inputs of the last layer that vary in fewer directions than those of the others.
    model.q.weight.data *= torch.linspace(3, 0.01, 16).unsqueeze(1)
    eva = peft.EvaConfig(rho=2.0)
    eva.tau = -1.0
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "out"], init_lora_weights="eva", eva_config=eva)
    theirs = pefts_eva(model, batches, config)
    with torch.no_grad():
        inner = [(model.q(batch) * model.k(batch)).tanh() for batch in batches]
    states = {"q": followed(batches, 8), "out": followed(inner, 8)}
    ranks = redistribute_ranks({name: variance_ratios(state) for name, state in states.items()}, 4, 2.0, {"q": ["k"]})
    assert ranks == {name: len(factor) for name, factor in theirs.items()}
    assert sum(ranks.values()) == 12
    assert len(set(ranks.values())) > 1


def test_rho_of_one_leaves_the_ranks():
    ratios = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.3, 0.2, 0.1])}
    assert redistribute_ranks(ratios, 2, 1.0) == {"a": 2, "b": 2}
    assert redistribute_ranks(ratios, 2, 1.5) == {"a": 1, "b": 3}
    assert redistribute_ranks(ratios, {"a": 1, "b": 2}, 1.0) == {"a": 1, "b": 2}


def test_a_component_that_explains_nothing_gets_no_rank():
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, FEATURES).cumsum(1)
    flat, full = followed([rows + 5]), followed(stream())
    ratios = {"flat": variance_ratios(flat), "full": variance_ratios(full)}
    ranks = redistribute_ranks(ratios, 3)
    assert ranks["flat"] == 1
    assert redistribute_ranks({"flat": variance_ratios(followed([torch.ones(9, FEATURES)]))}, 2) == {"flat": 0}
    assert eva_factor(flat, 1).shape == (1, FEATURES)


@pytest.mark.parametrize(
    ("rank", "rho", "features", "expected"), [(8, 2.0, 64, 16), (8, 2.0, 10, 10), (3, 1.5, 64, 4), (8, 1.0, 64, 8)]
)
def test_components_to_follow(rank, rho, features, expected):
    assert eva_components(rank, rho, features) == expected


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: init_pca(4, 5), "components=5 is above features=4"),
        (lambda: init_pca(4, 0), "components=0"),
        (lambda: init_pca(4, 2, dtype=torch.bfloat16), "bfloat16 is not float32 or float64"),
        (lambda: update_pca(init_pca(4, 2), torch.zeros(3, 5)), r"rows of shape \(3, 5\).*4 features"),
        (lambda: update_pca(init_pca(4, 2), torch.zeros(3, 4).long()), "torch.int64 are not floating-point"),
        (lambda: update_pca(init_pca(4, 2), torch.tensor([[0, 1, 2, float("nan")]])), "not finite"),
        (lambda: update_pca(init_pca(4, 2), torch.tensor([[0, 1, 2, float("inf")]])), "not finite"),
        (lambda: update_pca(init_pca(4, 2), torch.zeros(3, 4), iterations=-1), "iterations=-1"),
        (lambda: merge_pca(init_pca(4, 2), init_pca(5, 2)), "of 4 and of 5 features"),
        (lambda: converged(init_pca(4, 2), init_pca(4, 2), 1.5), "tau=1.5 is above 1"),
        (lambda: converged(init_pca(4, 2), init_pca(4, 2), 0.0), "tau=0.0"),
        (lambda: eva_factor(init_pca(4, 2), 1), "rank=1 is above 0.*the 0 inputs seen"),
        (lambda: eva_factor(init_pca(4, 2), 0), "rank=0"),
        (lambda: eva_components(8, 0.5, 64), "rho=0.5 is below 1"),
        (lambda: eva_alpha(8, 8, 0), "new_rank=0"),
        (lambda: redistribute_ranks({"a": torch.ones(2)}, {"b": 2}), "rank of 'a'=0"),
        (lambda: redistribute_ranks({"a": torch.tensor([float("nan")])}, 1), "ratio is not finite"),
        (lambda: redistribute_ranks({"a": torch.ones(2)}, 1, groups={"b": ["c"]}), "'b', of which there are no ratios"),
        (lambda: redistribute_ranks({"a": torch.ones(2)}, 1, groups={"a": ["c", "c"]}), "'c' beside 'a'"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
