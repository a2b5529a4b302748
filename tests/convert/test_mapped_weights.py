"""Weights are mapped from their files: they are read one by one, and do not fill the memory when they were."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_convert import ConvertOptions, Event, Phase, convert
from diffusion_convert.checkpoint import tensor_file, torch_networks
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.tensor_file import expect, let_go
from diffusion_convert.components import table
from diffusion_convert.components.component import Shape
from diffusion_convert.export import export as export_module
from diffusion_convert.export import placeholders
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.verification.compare import widened
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.program import Metadata

WIDTH, LAYERS = 2048, 8  # 8.4 MB each


PAGES_AROUND = 16
"""Of a large tensor, that a neighbour may have had read."""


def in_cache(tensor: torch.Tensor) -> list[bool]:
    """Whether the system has each page in its cache, of those that are the tensor's alone."""
    pages = tensor.nbytes // mmap.PAGESIZE - 1
    found = (ctypes.c_ubyte * pages)()
    address = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    return [bool(page & 1) for page in found]


def mapped_bytes() -> int:
    """How much of the files that this process has mapped lies in its memory."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such advice")
def test_a_network_is_not_in_memory_after_it_has_run(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).half()
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "x.safetensors"
    )
    network.load_state_dict(tensor_file.read(tmp_path / "x.safetensors").tensors, assign=True)
    before = mapped_bytes()
    with widened(network), torch.no_grad():
        network(torch.ones(1, WIDTH))
    assert mapped_bytes() - before < 2 * WIDTH * WIDTH * 2


def test_what_was_let_go_of_is_still_there(tmp_path: Path) -> None:
    save_file({"mapped": torch.arange(100_000.0)}, tmp_path / "x.safetensors")
    mapped = tensor_file.read(tmp_path / "x.safetensors").tensors["mapped"]
    written = tensor_file.read(tmp_path / "x.safetensors").tensors["mapped"]
    written.add_(1)  # of its own memory, as the file is not written to
    own = torch.arange(100_000.0)
    for tensor in (mapped, written, own, own[5:7], torch.zeros(0)):
        let_go(tensor)
    assert torch.equal(mapped, torch.arange(100_000.0))
    assert torch.equal(written, torch.arange(100_000.0) + 1)
    assert torch.equal(own, torch.arange(100_000.0))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such advice")
def test_what_was_let_go_of_is_not_read_from_the_disk_again(tmp_path: Path) -> None:
    save_file({"mapped": torch.arange(100_000.0)}, tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # what is not on the disk stays anyway
    mapped = tensor_file.read(tmp_path / "x.safetensors").tensors["mapped"]
    mapped.sum()
    before = mapped_bytes()
    let_go(mapped)
    assert mapped_bytes() <= before - 300_000
    assert all(in_cache(mapped))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such advice")
def test_a_large_file_is_not_read_while_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sizes = {f"{index}{kind}": size for index in range(9) for kind, size in (("small", 10), ("wide", 2**21 + 1))}
    save_file({"0": torch.zeros(0), **{name: torch.zeros(size) for name, size in sizes.items()}}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(in_cache(torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8))):
        pytest.skip("this file system keeps what it was told to drop")
    tensors = tensor_file.read(path).tensors
    assert not any(any(in_cache(tensors[f"{index}wide"])[PAGES_AROUND:]) for index in range(9))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such advice")
def test_small_tensors_of_a_large_file_are_read_alone(tmp_path: Path) -> None:
    """And what is expected is read before it is asked for."""
    path = tmp_path / "x.safetensors"
    sizes = {f"{index}{kind}": size for index in range(5) for kind, size in (("small", 10), ("wide", 2**22))}
    save_file({name: torch.zeros(size) for name, size in sizes.items()}, path)
    tensors = tensor_file.read(path).tensors
    small, large = ([tensors[f"{index}{kind}"] for index in range(1, 5)] for kind in ("small", "wide"))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for tensor in tensors.values():
            tensor_file._advise(tensor, mmap.MADV_DONTNEED)  # what is mapped stays in the cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(any(in_cache(tensor)[PAGES_AROUND:]) for tensor in large):
        pytest.skip("this file system keeps what it was told to drop")
    assert float(sum(tensor.sum() for tensor in small)) == 0
    assert not any(any(in_cache(tensor)[PAGES_AROUND:]) for tensor in large)
    expect(large[3])
    deadline = time.monotonic() + 20
    while not all(in_cache(large[3])) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(in_cache(large[3]))


def test_each_weight_is_let_go_of_as_it_is_written(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("sd1")))
    freed: list[int] = []
    monkeypatch.setattr(export_module, "let_go", lambda tensor: freed.append(tensor.numel()))
    options = ExportOptions(AttentionKind.ORIGINAL, Shape(64, 64, 2), "macOS13")
    export(table()["vae_encoder"], checkpoint, options, tmp_path / "x.mlpackage", Metadata())
    large = [
        tensor.numel()
        for name, tensor in checkpoint.models["vae"].tensors().items()
        if name.startswith(("encoder.", "quant_conv."))
        and tensor.ndim > 1
        and tensor.numel() >= placeholders.MIN_SIZE
    ]
    assert sorted(freed) == sorted(large)


class Counting(Mapping[str, torch.Tensor]):
    """Weights that are computed when they are read; ``most`` is how many there were at once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self._alive, self.most = tensors, WeakSet[torch.Tensor](), 0

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._tensors[name].clone()
        self._alive.add(value)
        self.most = max(self.most, len(self._alive))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_weights_are_checked_one_by_one(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = open_checkpoint(str(tiny_checkpoint("sd1"))).models["vae"]
    counting = Counting(model.tensors())
    torch_networks.check(model, counting, "vae")
    assert 1 <= counting.most <= 2  # the next is there before the last one's name is taken


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_package_stays_mapped_when_it_has_been_palettized(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """SDXL's UNet in 16 and in 6 bits and the network that comes next are more than 8 GB has room for."""
    mapped: list[str] = []

    def look(event: Event) -> None:
        if event.phase is Phase.COMPILE:
            mapped.extend(x for x in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in x)

    options = ConvertOptions("original", components="text_encoder", nbits=6)
    gc.disable()  # what it would find by chance
    try:
        convert(tiny_checkpoint("sd1"), tmp_path, options, look)
    finally:
        gc.enable()
    assert mapped == []


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc")
def test_memory_of_which_nothing_is_told_is_not_taken_for_a_files() -> None:
    """Given up, it would be zeros: what a system that hides its pages says of all of them."""
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE) as untouched:
        start = ctypes.addressof(place := ctypes.c_char.from_buffer(untouched))
        assert not tensor_file._is_as_in_file(start, 1 << 20)
        del place
