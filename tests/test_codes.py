"""Packing, grouping, sizes and fingerprints of the representation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.codes import (
    MAX_GROUP_SIZE,
    ClusterSpec,
    block_offsets,
    code_bits,
    combine_fingerprints,
    fingerprint,
    group,
    num_groups,
    pack,
    packed_width,
    ungroup,
    unpack,
)

pure = settings(deadline=None, max_examples=60, derandomize=True)


def random_codes(rows: int, groups: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, groups), generator=torch.Generator().manual_seed(seed))


def pack_bit_by_bit(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows = []
    for row in codes.tolist():
        stream = [(code >> position) & 1 for code in row for position in range(bits)]
        stream += [0] * (-len(stream) % 8)
        rows.append([sum(stream[i + j] << j for j in range(8)) for i in range(0, len(stream), 8)])
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("groups", [1, 3, 7, 8, 9, 21])
@pytest.mark.parametrize("bits", range(1, 17))
def test_pack_follows_the_bit_by_bit_reference(bits, groups):
    codes = random_codes(4, groups, bits, seed=bits)
    codes[0] = 2**bits - 1
    codes[1] = 0
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (4, packed_width(groups, bits))
    assert torch.equal(packed, pack_bit_by_bit(codes, bits))
    restored = unpack(packed, bits, groups)
    assert restored.dtype == torch.int32
    assert torch.equal(restored.long(), codes)


@pure
@given(st.integers(1, 16), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pack_round_trips(bits, rows, groups, seed):
    codes = random_codes(rows, groups, bits, seed)
    packed = pack(codes, bits)
    assert packed.numel() == rows * -(-groups * bits // 8)
    assert torch.equal(unpack(packed, bits, groups).long(), codes)


@pure
@given(st.integers(1, 16), st.integers(2, 9), st.integers(1, 20), st.data())
def test_rows_can_be_unpacked_alone(bits, rows, groups, data):
    codes = random_codes(rows, groups, bits)
    start = data.draw(st.integers(0, rows - 1))
    part = pack(codes, bits)[start:]
    assert torch.equal(unpack(part, bits, groups).long(), codes[start:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_pack_takes_any_integer_dtype(dtype):
    codes = random_codes(3, 11, 5)
    assert torch.equal(pack(codes.to(dtype), 5), pack_bit_by_bit(codes, 5))


def test_pack_takes_transposed_codes():
    codes = random_codes(6, 9, 11)
    assert torch.equal(pack(codes.t().contiguous().t(), 11), pack_bit_by_bit(codes, 11))


@pytest.mark.parametrize("bits", [-1, 0, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack(torch.zeros(1, 1, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match="1 to 16 bits"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize(("code", "bits"), [(-1, 4), (16, 4), (2**16, 16), (2, 1)])
def test_codes_out_of_range_are_refused(code, bits):
    with pytest.raises(ValueError, match=rf"\[0, {2**bits}\).*{code}"):
        pack(torch.tensor([[0, code]]), bits)


@pytest.mark.parametrize("bits", [3, 8, 11])
@pytest.mark.parametrize("change", [-1, 1])
def test_unpack_refuses_a_wrong_width(bits, change):
    packed = torch.zeros(2, packed_width(10, bits) + change, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"10 codes of {bits} bits take {packed_width(10, bits)} bytes"):
        unpack(packed, bits, 10)


@pytest.mark.parametrize(("clusters", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (2**16, 16)])
def test_code_bits_is_the_least_that_holds_every_code(clusters, bits):
    assert code_bits(clusters) == bits
    assert ClusterSpec(4, clusters).code_bits == bits


@pure
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, MAX_GROUP_SIZE))
def test_group_round_trips(out_features, in_features, group_size):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(out_features))
    vectors = group(weight, group_size)
    groups = num_groups(out_features, group_size)
    assert vectors.shape == (in_features, groups, group_size)
    assert groups * group_size >= out_features > (groups - 1) * group_size
    assert not vectors.reshape(in_features, -1)[:, out_features:].any()
    restored = ungroup(vectors, out_features)
    assert restored.is_contiguous()
    assert torch.equal(restored, weight)


def test_a_group_holds_consecutive_outputs_of_one_input():
    weight = torch.arange(10.0).view(5, 2)
    expected = torch.tensor([[[0.0, 2, 4], [6, 8, 0]], [[1, 3, 5], [7, 9, 0]]])
    assert torch.equal(group(weight, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scales", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("clusters", [2, 100, 1024])
@pytest.mark.parametrize("blocks", [1, 3])
def test_spec_counts_the_bytes_of_the_tensors(dtype, scales, clusters, blocks):
    in_features, out_features, group_size = 13, 29, 4
    spec = ClusterSpec(group_size, clusters, blocks, *scales)
    groups = num_groups(out_features, group_size)
    tensors = [
        pack(torch.zeros(in_features, groups, dtype=torch.int64), spec.code_bits),
        torch.zeros(blocks, clusters, group_size, dtype=dtype),
        torch.zeros(in_features if scales[0] else 0, dtype=dtype),
        torch.zeros(out_features if scales[1] else 0, dtype=dtype),
    ]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert spec.num_bytes(in_features, out_features, dtype.itemsize) == stored
    assert spec.true_bits(in_features, out_features, dtype.itemsize) == 8 * stored / (in_features * out_features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 16), "group_size.*0"),
        ((MAX_GROUP_SIZE + 1, 16), f"group_size.*{MAX_GROUP_SIZE + 1}"),
        ((4, 1), "num_clusters.*1"),
        ((4, 2**16 + 1), f"num_clusters.*{2**16 + 1}"),
        ((4, 16, 0), "num_blocks.*0"),
    ],
)
def test_spec_refuses_numbers_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        ClusterSpec(*fields)


def test_spec_accepts_its_limits():
    assert ClusterSpec(1, 2).code_bits == 1
    assert ClusterSpec(MAX_GROUP_SIZE, 2**16).code_bits == 16


@pure
@given(st.integers(1, 64), st.integers(2, 2**16), st.integers(1, 9), st.booleans(), st.booleans())
def test_spec_survives_its_dict(group_size, clusters, blocks, scale_in, scale_out):
    spec = ClusterSpec(group_size, clusters, blocks, scale_in, scale_out)
    fields = spec.to_dict()
    assert ClusterSpec(**fields) == spec
    assert ("num_blocks" in fields) == (blocks != 1)
    assert ("scale_in" in fields) == scale_in and ("scale_out" in fields) == scale_out


@pure
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5))
def test_blocks_nest_under_refinement(in_features, blocks, factor):
    coarse = block_offsets(in_features, blocks, 1, torch.device("cpu"))
    fine = block_offsets(in_features, blocks * factor, 1, torch.device("cpu"))
    assert torch.equal(fine // factor, coarse)


@pure
@given(st.integers(1, 50), st.integers(1, 9), st.integers(2, 300))
def test_block_offsets_index_codebooks_laid_end_to_end(in_features, blocks, clusters):
    offsets = block_offsets(in_features, blocks, clusters, torch.device("cpu"))
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [i * blocks // in_features * clusters for i in range(in_features)]


def test_fingerprint_depends_on_the_codes():
    spec = ClusterSpec(4, 32)
    codes = random_codes(6, 5, 5)
    digest = fingerprint(pack(codes, 5), 20, spec)
    assert len(digest) == 32 and int(digest, 16) >= 0
    assert fingerprint(pack(codes.clone(), 5), 20, spec) == digest
    for position in [(0, 0), (3, 2), (5, 4)]:
        changed = codes.clone()
        changed[position] = (changed[position] + 1) % 32
        assert fingerprint(pack(changed, 5), 20, spec) != digest


@pytest.mark.parametrize(
    ("out_features", "spec"),
    [(20, ClusterSpec(3, 32)), (20, ClusterSpec(4, 31)), (19, ClusterSpec(4, 32))],
)
def test_fingerprint_depends_on_how_codes_are_read(out_features, spec):
    packed = pack(random_codes(6, 5, 5), 5)
    assert fingerprint(packed, out_features, spec) != fingerprint(packed, 20, ClusterSpec(4, 32))


def test_fingerprint_ignores_blocks_and_scales():
    packed = pack(random_codes(6, 5, 5), 5)
    merged = ClusterSpec(4, 32, num_blocks=4, scale_in=True, scale_out=True)
    assert fingerprint(packed, 20, merged) == fingerprint(packed, 20, ClusterSpec(4, 32))


def test_fingerprint_ignores_memory_layout():
    packed = pack(random_codes(6, 5, 5), 5)
    strided = packed.t().contiguous().t()
    assert not strided.is_contiguous()
    assert fingerprint(strided, 20, ClusterSpec(4, 32)) == fingerprint(packed, 20, ClusterSpec(4, 32))


def test_combined_fingerprints_depend_on_members_and_order():
    combined = combine_fingerprints(["aa", "bb"])
    assert len(combined) == 32
    assert combine_fingerprints(iter(["aa", "bb"])) == combined
    assert len({combined, combine_fingerprints(["bb", "aa"]), combine_fingerprints(["aa"])}) == 3
