"""Grey pictures in the place of those of the rows, to see whether a model looks at them at all.

Owns what a blank picture is: of the same size, so that all tokens and positions stay what they were.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from loralab.data.example import ImageFile
from loralab.data.images.processor import PictureProcessor

# Not the middle of all grey: some families take a picture whose numbers are all 0 for padding.
GREY = (128, 128, 128)


class BlankPictures(PictureProcessor):
    """A processor to which every picture is grey; its files are not opened."""

    def read(self, files: Sequence[ImageFile]) -> dict[str, Tensor]:
        """Return the tensors that the model's vision tower takes of grey pictures of the same sizes.

        Args:
            files: at least one.
        """
        return self.join([self._pixels(Image.new("RGB", (file.width, file.height), GREY)) for file in files])


def blanked(pictures: PictureProcessor) -> BlankPictures:
    """Return the same processor, to which every picture is grey."""
    return BlankPictures(pictures.processor, pictures.min_pixels, pictures.max_pixels)
