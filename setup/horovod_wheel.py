"""Builds Horovod's wheel from source, once for each combination of versions, and keeps it in a cache.

The cache is $RCNN_WHEEL_CACHE, else wheels/ in $XDG_CACHE_HOME/mask-rcnn or ~/.cache/mask-rcnn. It has one folder for
each key: versions of Horovod, TensorFlow and Python, CPU or GPU, processor. A wheel is installed and imported before it
is renamed into the cache, so the cache contains only complete, working wheels, even if a build is killed.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from progress import SetupError, hold_lock

# TensorFlow 2.20 has moved a header that Horovod includes by its old name. During the build this file replaces it.
# Horovod's code for GPUs needs two more definitions in it: a type that TensorFlow dropped, and two functions that log
# numbers, which TensorFlow's headers declare and its libraries do not export.
OLD_HEADER = "tensorflow/compiler/xla/client/xla_builder.h"
HEADER_TEXT = """\
#pragma once
#include "absl/log/internal/log_message.h"
#include "absl/status/statusor.h"
#include "xla/hlo/builder/xla_builder.h"
namespace xla {
template <typename T>
using StatusOr = absl::StatusOr<T>;
}
namespace absl {
ABSL_NAMESPACE_BEGIN
namespace log_internal {
template LogMessage& LogMessage::operator<<(const int& value);
template LogMessage& LogMessage::operator<<(const float& value);
}
ABSL_NAMESPACE_END
}
"""
SWITCHES = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
}
BUILDING = ".building-"


def cache_folder():
    """Returns the folder of the wheel cache."""
    if "RCNN_WHEEL_CACHE" in os.environ:
        return Path(os.environ["RCNN_WHEEL_CACHE"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-rcnn" / "wheels"


def pinned_version(requirements, name, package):
    """Returns the version of `package` that the file `name` in the folder `requirements` pins."""
    match = re.search(rf"^{re.escape(package)}==(\S+)", (requirements / name).read_text(), re.MULTILINE)
    if not match:
        raise SetupError(f"{requirements / name} pins no version of {package}")
    return match.group(1)


def wheel_folder(requirements, kind, python):
    """Returns the folder for the wheel of these requirements; `kind` is "cpu" or "gpu", `python` like "3.11"."""
    tensorflow = "tensorflow-cpu" if kind == "cpu" else "tensorflow[and-cuda]"
    key = (
        f"horovod-{pinned_version(requirements, 'horovod.txt', 'horovod')}",
        f"tensorflow-{pinned_version(requirements, f'{kind}.txt', tensorflow)}",
        f"python-{python}",
        kind,
        platform.machine(),
    )
    return cache_folder() / "_".join(key)


def cached_wheel(folder):
    """Returns the path of the wheel in the cache folder, or None."""
    return next(iter(sorted(folder.glob("horovod-*.whl"))), None)


def cuda_toolkit():
    """Returns the folder of the CUDA toolkit that has the compiler nvcc, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
    return next((Path(folder) for folder in candidates if folder and (Path(folder) / "bin" / "nvcc").exists()), None)


def check_compiler(folder, kind):
    """Raises SetupError if the cache folder has no wheel and a compiler for its build is missing."""
    if cached_wheel(folder) is not None:
        return
    check = [Path(__file__).with_name("prerequisites"), "compiler"]
    if subprocess.run(check, stdout=subprocess.DEVNULL).returncode:
        raise SetupError("Horovod can't be built yet (`make demo` and `make test-fast` do without it)")
    if kind == "gpu" and cuda_toolkit() is None:
        raise SetupError("Horovod for GPUs needs nvcc: install NVIDIA's CUDA toolkit 12, name its folder in CUDA_HOME")


@contextlib.contextmanager
def locked(cache):
    """Locks the wheel cache against builds of other checkouts, and removes the remains of killed builds."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        raise SetupError(f"no wheel cache in {cache} ({error.strerror}): name another in RCNN_WHEEL_CACHE") from error
    with hold_lock(cache / "lock", waiting="Waiting for another checkout's build of Horovod (about 5 minutes) ..."):
        for leftover in cache.glob(BUILDING + "*"):
            shutil.rmtree(leftover)
        yield


def gpu_variables(environment, scratch):
    """Returns the build variables for a GPU machine: its CUDA compiler, and the NCCL among TensorFlow's packages."""
    nccl = next(environment.path.glob("lib/python*/site-packages/nvidia/nccl"), None)
    if nccl is None:
        raise SetupError(f"{environment.path} has no NCCL: run make setup again")
    libraries = scratch / "nccl"
    libraries.mkdir()
    (libraries / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
    toolkit = str(cuda_toolkit())
    return {
        "HOROVOD_CUDA_HOME": toolkit,
        "CUDAToolkit_ROOT": toolkit,
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_INCLUDE": str(nccl / "include"),
        "HOROVOD_NCCL_LIB": str(libraries),
        "HOROVOD_NCCL_LINK": "SHARED",
        # relative, so that the wheel finds the library in any environment
        "LDFLAGS": "-Wl,-rpath,'$ORIGIN/../../nvidia/nccl/lib' " + os.environ.get("LDFLAGS", ""),
    }


def build_variables(environment, scratch):
    """Returns the environment variables of the build; writes the forwarding header into the folder `scratch`."""
    header = scratch / "include" / OLD_HEADER
    header.parent.mkdir(parents=True)
    header.write_text(HEADER_TEXT)
    temporary = scratch / "tmp"
    temporary.mkdir()
    variables = {
        **SWITCHES,
        "CPLUS_INCLUDE_PATH": os.pathsep.join(
            filter(None, [str(scratch / "include"), os.environ.get("CPLUS_INCLUDE_PATH")])
        ),
        "HOROVOD_CMAKE": str(environment.python.parent / "cmake"),
        "MAKEFLAGS": f"-j{os.cpu_count()}",
        "PATH": os.pathsep.join([str(environment.python.parent), os.environ.get("PATH", os.defpath)]),
        "TMPDIR": str(temporary),
    }
    if environment.kind == "gpu":
        variables.update(gpu_variables(environment, scratch))
    return variables


def build(environment, requirements, scratch):
    """Builds the wheel in the folder `scratch` with the TensorFlow of `environment`; returns its path."""
    print("Building Horovod from source, once for all checkouts: about 3 minutes on 2 cores ...", flush=True)
    environment.install("-r", requirements / "build.txt", log="horovod-build-tools.log")
    source = "horovod==" + pinned_version(requirements, "horovod.txt", "horovod")
    options = ("--no-deps", "--no-cache-dir", "--no-binary", "horovod", "--no-build-isolation", "--wheel-dir", scratch)
    variables = build_variables(environment, scratch)
    environment.pip("wheel", "--verbose", *options, source, log="horovod-build.log", env=variables)
    return cached_wheel(scratch)


def works(environment):
    """Returns whether the Horovod in `environment` can be imported and contains Gloo, and NCCL on a GPU machine."""
    probe = "import horovod.tensorflow as hvd; assert hvd.gloo_built()"
    if environment.kind == "gpu":
        probe += "; assert hvd.nccl_built()"
    log = environment.state / "horovod-import.log"
    with open(log, "w") as output:
        command = [environment.python, "-c", probe]
        # not in the checkout, which may have a folder of the same name
        return subprocess.run(command, cwd=environment.state, stdout=output, stderr=output).returncode == 0


def install(environment, requirements, folder, digest):
    """Installs Horovod into `environment` from the cache folder; builds the wheel if that has no working one."""
    with locked(folder.parent):
        wheel = cached_wheel(folder)
        if wheel:
            print(f"Installing Horovod from {wheel}: a few seconds ...", flush=True)
            if install_wheel(environment, wheel, digest):
                return
            print("That wheel does not work on this machine any more: replacing it.", flush=True)
            wheel.unlink()
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder.parent) as scratch:
            wheel = build(environment, requirements, Path(scratch))
            if not install_wheel(environment, wheel, digest):
                log = environment.state / "horovod-import.log"
                raise SetupError(f"Horovod was built but can't be imported: the reason is in {log}")
            folder.mkdir(exist_ok=True)
            os.replace(wheel, folder / wheel.name)


def install_wheel(environment, wheel, digest):
    """Installs the wheel and its requirements; returns whether it works, and if so records `digest`."""
    environment.forget("horovod")
    # pip would keep a Horovod of the same version that was built for another TensorFlow
    environment.pip("uninstall", "--yes", "horovod", log="horovod-uninstall.log")
    environment.install(wheel, log="horovod.log")
    if not works(environment):
        return False
    environment.note("horovod", digest)
    return True
