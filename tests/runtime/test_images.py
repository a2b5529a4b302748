"""Pictures in and out, against diffusers' own image processor where there is one."""

from __future__ import annotations

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
    with pytest.raises(InputError, match=rf"--image .*{kind}\.png: .*expected a PNG, JPEG or WebP file") as caught:
        images.load(bad_files(tmp_path)[kind], "--image")
    assert "\n" not in str(caught.value)


def test_a_missing_picture_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        images.load(tmp_path / "none.png")
    with pytest.raises(InputError, match="expected a PNG"):
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
