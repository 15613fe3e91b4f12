"""Pictures from files, which anybody may have made."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import BadInput

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow reads some of the others by starting programs
MOST_PIXELS = 2**24  # a small file may stand for gigabytes


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture that is not decoded yet; raises BadInput for whatever cannot be read, in the block too."""
    if not Path(path).is_file():
        raise BadInput(f"{path} is {'no file' if Path(path).exists() else 'not there'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    what = f"{image.width}x{image.height} are more than {MOST_PIXELS} pixels"
                    raise BadInput(f"{path} is too large ({what}): make it smaller")
                yield image
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(f"{path} is no picture that is read here: give a {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadInput(f"{path} is too large: make it smaller") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path} is no whole picture ({error})") from None


def lightness(image: Image.Image) -> np.ndarray:
    """(h w), 0 to 1, the way up that viewers show it, on black where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which conversion would cut off at 255
        return np.clip(np.asarray(image, dtype=np.float32) / 65535, 0, 1)
    light, opaque = image.convert("RGBA").convert("LA").split()
    return np.asarray(light, dtype=np.float32) / 255 * (np.asarray(opaque, dtype=np.float32) / 255)
