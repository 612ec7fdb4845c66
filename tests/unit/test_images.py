"""Image files: upright, and refused with a reason."""

import numpy as np
import pytest
from PIL import Image

from paravt_jax.records import ImageRef
from pipelines.images import read_image

ORIENTATION = 0x0112
WAYS = {1: 0, 3: 2, 6: 3, 8: 1}
"""EXIF orientations of cameras, and how many quarters to the left make them upright."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
def test_photos_are_upright(orientation, form, tmp_path):
    """A camera that is held upright writes its picture sideways, and how it was held."""
    sideways = np.zeros((40, 60, 3), np.uint8)
    sideways[:20, :30] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = str(tmp_path / f"photo.{form}")
    Image.fromarray(sideways).save(path, exif=exif, quality=95)
    shown = read_image(ImageRef(path)).astype(int)
    assert shown.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    if orientation in WAYS:
        assert np.abs(shown - np.rot90(sideways, WAYS[orientation])).mean() < 3


def huge(path):
    """179 million pixels and more, in 200 KB."""
    Image.new("1", (20000, 10000)).save(path)


def no_image(path):
    path.write_text("no image")


def half(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("make", [huge, no_image, half])
def test_what_cannot_be_read_is_a_value_error_that_names_the_file(make, tmp_path):
    make(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"image .*bad\.png: ") as error:
        read_image(ImageRef(str(tmp_path / "bad.png")))
    assert "\n" not in str(error.value)
