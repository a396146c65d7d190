"""Errors that data workers, images and data sets share."""

from config import UserError


class DataError(UserError):
    """Data that ended the run, such as a worker that failed or died; the message names the image and the cause."""

    exit_code = 4


class ImageError(DataError):
    """An image file that cannot be used; the message names its path."""
