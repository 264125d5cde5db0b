"""Readers of images and texts, and the small real data that the demo uses."""

from polyseme.data.contexts import Contexts, TokenBatch
from polyseme.data.handwritten import digits, mnist
from polyseme.data.images import Images
from polyseme.data.readers import read_images
from polyseme.data.text import Part, Texts, read_text
from polyseme.data.token_texts import pieces

__all__ = [
    "Contexts",
    "Images",
    "Part",
    "Texts",
    "TokenBatch",
    "digits",
    "mnist",
    "pieces",
    "read_images",
    "read_text",
]
