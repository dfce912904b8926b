"""Reconstruction: codebooks and scales of a block trained on its output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.matrix.reconstruction import reconstruct
from cluscomp_peft.compress.policy import Policy


def block(scales=True, seed=0):
    """A dense two-layer block, its clustered twin, and batches that go through both."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    spec = ClusterSpec(4, 8, 1, scales, scales)
    first, last = (Policy().cluster("layer", dense[index], spec) for index in (0, 2))
    clustered = nn.Sequential(first, nn.GELU(), last)
    inputs = [torch.randn(2, 12, 16) for _ in range(12)]
    with torch.no_grad():
        targets = [dense(x) for x in inputs]
    return clustered, [clustered[0], clustered[2]], inputs, targets


@pytest.mark.parametrize("scales", [True, False])
def test_the_error_on_unseen_batches_falls_and_codes_stay(scales):
    run, layers, inputs, targets = block(scales)
    codes = [layer.codes.clone() for layer in layers]
    bits = [layer.true_bits for layer in layers]
    result = reconstruct(run, layers, inputs, targets, held_out=3, epochs=30, learning_rate=0.02)
    assert result.after < (0.8 if scales else 0.9) * result.before
    for layer, before, size in zip(layers, codes, bits, strict=True):
        assert torch.equal(layer.codes, before) and layer.true_bits == size
        assert layer.codebook.dtype == torch.float16 and not layer.codebook.requires_grad


def test_the_reported_error_is_what_the_layers_give():
    run, layers, inputs, targets = block()
    result = reconstruct(run, layers, inputs, targets, held_out=3, epochs=5, learning_rate=0.02)
    energy = sum(float(target.square().sum()) for target in targets) / len(targets)
    with torch.no_grad():
        errors = [float((run(x) - y).square().sum()) for x, y in zip(inputs[-3:], targets[-3:], strict=True)]
    assert sum(errors) / 3 / energy == pytest.approx(
        result.after, rel=0.02
    )  # codebooks are rounded to fp16 in the end


def test_a_rate_that_destroys_leaves_what_was_best():
    run, layers, inputs, targets = block()
    before = [layer.codebook.clone() for layer in layers]
    result = reconstruct(run, layers, inputs, targets, held_out=3, epochs=3, learning_rate=1e4)
    assert result.after == result.before
    assert all(torch.equal(layer.codebook, old) for layer, old in zip(layers, before, strict=True))


def test_no_epochs_change_nothing_and_still_measure():
    run, layers, inputs, targets = block()
    before = [layer.codebook.clone() for layer in layers]
    result = reconstruct(run, layers, inputs, targets, held_out=3, epochs=0)
    assert result.before == result.after > 0 and result.epochs == 0
    assert all(torch.equal(layer.codebook, old) for layer, old in zip(layers, before, strict=True))


def test_the_same_seed_gives_the_same_bytes():
    books = []
    for seed in (3, 3, 4):
        run, layers, inputs, targets = block()
        reconstruct(run, layers, inputs, targets, held_out=3, epochs=3, seed=seed)
        books.append(torch.cat([layer.codebook.flatten() for layer in layers]))
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_outputs_that_are_not_finite_are_refused():
    run, layers, inputs, targets = block()
    inputs[-1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        reconstruct(run, layers, inputs, targets, held_out=3)
