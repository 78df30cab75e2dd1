"""Convolutions by Winograd's method against plain ones in double precision: values, gradients, layout, threads."""

import threading

import pytest
import torch
import torch.nn.functional as F

from sifm_min.models import winograd

LAST = torch.channels_last
SHAPES = {                                          # pictures, in, out, height, width
    "whole tiles": (1, 16, 16, 16, 24),
    "a rest each way": (2, 12, 20, 13, 18),
    "narrow": (3, 8, 12, 31, 1),
    "wide": (1, 20, 4, 2, 35),
    "one position": (2, 6, 5, 1, 1),
    "a row of tiles at a time": (2, 8, 8, 36, 132),
    "two rows at a time, of an odd number": (2, 8, 8, 36, 64),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name):
    """(x, weight, bias) in double precision, and channels-last, so that values have a mean square of about one."""
    count, ins, outs, height, width = SHAPES[name]
    weight = draw(outs, ins, 3, 3, seed=1) / (9 * ins) ** 0.5
    return draw(count, ins, height, width).contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST), draw(outs)


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_convolution(name, with_bias, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 32)
    x, weight, bias = case(name)
    bias = bias if with_bias else None
    truth = F.conv2d(x, weight, bias, padding=1)
    given = x.float(), weight.float(), None if bias is None else bias.float()
    ours, plain = winograd.convolve(*given), F.conv2d(*given, padding=1)
    assert ours.shape == plain.shape and ours.dtype == torch.float32 and ours.is_contiguous(memory_format=LAST)
    assert rms(ours - truth) < 3e-6 * rms(truth)
    assert torch.allclose(ours.double(), truth, atol=2e-5)                  # everywhere, the edges too
    rows_first = winograd.convolve(given[0].contiguous(), *given[1:])
    assert torch.equal(rows_first, ours)


@pytest.mark.parametrize("name", SHAPES)
def test_its_gradient_is_the_convolutions(name, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 32)
    x, weight, _ = case(name)
    y = F.conv2d(x.requires_grad_(), weight, padding=1)
    at = draw(*y.shape, seed=2)
    (truth,) = torch.autograd.grad(y, x, at)
    ours = winograd.gradient(at.float(), weight.float())
    assert ours.shape == x.shape and ours.is_contiguous(memory_format=LAST)
    assert rms(ours - truth) < 4e-6 * rms(truth) and torch.allclose(ours.double(), truth, atol=2e-5)


def test_of_many_channels_the_error_is_the_one_that_is_stated():
    x, weight = draw(1, 256, 32, 32), draw(256, 256, 3, 3, seed=1) / 48
    truth = F.conv2d(x, weight, padding=1)
    error = rms(winograd.convolve(x.float(), weight.float(), None) - truth) / rms(truth)
    assert 1e-6 < error < 1.8e-6


def test_the_number_of_threads_changes_no_value():
    x, weight, bias = (part.float() for part in case("a row of tiles at a time"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(winograd.convolve(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(one, found[0], atol=1e-6) for one in found[1:])


def test_kept_memory_serves_one_thread_and_every_mode(monkeypatch):
    cases = [(torch.randn(1, 128, 8, 8), torch.randn(128, 128, 3, 3), None) for _ in range(3)]
    alone, found = [winograd.convolve(*one) for one in cases], {}

    def work(n):                                    # each with weights of its own
        with torch.inference_mode(n == 0):
            found[n] = [winograd.convolve(*cases[n]) for _ in range(30)]
        found[n] += [winograd.convolve(*cases[n])]                          # after it, outside

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[n]) == 31 and all(torch.equal(ours, alone[n]) for ours in found[n]) for n in range(3))
    monkeypatch.setattr(winograd, "KEPT", 0)                                # or none at all
    assert torch.equal(winograd.convolve(*cases[0]), alone[0])
