"""Weight files: byte for byte coremltools' own, read back as written, and refused where they are damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import PackageError
from diffusion_runtime.mil.constants import to_tensor
from diffusion_runtime.mil.packing import look_up_packed, pack, packed_size, unpack
from diffusion_runtime.mil.program import DType, TensorType, numpy_dtype, packed_bits
from diffusion_runtime.mil.weights import _CODES as CODES
from diffusion_runtime.mil.weights import WeightFile, WeightWriter

WRITE = {  # the method of coremltools' writer
    DType.FLOAT16: "write_fp16_data",
    DType.FLOAT32: "write_float_data",
    **{dtype: f"write_{dtype.value}_data" for dtype in CODES.keys() - {DType.FLOAT16, DType.FLOAT32}},
}
LIMITS = {DType.INT4: (-8, 8), DType.UINT1: (0, 2), DType.UINT2: (0, 4), DType.UINT3: (0, 8), DType.UINT6: (0, 64)}
COUNTS = (1, 5, 64, 77)


def values(dtype: DType, count: int) -> np.ndarray:
    low, high = LIMITS.get(dtype, (0, 16))
    return np.random.default_rng(count).integers(low, high, count).astype(numpy_dtype(dtype))


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[tuple[DType, int], int]]:
    """A file with one blob of each type and length, and their offsets."""
    path = tmp_path / "weight.bin"
    with WeightWriter(path) as writer:
        order = sorted(CODES, key=lambda dtype: dtype.value)
        offsets = {(dtype, count): writer.add(values(dtype, count), dtype) for dtype in order for count in COUNTS}
    return path, offsets


def test_file_is_byte_for_byte_what_coremltools_writes(
    weights: tuple[Path, dict[tuple[DType, int], int]], tmp_path: Path
) -> None:
    path, offsets = weights
    theirs = tmp_path / "theirs.bin"
    writer = import_coremltools("libmilstoragepython")._BlobStorageWriter(str(theirs))
    for (dtype, count), offset in offsets.items():
        array = values(dtype, count)
        given_array = array.view(np.uint16) if dtype is DType.FLOAT16 else array
        assert getattr(writer, WRITE[dtype])(given_array) == offset
    del writer
    assert path.read_bytes() == theirs.read_bytes()


def test_every_blob_reads_back(weights: tuple[Path, dict[tuple[DType, int], int]]) -> None:
    path, offsets = weights
    file = WeightFile(path)
    assert file.count == len(offsets)
    for (dtype, count), offset in offsets.items():
        read = file.read(offset, dtype, (1, count))
        assert read.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(read, values(dtype, count)[None])
    file.release()
    np.testing.assert_array_equal(
        file.read(offsets[DType.FLOAT32, 5], DType.FLOAT32, (5,)), values(DType.FLOAT32, 5)
    )


def test_whole_bytes_are_mapped_read_only_and_tensors_of_them_are_not(
    weights: tuple[Path, dict[tuple[DType, int], int]],
) -> None:
    path, offsets = weights
    before = path.read_bytes()
    array = WeightFile(path).read(offsets[DType.FLOAT32, 64], DType.FLOAT32, (8, 8))
    assert not array.flags.owndata and not array.flags.writeable
    with warnings.catch_warnings(action="error"):
        tensor = to_tensor(array, TensorType(DType.FLOAT32, (8, 8)), torch.float32)
    tensor[:] = 99
    assert path.read_bytes() == before and not (array == 99).any()


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.UINT3, DType.UINT6, DType.INT4])
def test_chunks_give_the_same_file_as_the_whole(dtype: DType, tmp_path: Path) -> None:
    array = values(dtype, 1003)
    for name, data in (("whole", array), ("parts", iter(np.split(array, [1, 4, 500, 501])))):
        with WeightWriter(tmp_path / name) as writer:
            writer.add(data, dtype)
            writer.add(array, dtype)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    if bits := packed_bits(dtype):
        with WeightWriter(tmp_path / "packed") as writer:
            writer.add(pack(array, bits), dtype, array.size)
            writer.add(array, dtype)
        assert (tmp_path / "packed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_writer_refuses_other_types_and_elements_that_do_not_fit(tmp_path: Path) -> None:
    with WeightWriter(tmp_path / "weight.bin") as writer:
        with pytest.raises(ValueError, match="got an array of float64, expected float32"):
            writer.add(np.zeros(3), DType.FLOAT32)
        with pytest.raises(ValueError, match="do not fit in 2 bits"):
            writer.add(np.array([4], np.uint8), DType.UINT2)
        with pytest.raises(ValueError, match="3 bytes are not those of 13 x uint2"):
            writer.add(np.zeros(3, np.uint8), DType.UINT2, 13)
        with pytest.raises(ValueError, match="cannot be stored"):
            writer.add(np.array([4]), DType.INT64)


DAMAGE: dict[str, tuple[Callable[[bytes, int], bytes], int, str]] = {
    "another place": (lambda data, _: data, 32, "expected a multiple of 64"),
    "beyond the end": (lambda data, _: data, 1 << 40, "expected a multiple of 64 from 64"),
    "no mark": (lambda data, at: data[:at] + b"\0\0\0\0" + data[at + 4 :], 0, "got mark 0x0, expected 0xdeadbeef"),
    "another type": (lambda data, at: data[: at + 4] + b"\x04" + data[at + 5 :], 0, "holds int8, expected fp32"),
    "unknown type": (lambda data, at: data[: at + 4] + b"\x63" + data[at + 5 :], 0, "holds type 99, expected fp32"),
    "another size": (lambda data, at: data[: at + 8] + b"\x09" + data[at + 9 :], 0, "holds 9 bytes, expected 20"),
    "data outside": (lambda data, at: data[: at + 18] + b"\xff" + data[at + 19 :], 0, "lies outside the truncated"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_file_and_offset(
    kind: str, weights: tuple[Path, dict[tuple[DType, int], int]]
) -> None:
    path, offsets = weights
    change, moved, message = DAMAGE[kind]
    offset = offsets[DType.FLOAT32, 5]
    path.write_bytes(change(path.read_bytes(), offset))
    with pytest.raises(PackageError, match=message) as caught:
        WeightFile(path).read(offset + moved, DType.FLOAT32, (5,))
    assert f"{path}: blob at offset {offset + moved}" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\0" * 63, "truncated: 63 bytes"),
        (b"\1\0\0\0\1" + b"\0" * 59, "format 1 at offset 4"),
    ],
)
def test_files_of_another_kind_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(data)
    with pytest.raises(PackageError, match=message):
        WeightFile(path)
    with pytest.raises(PackageError, match="cannot be read"):
        WeightFile(tmp_path / "missing.bin")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_packing_and_unpacking_are_inverse(bits: int, count: int, signed: bool, seed: int) -> None:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    array = np.random.default_rng(seed).integers(low, high, count).astype(np.int8 if signed else np.uint8)
    packed = pack(array, bits)
    assert packed.size == packed_size(count, bits)
    np.testing.assert_array_equal(unpack(packed, bits, count, signed), array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_places_are_looked_up_as_unpacked_ones_are(bits: int, dtype: type) -> None:
    random = np.random.default_rng(bits)
    table: np.ndarray = (50 * random.standard_normal(1 << bits)).astype(dtype)
    for count in (0, 1, 5, 8, 13, 4096, (1 << 18) - 1, 9 * (1 << 18) + 7):  # the last by several threads
        places = random.integers(0, 1 << bits, count).astype(np.uint8)
        found = look_up_packed(pack(places, bits) if bits < 8 else places, table, bits, count)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, table[places])
    places = random.integers(0, 1 << bits, (4, 6)).astype(np.uint8)
    packed = pack(places, bits) if bits < 8 else places.view(np.int8)
    turned = table[:, None].astype(table.dtype.newbyteorder(">"))
    np.testing.assert_array_equal(look_up_packed(packed, turned, bits, 24), table[places].ravel())
    with pytest.raises(ValueError, match=f"8 elements of {bits} bits need {bits} bytes, got {bits - 1}"):
        look_up_packed(np.zeros(bits - 1, np.uint8), table, bits, 8)


def test_packing_goes_on_across_blocks() -> None:
    array = np.random.default_rng(0).integers(0, 64, (1 << 20) + 11).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(array, 6), 6, array.size), array)
    with pytest.raises(ValueError, match="need 2 bytes, got 1"):
        unpack(np.zeros(1, np.uint8), 6, 2)
