"""Reads weight files of other frameworks as arrays by name. No code contained in a weights file is ever executed.

`.pth` of PyTorch (both of its formats) and `.pkl` of Detectron2 are pickles. A restricted unpickler reads them, which
accepts the parts of arrays and nothing else, without PyTorch and without NumPy's own unpickling. `.h5` and `.keras`
need h5py, which TensorFlow brings along, `.safetensors` the optional package of this name. `write_torch` writes the
first of these formats.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from config import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of PyTorch's format before 1.6
H5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_PICKLE_BYTES = 2**26  # in PyTorch's zip archives, whose pickle holds names and shapes but no numbers
# PyTorch's storage classes and their dtypes.
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}


class WeightsFileError(UserError):
    """A weights file that cannot be read, has an unknown format, or holds objects that are no weights."""

    exit_code = 5


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a weights file; its content determines the format, not its name.

    Returns:
        {name: array}; the names of nested dicts and groups are joined by "/"
    Raises:
        WeightsFileError: the file cannot be read, or is no weights file.
    """
    try:
        with open(path, "rb") as file:
            arrays = _reader(file)(file)
    except WeightsFileError as error:
        raise WeightsFileError(f"{path}: {error}") from error
    except Exception as error:  # unpickling, unzipping and h5py raise errors of no common class on damaged files
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
        state = "can't be read" if isinstance(error, OSError) else "is cut off or damaged"
        raise WeightsFileError(f"{path} {state}: {reason}") from error
    if not arrays:
        raise WeightsFileError(f"{path} holds no arrays by name")
    return arrays


def _reader(file):
    """The function that reads an open file, chosen by the first bytes."""
    start = file.read(9)
    file.seek(0)
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            raise WeightsFileError("it begins as a zip archive, but is cut off or damaged")
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if "model.weights.h5" in names:
            return _read_keras_archive
        if any(name.endswith("/data.pkl") for name in names):
            return _read_torch_zip
        raise WeightsFileError(
            "it is a zip archive of an unknown kind; .npz files are this project's own and need no conversion"
        )
    if start.startswith(H5_MAGIC):
        return _read_h5
    if start[8:] == b"{":  # after the length of the header
        return _read_safetensors
    if start[:1] == b"\x80" or start[:2] in (b"(d", b"}q"):
        return _read_pickle
    raise WeightsFileError("it is no .pth, .pkl, .safetensors, .h5 or .keras file")


# ------------------------------------------------------------------------------------------------------ pickles


class _Unpickler(pickle.Unpickler):
    """Accepts only the globals of a table, and maps each to a function of this file or a built-in type."""

    def __init__(self, file, admitted):
        super().__init__(file, encoding="latin1")  # the strings of Python 2, of which some are bytes
        self._admitted = admitted

    def find_class(self, module, name):
        """The replacement of a global; raises WeightsFileError if it is not in the table."""
        if (module, name) not in self._admitted:
            raise WeightsFileError(
                f"it holds {module}.{name}, which is not run because weights need no such object; if it is a whole "
                "model or a training checkpoint, save the weights alone: torch.save(model.state_dict(), FILE)"
            )
        return self._admitted[module, name]

    def persistent_load(self, pid):
        """The _Storage of a reference to numbers outside the pickle."""
        kind, (code,), key, _, count, *view = pid
        if kind != "storage" or view not in ([], [None]) or code not in STORAGES.values():
            raise WeightsFileError("it refers to data of an unknown kind")
        return _Storage(str(key), np.dtype(code).newbyteorder("<"), int(count))


def _flatten(tree, make_array, prefix=""):
    """Flattens nested dicts to {name: array}, without other values, such as an optimizer's numbers and texts."""
    arrays = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            arrays.update(_flatten(value, make_array, f"{prefix}{name}/"))
        elif isinstance(value, (_Tensor, _PickledArray)):
            arrays[f"{prefix}{name}"] = make_array(value)
    return arrays


class _Storage(NamedTuple):
    """A reference to an array of numbers outside the pickle."""

    key: str  # its name in the file
    dtype: np.dtype
    count: int  # numbers


class _Tensor(NamedTuple):
    """A view into a storage, as torch.as_strided describes it."""

    storage: _Storage
    offset: int  # in numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in numbers

    def array(self, numbers):
        """Copies the tensor out of `numbers`, its storage's; raises WeightsFileError if it lies outside of them."""
        if len(self.shape) != len(self.stride) or min(self.offset, *self.shape, *self.stride, 0) < 0:
            raise WeightsFileError("it describes a tensor of impossible shape")
        count = math.prod(self.shape)
        end = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) + 1
        if count > len(numbers) or (count and end > len(numbers)):
            raise WeightsFileError("it describes a tensor larger than its data")
        if not count:
            return np.zeros(self.shape, numbers.dtype)
        strides = [step * numbers.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides, writeable=False).copy()


class _PickledArray:
    """Stands for a NumPy array while its pickle is read, because NumPy's own unpickling trusts the file."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def array(self):
        """The array; raises WeightsFileError if it holds other values than numbers."""
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        if not isinstance(data, bytes | bytearray):
            raise WeightsFileError("it holds arrays of objects")
        order = "F" if self.is_fortran else "C"
        return np.frombuffer(data, self.dtype.numpy_dtype()).reshape(self.shape, order=order).copy(order="C")


class _PickledDtype:
    """Stands for a NumPy dtype while its pickle is read."""

    def __init__(self, code):
        self.code, self.byte_order = code, "<"

    def __setstate__(self, state):
        self.byte_order = state[1]

    def numpy_dtype(self):
        """The np.dtype; raises WeightsFileError if it is not one of numbers."""
        code = self.code.decode() if isinstance(self.code, bytes) else self.code
        if not re.fullmatch("[fiub][1248]", code) or self.byte_order not in ("<", ">", "|"):
            raise WeightsFileError(f"it holds arrays of type {code!r}, no numbers")
        return np.dtype(code).newbyteorder(self.byte_order)


def _array_from_buffer(data, dtype, shape, order):
    """The _PickledArray of a NumPy array in a pickle of protocol 5."""
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _encode_latin1(text, encoding):
    """The bytes that Python 3 writes as text into pickles of protocol 2."""
    if encoding != "latin1":
        raise WeightsFileError(f"it holds bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# The names that a pickle may contain, and their replacements: functions and built-in types, whose attributes a pickle
# cannot change to any effect.
TORCH = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): lambda *view: _Tensor(*view[:4]),
    ("torch._utils", "_rebuild_tensor_v2"): lambda *view: _Tensor(*view[:4]),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): (code,) for name, code in STORAGES.items()},
}
NUMPY = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): lambda code, *_: _PickledDtype(code),
    ("numpy", "ndarray"): "ndarray",
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _PickledArray() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): lambda *_: None for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}


def _read_torch_zip(file):
    """Reads PyTorch's format since 1.6: a zip archive, not compressed, of a pickle and one file for each storage."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        folder = pickled.filename.removesuffix("data.pkl")
        if pickled.file_size > MAX_PICKLE_BYTES or any(i.compress_type != zipfile.ZIP_STORED for i in archive.filelist):
            raise WeightsFileError("it is compressed, or its pickle is too large, unlike in a file of PyTorch")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise WeightsFileError("it was written on a big-endian machine")
        tree = _Unpickler(io.BytesIO(archive.read(pickled)), TORCH).load()

        def make_array(tensor):
            numbers = np.frombuffer(archive.read(f"{folder}data/{tensor.storage.key}"), tensor.storage.dtype)
            return tensor.array(numbers)

        return _flatten(tree, make_array)


def _read_pickle(file):
    """Reads a bare pickle: of NumPy arrays, or PyTorch's format before 1.6."""
    first = _Unpickler(file, NUMPY).load()
    if first == LEGACY_MAGIC:
        return _read_torch_legacy(file)
    return _flatten(first, _PickledArray.array)


def _read_torch_legacy(file):
    """Reads PyTorch's format before 1.6, after its magic number: a protocol number, properties of the machine, the
    tensors, the keys of the storages, and for each key in this order its count and its numbers."""
    _, machine, tree, keys = (_Unpickler(file, TORCH).load() for _ in range(4))
    if not machine.get("little_endian"):
        raise WeightsFileError("it was written on a big-endian machine")
    tensors = _flatten(tree, lambda tensor: tensor)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    numbers = {}
    for key in map(str, keys):
        if key not in storages:
            raise WeightsFileError(
                "it holds data that belongs to no tensor: a training checkpoint? Save the weights alone"
            )
        (count,) = struct.unpack("<q", file.read(8))
        data = file.read(storages[key].count * storages[key].dtype.itemsize)
        numbers[key] = np.frombuffer(data, storages[key].dtype)
        if not len(numbers[key]) == count == storages[key].count:
            raise WeightsFileError("it is cut off or damaged")
    return {name: tensor.array(numbers[tensor.storage.key]) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------ HDF5


def _read_h5(file):
    """Reads Keras's `.h5`, with names like "LAYER/LAYER/kernel", or `.weights.h5`, with "LAYER/0", "LAYER/1" ..."""
    import h5py  # here, because its import takes time and only Keras's files need it

    arrays = {}

    def visit(name, item):  # h5py visits only the file itself, and follows no links to other files
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual or item.dtype.kind not in "fiu":
            raise WeightsFileError(f"{name} is no array of numbers within the file")
        if item.nbytes > item.id.get_storage_size():
            raise WeightsFileError(f"{name} is compressed, unlike in a file of Keras")
        folder, _, leaf = name.rpartition("/")
        if folder.endswith("/vars"):
            folder = item.parent.attrs.get("name", folder)
        arrays[f"{folder}/{leaf.removesuffix(':0')}"] = item[()]

    with h5py.File(file, "r") as tree:
        tree.visititems(visit)
    return arrays


def _read_keras_archive(file):
    """Reads `.keras`, a zip archive that holds a `.weights.h5`."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("model.weights.h5")
        if info.compress_type != zipfile.ZIP_STORED:
            raise WeightsFileError("it is compressed, unlike a file of Keras")
        return _read_h5(io.BytesIO(archive.read(info)))


# ------------------------------------------------------------------------------------------------------ safetensors


def _read_safetensors(file):
    """Reads the format of the package safetensors: a header in JSON, and the numbers."""
    try:
        from safetensors import numpy as safetensors  # here, because it is optional
    except ImportError:
        raise WeightsFileError("it needs one more package: .venv/bin/pip install safetensors") from None
    return safetensors.load(file.read())


# ------------------------------------------------------------------------------------------------------ writing


def write_torch(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays of float32 or int64 by name as a state dict, in PyTorch's format since 1.6, without PyTorch.

    Args:
        file: open for writing.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle_of(arrays))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array, _code(array)).tobytes())
        archive.writestr("archive/version", "3\n")


def _pickle_of(arrays):
    """The pickle of an OrderedDict of tensors, bytes. Written opcode by opcode (protocol 2), because `pickle` only
    writes classes that it can import."""
    body = [b"\x80\x02", b"ccollections\nOrderedDict\n", b")R("]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [stride // 8 for stride in np.empty(array.shape).strides]
        (kind,) = (name.encode() for name, code in STORAGES.items() if f"<{code}" == _code(array))
        storage = [_text("storage"), b"ctorch\n" + kind + b"\n", _text(str(key)), _text("cpu"), _integer(array.size)]
        body += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"("]
        body += [b"(", *storage, b"tQ", _integer(0), _tuple(array.shape), _tuple(strides)]
        body += [b"\x89", b"ccollections\nOrderedDict\n)R", b"tR"]
    return b"".join([*body, b"u."])


def _code(array):
    """The code of the dtype in which an array is written: float32, but integers as they are."""
    return "<i8" if array.dtype == np.int64 else "<f4"


def _text(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value):
    return b"J" + struct.pack("<i", value)


def _tuple(values):
    return b"(" + b"".join(map(_integer, values)) + b"t"
