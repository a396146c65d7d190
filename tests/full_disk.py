"""Something like a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(num_bytes):
    """No file can grow beyond this many bytes: as on a full disk, writing or flushing more raises an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
