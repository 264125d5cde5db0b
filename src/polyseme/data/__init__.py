"""Readers of images, and the small real data that the demo uses."""

from polyseme.data.handwritten import digits, mnist
from polyseme.data.images import Images
from polyseme.data.readers import read_images

__all__ = ["Images", "digits", "mnist", "read_images"]
