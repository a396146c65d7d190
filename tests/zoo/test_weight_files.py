"""Guards of the readers of weights: foreign, compressed, oversized and damaged files are refused in one line."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from zoo import files

REAL = Path(__file__).parents[1] / "data" / "torch"
ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "a.bias": np.float32([1, -2, 0.5])}


def refusal(path, reader=files.read):
    """The message of the WeightsFileError that reading a file must raise."""
    with pytest.raises(files.WeightsFileError) as error:
        reader(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert error.value.exit_code == 5
    return message


def torch_members(arrays=ARRAYS):
    """{name: content} of the archive that holds the arrays."""
    file = io.BytesIO()
    files.write_torch(file, arrays)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compressed=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return path


# --------------------------------------------------------------------------------------------- PyTorch's archives


def test_an_archive_is_read_back(tmp_path):
    arrays = files.read(write_zip(tmp_path / "a.pth", torch_members()))
    assert list(arrays) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], expected)
        assert arrays[name].dtype == np.float32 and arrays[name].flags.writeable


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "archive/data/1", "archive/byteorder", "other"])
def test_one_compressed_member_is_enough_to_refuse(name, tmp_path):
    """A small file could otherwise unpack to any size."""
    members = {**torch_members(), "other": b"0" * 100}
    write_zip(tmp_path / "a.pth", members)
    assert files.read(tmp_path / "a.pth").keys() == ARRAYS.keys()
    assert "it is compressed" in refusal(write_zip(tmp_path / "b.pth", members, [name]))


def test_a_pickle_may_be_of_the_largest_size_and_no_larger(tmp_path, monkeypatch):
    members = torch_members()
    write_zip(tmp_path / "a.pth", members)
    monkeypatch.setattr(files, "MAX_PICKLE_BYTES", len(members["archive/data.pkl"]))
    assert files.read(tmp_path / "a.pth").keys() == ARRAYS.keys()
    monkeypatch.setattr(files, "MAX_PICKLE_BYTES", len(members["archive/data.pkl"]) - 1)
    assert "its pickle is too large" in refusal(tmp_path / "a.pth")


def test_the_limit_of_the_pickle_is_64_mib():
    assert files.MAX_PICKLE_BYTES == 64 * 1024 * 1024


def test_the_byte_order_is_little_or_not_stated(tmp_path):
    members = torch_members()
    members["archive/byteorder"] = b"big"
    assert "big-endian" in refusal(write_zip(tmp_path / "a.pth", members))
    del members["archive/byteorder"]
    assert files.read(write_zip(tmp_path / "b.pth", members)).keys() == ARRAYS.keys()


def test_an_archive_has_one_pickle_and_all_storages(tmp_path):
    members = torch_members()
    assert "damaged" in refusal(write_zip(tmp_path / "a.pth", {**members, "second/data.pkl": b"\x80\x02}."}))
    del members["archive/data/1"]
    assert "archive/data/1" in refusal(write_zip(tmp_path / "b.pth", members))


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path):
    members = torch_members()
    members["archive/data/0"] = members["archive/data/0"][:-4]
    assert "larger than its data" in refusal(write_zip(tmp_path / "a.pth", members))


@pytest.mark.parametrize("name", ["notes.txt", "arr_0.npy", "data.pkl"])
def test_other_archives_are_named_as_such(name, tmp_path):
    assert "zip archive of an unknown kind" in refusal(write_zip(tmp_path / "a.zip", {name: b"x"}))


def test_a_zip_archive_without_its_directory_is_damaged(tmp_path):
    path = write_zip(tmp_path / "a.pth", torch_members())
    path.write_bytes(path.read_bytes()[:-30])
    assert "it begins as a zip archive, but is cut off or damaged" in refusal(path)


@pytest.mark.parametrize(
    ("pid", "accepted"),
    [
        (("storage", ("f4",), "0", "cpu", 3), True),
        (("storage", ("f4",), "0", "cpu", 3, None), True),
        (("module", ("f4",), "0", "cpu", 3), False),
        (("storage", ("c8",), "0", "cpu", 3), False),
        (("storage", ("f4",), "0", "cpu", 3, ("view", 0, 1)), False),
    ],
)
def test_only_plain_storages_are_referred_to(pid, accepted):
    unpickler = files._Unpickler(io.BytesIO(), files.TORCH)
    if accepted:
        assert unpickler.persistent_load(pid) == files._Storage("0", np.dtype("<f4"), 3)
    else:
        with pytest.raises(files.WeightsFileError, match="data of an unknown kind"):
            unpickler.persistent_load(pid)


def test_storage_classes_have_their_types():
    sizes = {name: np.dtype(code) for name, code in files.STORAGES.items()}
    assert sizes == {
        "DoubleStorage": np.float64,
        "FloatStorage": np.float32,
        "HalfStorage": np.float16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "expected"),
    [
        (0, (4,), (1,), [0, 1, 2, 3]),  # up to the last number
        (3, (1,), (9,), [3]),
        (1, (2,), (2,), [1, 3]),
        (1, (4,), (1,), None),
        (2, (2,), (2,), None),
        (0, (5,), (0,), None),  # more numbers than the data, all of them the first
        (0, (2, 2), (2,), None),
        (-1, (2,), (1,), None),
        (0, (-1,), (1,), None),
        (3, (2,), (-1,), None),
    ],
)
def test_a_tensor_lies_within_its_data(offset, shape, stride, expected):
    numbers = np.arange(4, dtype=np.float32)
    tensor = files._Tensor(files._Storage("0", np.dtype("<f4"), 4), offset, shape, stride)
    if expected is None:
        with pytest.raises(files.WeightsFileError, match="a tensor "):
            tensor.array(numbers)
    else:
        assert tensor.array(numbers).tolist() == expected


# ------------------------------------------------------------------------------------ PyTorch's format before 1.6


def legacy_objects():
    """The five pickles of the file that PyTorch wrote, as bytes, and what follows them."""
    content, parts, start = (REAL / "state_dict_legacy.pth").read_bytes(), [], 0
    file = io.BytesIO(content)
    for _ in range(5):
        files._Unpickler(file, files.TORCH).load()
        parts.append(content[start : file.tell()])
        start = file.tell()
    return parts, content[start:]


def write_legacy(path, parts, data):
    path.write_bytes(b"".join(parts) + data)
    return path


def test_a_legacy_file_of_a_big_endian_machine_is_refused(tmp_path):
    parts, data = legacy_objects()
    for machine in ({"little_endian": False}, {}):
        parts[2] = pickle.dumps(machine, protocol=2)
        assert "big-endian" in refusal(write_legacy(tmp_path / "a.pth", parts, data))


def test_a_legacy_file_states_the_count_of_each_storage(tmp_path):
    parts, data = legacy_objects()
    (count,) = struct.unpack("<q", data[:8])
    for wrong in (count - 1, count + 1):
        path = write_legacy(tmp_path / "a.pth", parts, struct.pack("<q", wrong) + data[8:])
        assert "cut off or damaged" in refusal(path)
    assert "damaged" in refusal(write_legacy(tmp_path / "a.pth", parts, data[:-4]))


def test_a_legacy_file_has_no_data_of_other_objects(tmp_path):
    parts, data = legacy_objects()
    keys = pickle.loads(parts[4])
    parts[4] = pickle.dumps([*keys, "12345"], protocol=2)
    path = write_legacy(tmp_path / "a.pth", parts, data + struct.pack("<q", 0))
    assert "data that belongs to no tensor" in refusal(path)


# -------------------------------------------------------------------------------------------- pickles of arrays


@pytest.mark.parametrize("dtype", ["c8", "U3", "S3", "M8[s]", "V4"])
def test_arrays_of_other_values_than_numbers_are_refused(dtype, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.zeros(2, dtype)}, protocol=2))
    assert "no numbers" in refusal(tmp_path / "a.pkl")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i4", "u1", "u8", "b1", ">f4", ">i8"])
def test_arrays_of_numbers_keep_their_values(dtype, tmp_path):
    expected = np.arange(6).reshape(2, 3).astype(dtype)
    for order in "CF":
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.asarray(expected, order=order)}, protocol=4))
        found = files.read(tmp_path / "a.pkl")["a"]
        np.testing.assert_array_equal(found, expected)
        assert found.flags.c_contiguous and found.flags.writeable and found.dtype == expected.dtype


def test_bytes_in_texts_have_one_encoding():
    assert files._encode_latin1("\xe9", "latin1") == b"\xe9"
    with pytest.raises(files.WeightsFileError, match="bytes in the encoding 'utf-8'"):
        files._encode_latin1("\xe9", "utf-8")


def test_values_that_are_no_arrays_are_left_out(tmp_path):
    tree = {"a": {"b": {"w": np.ones(2)}, "lr": 0.1}, "epoch": 3, "names": ["x", np.ones(1)], "scalar": np.float32(3)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    assert list(files.read(tmp_path / "a.pkl")) == ["a/b/w"]


def test_an_old_pickle_begins_without_a_protocol(tmp_path):
    """Protocols 0 and 1 of a dict; they are read as pickles, and what is no text of today is named."""
    for protocol in (0, 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({}, protocol=protocol))
        assert "holds no arrays by name" in refusal(tmp_path / "a.pkl")


# --------------------------------------------------------------------------------------------------------- HDF5


def test_arrays_of_an_h5_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["conv/conv/kernel:0"] = ARRAYS["a.weight"]
        file["norm/vars/0"] = ARRAYS["a.bias"]
        file["norm"].attrs["name"] = "of the layer"
        file["norm/vars"].attrs["name"] = "bn"
    arrays = files.read(tmp_path / "a.h5")
    assert arrays.keys() == {"conv/conv/kernel", "bn/0"}
    np.testing.assert_array_equal(arrays["conv/conv/kernel"], ARRAYS["a.weight"])
    np.testing.assert_array_equal(arrays["bn/0"], ARRAYS["a.bias"])


def make_dataset(kind, file, folder):
    numbers = np.zeros(1000, np.float32)
    if kind == "compressed":
        file.create_dataset("x", data=numbers, compression="gzip")
    elif kind == "never written":
        file.create_dataset("x", (10**6,), "f4")
    elif kind == "external":
        (folder / "secret").write_bytes(numbers.tobytes())
        file.create_dataset("x", (1000,), "f4", external=[(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((1000,), "f4")
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (1000,))
        file.create_virtual_dataset("x", layout)
    else:
        file.create_dataset("x", data=np.array([b"text"] * 3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("compressed", "x is compressed, unlike in a file of Keras"),
        ("never written", "x is compressed"),
        ("external", "x is no array of numbers within the file"),
        ("virtual", "x is no array of numbers within the file"),
        ("text", "x is no array of numbers within the file"),
    ],
)
def test_an_h5_file_holds_its_numbers_itself(kind, message, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        make_dataset(kind, file, tmp_path)
    assert message in refusal(tmp_path / "a.h5")


def test_a_keras_archive_is_not_compressed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/kernel"] = ARRAYS["a.weight"]
    members = {"model.weights.h5": (tmp_path / "a.h5").read_bytes(), "config.json": b"{}"}
    arrays = files.read(write_zip(tmp_path / "a.keras", members, ["config.json"]))
    np.testing.assert_array_equal(arrays["a/kernel"], ARRAYS["a.weight"])
    assert "it is compressed" in refusal(write_zip(tmp_path / "b.keras", members, ["model.weights.h5"]))


# ------------------------------------------------------------------------------------------------------- errors


def test_files_that_cannot_be_opened_are_named(tmp_path):
    assert "can't be read: No such file or directory" in refusal(tmp_path / "none.pth")
    assert "can't be read: Is a directory" in refusal(tmp_path)


def test_a_written_file_has_pytorchs_members(tmp_path):
    """The same names, byte order and format version as in the file that PyTorch wrote; storages in little-endian."""
    members = torch_members()
    with zipfile.ZipFile(REAL / "state_dict.pth") as archive:
        real = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for name in ("byteorder", "version"):
        assert members[f"archive/{name}"] == real[name]
    for key, array in enumerate(ARRAYS.values()):
        assert members[f"archive/data/{key}"] == struct.pack(f"<{array.size}f", *array.ravel())


def test_real_values_survive_writing(tmp_path):
    expected = json.loads((REAL / "state_dict.json").read_text())
    arrays = {name: np.float32(values) for name, values in expected.items()}
    with open(tmp_path / "a.pth", "wb") as file:
        files.write_torch(file, {name: x.T if x.ndim > 1 else x for name, x in arrays.items()})
    for name, array in files.read(tmp_path / "a.pth").items():
        np.testing.assert_array_equal(array, arrays[name].T if arrays[name].ndim > 1 else arrays[name])
