"""Still images from files, as people see them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from paravt_jax.fetched import local_file
from paravt_jax.records import ImageRef
from pipelines.arrays import Picture


def read_image(image: ImageRef) -> Picture:
    """The pixels of an image file, turned upright as its EXIF data say.

    Raises:
        ValueError: the file cannot be read, or has more pixels than Pillow believes (179 million).
    """
    with local_file(image.path) as path:
        return decode_image(path, f"image {image.path}")


def decode_image(source: str | io.BytesIO, name: str) -> Picture:
    """As `read_image`, from a path or from the bytes of a file; errors call it `name`."""
    try:
        with Image.open(source) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; make it smaller") from error
    # Pillow's readers raise all of these about damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: {error}; check the file") from error
