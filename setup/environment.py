"""Creates, updates or repairs the virtual environment `.venv` of this checkout; prints nothing if it is up to date.

    python setup/environment.py [dev] [horovod]

The Makefile calls it with the interpreter that setup/prerequisites chose. The packages and their versions are those of
requirements/: always common.txt with cpu.txt or gpu.txt (whether the machine has an NVIDIA GPU decides), on request
dev.txt and web.txt (tests and linting) and Horovod, which setup/horovod_wheel.py builds. Only the standard library is
used.

`.venv/.setup/` records the installed packages, as one digest for each group. A file `unfinished` exists there while
packages are being installed. A set-up that finds this file makes the environment anew: the previous one was
interrupted, and pip considers a package installed whose files are incomplete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import horovod_wheel
from progress import SetupError, hold_lock, main_wrapper, run_logged

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
CONSTRAINTS = REQUIREMENTS / "constraints.txt"
SIZES = {
    "cpu": "TensorFlow for the CPU and what it needs: about 400 MB to download, 1 to 5 minutes",
    "gpu": "TensorFlow for NVIDIA GPUs with its CUDA libraries: about 4 GB to download, 5 to 20 minutes",
}
# variables that would direct pip or Python outside the environment
# (make's own as well: a build started from a recipe must not look for that make's job server)
UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")


def accelerator():
    """Returns "gpu" where an NVIDIA driver shows a GPU, else "cpu"."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return "gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        return "gpu" if listing.returncode == 0 and listing.stdout.startswith("GPU ") else "cpu"
    return "cpu"


def clean_environment():
    """Returns a copy of os.environ without the variables UNWANTED."""
    return {key: value for key, value in os.environ.items() if key not in UNWANTED}


class Environment:
    """A virtual environment at `path` and its recorded state; `kind` is "cpu" or "gpu"."""

    def __init__(self, path, kind):
        self.path = Path(path)
        self.kind = kind
        self.state = self.path / ".setup"
        self.python = self.path / "bin" / "python"
        self.unfinished = self.state / "unfinished"
        self.identity_file = self.state / "identity.json"

    @contextlib.contextmanager
    def locked(self):
        """Locks the environment against other set-ups of this checkout; raises SetupError if another tool made it."""
        if self.path.is_dir() and any(self.path.iterdir()) and not self.state.is_dir():
            raise SetupError(f"{self.path} was not made by this set-up: move it away, then run make again")
        self.state.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.state / "lock", waiting="Waiting for another set-up of this checkout to finish ..."):
            yield self

    def identity(self):
        """Returns the dict in `.setup/identity.json`: path, python ("3.11") and kind; {} if it is absent or broken."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.identity_file.read_text())
        return {}

    def fault(self, wanted_python=None):
        """Returns why the environment must be made anew, a text, or None. `wanted_python`: "3.11", or None for any."""
        identity = self.identity()
        if not self.python.exists():
            return "it has no Python" if identity else "there is none yet"
        if self.unfinished.exists() or not identity:
            return "its set-up was interrupted"
        if identity["path"] != str(self.path.resolve()):
            return "it was moved or copied here from " + identity["path"]
        if identity["kind"] != self.kind:
            return f"it is made for the {identity['kind']} and this machine takes the {self.kind} packages"
        if wanted_python not in (None, identity["python"]):
            return f"it has Python {identity['python']} and PYTHON asks for {wanted_python}"
        if subprocess.run([self.python, "-c", "import pip"], capture_output=True, env=clean_environment()).returncode:
            return "its Python does not run any more"
        return None

    def create(self):
        """Makes the environment with the running interpreter; removes the remains of an earlier one."""
        for entry in self.path.iterdir():
            if entry != self.state:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for entry in self.state.glob("*.digest"):
            entry.unlink()
        self.identity_file.unlink(missing_ok=True)
        run_logged([sys.executable, "-m", "venv", self.path], log=self.state / "venv.log", env=clean_environment())
        python = "{}.{}".format(*sys.version_info[:2])
        identity = {"path": str(self.path.resolve()), "python": python, "kind": self.kind}
        self.identity_file.write_text(json.dumps(identity))
        self.unfinished.unlink(missing_ok=True)

    def is_current(self, group, digest):
        """Returns whether `group` was installed from the requirements of this digest."""
        stamp = self.state / f"{group}.digest"
        return stamp.exists() and stamp.read_text() == digest

    def note(self, group, digest):
        """Records that `group` is installed from the requirements of this digest."""
        (self.state / f"{group}.digest").write_text(digest)

    def forget(self, group):
        """Removes the record of `group`."""
        (self.state / f"{group}.digest").unlink(missing_ok=True)

    def pip(self, *arguments, log, env=None):
        """Runs the environment's pip; its output goes to the file `log` in `.setup/`."""
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        run_logged(command, log=self.state / log, env={**clean_environment(), **(env or {})})

    def install(self, *arguments, log):
        """Runs `pip install` for wheels, within the constraints; the environment counts as unfinished meanwhile."""
        self.unfinished.touch()
        try:
            self.pip("install", "--only-binary", ":all:", "-c", CONSTRAINTS, *arguments, log=log)
        except BaseException:
            if "Installing collected packages" not in (self.state / log).read_text(errors="replace"):
                self.unfinished.unlink()  # it failed before the installation: nothing has changed
            raise
        self.unfinished.unlink()


def digest_of(*names):
    """Returns a digest of the named files of requirements/, constraints.txt included."""
    digest = hashlib.sha256()
    for name in (*names, CONSTRAINTS.name):
        digest.update((REQUIREMENTS / name).read_bytes())
    return digest.hexdigest()


def install(environment, group, *names, note):
    """Installs the packages of the requirements files `names` as the group `group`, unless they are there already."""
    digest = digest_of(*names)
    if environment.is_current(group, digest):
        return
    print(f"Installing {note} ...", flush=True)
    files = [argument for name in names for argument in ("-r", REQUIREMENTS / name)]
    environment.install(*files, log=f"{group}.log")
    environment.note(group, digest)


def main(groups):
    """Brings `.venv` up to date with the base packages and the given groups ("dev", "horovod")."""
    unknown = set(groups) - {"dev", "horovod"}
    if unknown:
        raise SetupError(f"unknown group {', '.join(sorted(unknown))}: the groups are dev and horovod")
    environment = Environment(ROOT / ".venv", accelerator())
    kind_file = f"{environment.kind}.txt"
    this_python = "{}.{}".format(*sys.version_info[:2])
    with environment.locked():
        fault = environment.fault(this_python if os.environ.get("PYTHON") else None)
        python = this_python if fault else environment.identity()["python"]
        wheel_digest = digest_of("horovod.txt", "build.txt", kind_file)
        wheel_wanted = "horovod" in groups and (fault or not environment.is_current("horovod", wheel_digest))
        wheel_folder = horovod_wheel.wheel_folder(REQUIREMENTS, environment.kind, python)
        if wheel_wanted:
            horovod_wheel.check_compiler(wheel_folder, environment.kind)
        if fault:
            print(f"Making the environment {environment.path} ({fault}) ...", flush=True)
            environment.create()
        install(environment, "base", "common.txt", kind_file, note=SIZES[environment.kind])
        if "dev" in groups:
            install(environment, "dev", "dev.txt", "web.txt", note="pytest, ruff and FastAPI: a few seconds")
        if wheel_wanted:
            horovod_wheel.install(environment, REQUIREMENTS, wheel_folder, wheel_digest)


if __name__ == "__main__":
    main_wrapper(main, sys.argv[1:])
