"""The maths of 1-bit Adam: what is sent and what is left of it, against NumPy and against torch's own Adam."""

import numpy as np
import pytest
import torch

from lightning_stable.functional.one_bit_adam import (
    adam_step,
    add_momenta,
    init_one_bit_adam,
    lay_out,
    read_messages,
    server_message,
    worker_messages,
)

SIZES = (20, 5, 0, 5, 1, 40)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 40])
def test_chunks_are_equal_whole_bytes_and_hold_every_entry_once(workers):
    layout = lay_out(SIZES, workers)
    assert layout.chunk % 8 == 0
    assert len(layout.pieces) == workers
    assert all(sum(pieces) == layout.chunk for pieces in layout.pieces)
    assert workers * layout.chunk - sum(SIZES) < 8 * workers
    ends = np.cumsum([piece for pieces in layout.pieces for piece in pieces])
    # Every tensor and every chunk begins at a cut, so that no scale is shared between them.
    assert set(np.cumsum(SIZES)) <= set(ends)
    assert all(piece > 0 for pieces in layout.pieces for piece in pieces)


def test_a_layout_of_whole_chunks_has_nothing_to_fill():
    assert lay_out([16, 16], 2).pieces == ((16,), (16,))
    assert lay_out([8], 2).pieces == ((8,), (8,))


def _variances(generator):
    made = [torch.rand(size, generator=generator) + 0.1 for size in SIZES]
    made[0][3] = made[5][:10] = made[4][0] = 0
    return made


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_exchange_is_as_written(workers):
    generator = torch.Generator().manual_seed(workers)
    layout, variances = lay_out(SIZES, workers), _variances(generator)
    total = sum(SIZES)
    alive = torch.cat(variances).numpy() != 0
    tensor = np.repeat(np.arange(len(SIZES)), SIZES)
    chunk = np.arange(total) // layout.chunk
    states = [init_one_bit_adam(layout, variances, torch.float64) for _ in range(workers)]
    momenta = [torch.randn(size, generator=generator).double() for size in SIZES]
    m, errors, server_error = torch.cat(momenta).numpy(), np.zeros((workers, total)), np.zeros(total)

    def compress(z):
        out = np.zeros(total)
        for piece in {*zip(tensor, chunk, strict=True)}:
            inside = (tensor == piece[0]) & (chunk == piece[1]) & alive
            if inside.any():
                out[inside] = np.sqrt(np.mean(z[inside] ** 2)) * np.where(z[inside] >= 0, 1, -1)
        return out

    for _ in range(3):
        gradients = [[torch.randn(size, generator=generator).double() for size in SIZES] for _ in range(workers)]
        gradients[0][3] = None
        sent, messages = [], []
        for state, own, error in zip(states, gradients, errors, strict=True):
            parts = torch.split(state.worker_error[:total], SIZES)
            add_momenta(parts, momenta, own, momenta, beta1=0.8)
            messages.append(worker_messages(layout, state))
            g = torch.cat([torch.zeros(n).double() if p is None else p for p, n in zip(own, SIZES, strict=True)])
            z = 0.8 * m + 0.2 * g.numpy() + error
            sent.append(compress(z))
            error[:] = np.where(alive, z - sent[-1], 0)
        served = [
            server_message(layout, state, rank, [message[rank] for message in messages])
            for rank, state in enumerate(states)
        ]
        s = np.mean(sent, axis=0) + server_error
        m = compress(s)
        server_error = np.where(alive, s - m, 0)
        flats = [read_messages(layout, state, served) for state in states]
        assert all(torch.equal(flat, flats[0]) for flat in flats)
        np.testing.assert_allclose(flats[0][:total], m, atol=1e-12)
        assert (flats[0][total:] == 0).all()
        for state, error in zip(states, errors, strict=True):
            np.testing.assert_allclose(state.worker_error[:total], error, atol=1e-12)
        np.testing.assert_allclose(
            torch.cat([state.server_error for state in states])[:total], server_error, atol=1e-12
        )
        momenta = [part.clone() for part in torch.split(flats[0][:total], SIZES)]


def test_a_message_is_an_eighth_of_a_byte_an_entry():
    layout = lay_out([64, 64], 2)
    state = init_one_bit_adam(layout, [torch.ones(64), torch.ones(64)], torch.float32)
    state.worker_error.copy_(torch.arange(128.0) - 64)
    first, second = worker_messages(layout, state)
    assert first.signs.tolist() == [0] * 8
    assert second.signs.tolist() == [255] * 8
    assert (first.signs.dtype, first.scales.dtype) == (torch.uint8, torch.float32)
    assert first.scales.tolist() == pytest.approx([np.sqrt(np.mean(np.arange(1, 65) ** 2))])


def test_tensors_of_different_size_have_scales_of_their_own():
    layout = lay_out([8, 8], 1)
    state = init_one_bit_adam(layout, [torch.ones(8), torch.ones(8)], torch.float32)
    state.worker_error.copy_(torch.cat([torch.full((8,), 1e-6), torch.full((8,), -100.0)]))
    (message,) = worker_messages(layout, state)
    assert message.scales.tolist() == pytest.approx([1e-6, 100.0])
    # What has one size in a piece is sent as it is.
    assert state.worker_error.abs().max() < 1e-4


def test_entries_without_a_variance_are_never_sent():
    layout = lay_out([8, 8], 1)
    state = init_one_bit_adam(layout, [torch.zeros(8), torch.cat([torch.zeros(7), torch.ones(1)])], torch.float32)
    state.worker_error.copy_(torch.arange(1.0, 17.0))
    messages = worker_messages(layout, state)
    assert messages[0].scales.tolist() == [0.0, 16.0]
    momentum = read_messages(layout, state, [server_message(layout, state, 0, messages)])
    assert momentum.tolist() == [0.0] * 15 + [16.0]
    assert state.worker_error.tolist() == [0.0] * 16


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_torchs_own_where_the_variance_is_as_it_was_learned(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)) for _ in range(2)]
    optimizer = kind(weights, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    for _ in range(5):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.randn(4, 3, generator=generator).to(dtype)
        optimizer.step()
    states = [optimizer.state[weight] for weight in weights]
    adam_step(
        before,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        lr=0.03,
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
        steps=[5, 5],
        learned=[5, 5],
        decay=0.1 if kind is torch.optim.AdamW else 0.0,
    )
    for mine, theirs in zip(before, weights, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_nothing_to_do_is_nothing_done():
    add_momenta([], [], [], [], beta1=0.9)
    adam_step([], [], [], lr=0.1, beta1=0.9, beta2=0.9, eps=0.1, steps=[], learned=[])


def test_l2_decay_joins_the_gradient():
    view, momentum, weight = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([10.0])
    add_momenta([view], [momentum], [torch.tensor([4.0])], [weight], beta1=0.75, l2=0.1)
    assert view.item() == pytest.approx(1.0 + 0.75 * 2 + 0.25 * (4 + 0.1 * 10))


def test_a_half_precision_gradient_is_added_in_the_precision_of_the_errors():
    view = torch.zeros(2)
    half = torch.tensor([1.0, 1 / 256], dtype=torch.bfloat16)
    add_momenta([view], [half], [half], [half], beta1=0.5)
    assert view.tolist() == [1.0, 1 / 256]
