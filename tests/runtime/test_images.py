"""Pictures in and out, against diffusers' own image processor where there is one."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from diffusion_runtime import images
from diffusion_runtime.errors import InputError, StorageError


def noise_picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 80), (33, 70)])
def test_pictures_become_what_diffusers_makes_of_them(width: int, height: int) -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = noise_picture(width, height)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=72, width=48)
    assert torch.allclose(images.to_tensor(picture, 72, 48), expected, atol=1e-6)


def test_height_and_width_are_not_swapped() -> None:
    tall = Image.fromarray(np.repeat(np.arange(90, dtype=np.uint8)[:, None], 30, axis=1))
    tensor = images.to_tensor(tall, 90, 30)
    assert tensor.shape == (1, 3, 90, 30)
    assert float(tensor[0, 0, 0, 0]) < float(tensor[0, 0, 89, 0])


def test_masks_become_what_diffusers_makes_of_them() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    picture = noise_picture(50, 60, "L")
    expected = processor.preprocess(picture, height=64, width=48)
    assert torch.equal(images.to_mask(picture, 64, 48), expected)


def test_arrays_become_what_diffusers_makes_of_them() -> None:
    from diffusers.image_processor import VaeImageProcessor

    values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = VaeImageProcessor().postprocess(values, output_type="pil")
    ours = images.to_pil(images.to_arrays(values))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, expected, strict=True))


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    picture = noise_picture(20, 10)
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "side.jpg", exif=exif)
    assert images.load(tmp_path / "side.jpg").size == (10, 20)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_any_kind_of_picture_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    noise_picture(9, 7, mode).save(tmp_path / "picture.png")
    assert images.load(tmp_path / "picture.png").mode == "RGB"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path, mode: str) -> None:
    grey = noise_picture(9, 7, "L")
    Image.fromarray(np.asarray(grey, np.uint16) * np.uint16(257)).save(tmp_path / "deep.png")
    read = images.load(tmp_path / "deep.png", mode=mode)
    assert read.mode == mode and np.array_equal(np.asarray(read.convert("L")), np.asarray(grey))
    deep = Image.open(tmp_path / "deep.png")
    assert torch.equal(images.to_mask(deep, 7, 9), images.to_mask(grey, 7, 9))
    assert torch.equal(images.to_tensor(deep, 7, 9), images.to_tensor(grey, 7, 9))


def test_pictures_of_unknown_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"--mask .*float\.tif: the picture is made of 32-bit numbers"):
        images.load(tmp_path / "float.tif", "--mask", "L")


@pytest.mark.parametrize("kind", ["1", "RGB", "RGBA", "alpha"])
def test_a_mask_of_any_kind_marks_the_same(tmp_path: Path, kind: str) -> None:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 16, 12))
    white = Image.new("L", mask.size, 255)
    drawn = Image.merge("RGBA", [white, white, white, mask]) if kind == "alpha" else mask.convert(kind)
    drawn.save(tmp_path / "mask.png")
    for read in (drawn, images.load(tmp_path / "mask.png", "--mask", "L")):
        assert torch.equal(images.to_mask(read, 16, 16), images.to_mask(mask, 16, 16))


def bad_files(folder: Path) -> dict[str, Path]:
    noise_picture(64, 64).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    return {"cut": folder / "cut.png", "text": folder / "text.png", "empty": folder / "empty.png"}


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_what_is_no_picture_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=rf"--image .*{kind}\.png: (damaged|not a picture)") as caught:
        images.load(bad_files(tmp_path)[kind], "--image")
    assert "\n" not in str(caught.value)


def test_a_missing_picture_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        images.load(tmp_path / "none.png")
    with pytest.raises(InputError, match="not a file"):
        images.load(tmp_path)


def test_a_picture_carries_how_it_was_made(tmp_path: Path) -> None:
    record = {"prompt": "ein Kätzchen 🐱", "seed": 7, "none": None}
    images.write_png(noise_picture(8, 8), tmp_path / "new" / "folder" / "p.png", record)
    assert images.read_metadata(tmp_path / "new" / "folder" / "p.png") == record


def test_a_picture_without_a_record_says_so(tmp_path: Path) -> None:
    noise_picture(8, 8).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match="does not say how it was made"):
        images.read_metadata(tmp_path / "plain.png")


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError, match=r"p\.png: the disk is full"):
        images.write_png(noise_picture(8, 8), tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_is_known_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="is not a folder"):
        images.check_writable(tmp_path / "file" / "p.png")
    with pytest.raises(InputError, match="is a folder; expected the name"):
        images.check_writable(tmp_path)
    images.check_writable(tmp_path / "to" / "be" / "made.png")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_pictures_of_the_time_before_the_new_name_still_tell_how_they_were_made(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("coreml-diffusion", '{"seed": 3}')
    noise_picture(8, 8).save(tmp_path / "old.png", pnginfo=info)
    assert images.read_metadata(tmp_path / "old.png") == {"seed": 3}


def other(picture: Image.Image, kind: str, path: Path) -> None:
    """A file that Pillow would open in a format that is not ours, under any name."""
    if kind == "EPS":  # Pillow hands it to Ghostscript
        picture.save(path, format="EPS")
    elif kind == "XPM":
        path.write_text('/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #ff0000",\n"a"\n};\n')
    else:
        picture.save(path, format=kind)


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "PCX", "ICO", "SGI", "PDF", "XPM", "IM", "MSP"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".eps", ""])
def test_other_formats_are_not_opened_whatever_they_are_called(
    tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    path = tmp_path / f"picture{suffix}"
    other(noise_picture(8, 8, "1" if kind == "MSP" else "RGB"), kind, path)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    with pytest.raises(InputError, match=r"--image .*: not a picture that can be read; expected one of PNG, JPEG"):
        images.load(path, "--image")
    with pytest.raises(InputError, match=r"not a picture that can be read; expected one of PNG$"):
        images.read_metadata(path)


@pytest.mark.parametrize("kind", images.FORMATS)
@pytest.mark.parametrize("suffix", [".png", ".eps", ""])
def test_content_says_what_a_picture_is(tmp_path: Path, kind: str, suffix: str) -> None:
    picture = noise_picture(16, 8)
    picture.save(tmp_path / f"picture{suffix}", format=kind)
    assert images.load(tmp_path / f"picture{suffix}").size == (16, 8)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (1, 2**31 - 1), (10_001, 10_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "large.png"
    noise_picture(8, 8).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"pixels: expected at most 100 million|exceeds limit of"):
        images.load(path)


@pytest.mark.parametrize("name", ["a\0b.png", "\udc80.png", "a\ud800.png"])
def test_names_that_are_no_unicode_are_refused(tmp_path: Path, name: str) -> None:
    for use in (images.load, images.read_metadata, images.check_writable):
        with pytest.raises(InputError, match="the name is not valid Unicode") as caught:
            use(tmp_path / name)
        str(caught.value).encode("utf-8")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(InputError, match="not a file"):
            images.load(path)


def test_the_mask_of_the_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be making a file."""
    before, umask = os.umask(0o027), os.umask
    try:
        monkeypatch.setattr(os, "umask", None)
        images.write_png(noise_picture(8, 8), tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640
    finally:
        umask(before)
