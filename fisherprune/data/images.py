"""One image file as pixels, or one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fisherprune.errors import FisherpruneError

if TYPE_CHECKING:
    from PIL import Image

UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What puts an image upright, by its orientation (EXIF 2.3, section 4.6.4)."""


def read_image(path: str | Path, image_size: int) -> NDArray[np.uint8]:
    """Return an image file as uint8 ``[image_size, image_size, 3]``, RGB.

    Turned upright where it says how it was taken, resized bilinearly with antialiasing.

    Raises:
        FisherpruneError: naming the path, where the file is not a readable image of
            8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            _check_kind(path, image)
            image.load()
            upright = _upright(image).convert("RGB")
        if upright.size != (image_size, image_size):
            upright = upright.resize(
                (image_size, image_size), Image.Resampling.BILINEAR
            )
        return np.asarray(upright)
    except FisherpruneError:
        raise
    except Exception as error:  # damaged files make Pillow raise whatever there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FisherpruneError(
            f"data_dir: {path} is not a readable image: {reason}"
        ) from error


def _check_kind(path: str | Path, image: Image.Image) -> None:
    """Refuse what Pillow would round to 8 bits, or hand to another program."""
    if image.format == "EPS":
        raise FisherpruneError(
            f"data_dir: {path} must be an image of pixels, got EPS, which another"
            " program would have to draw"
        )
    stored = _stored_mode(image)
    if image.mode.startswith(("I", "F")) or ";16" in stored:
        raise FisherpruneError(
            f"data_dir: {path} must have 8 bits a channel, got Pillow mode {stored}"
        )


def _stored_mode(image: Image.Image) -> str:
    """Return the mode in the file: Pillow reads 16-bit colours into 8 bits."""
    for tile in getattr(image, "tile", ()):
        mode, *rest = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if tile[0].startswith("ppm") and rest and rest[0] > 255:
            return f"{mode};16B"
        if isinstance(mode, str) and ";16" in mode:
            return mode
    return image.mode


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; what can't be understood there says nothing.

    Pillow's own ``exif_transpose`` also writes the EXIF anew, which fails for tags of
    a wrong type that no orientation depends on.
    """
    from PIL import ExifTags, Image

    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(Image.Transpose[turn])
