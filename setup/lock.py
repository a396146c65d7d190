"""Resolves all of requirements/ anew and prints constraints.txt: `python setup/lock.py > requirements/constraints.txt`.

It installs nothing. It chooses versions that run on Python 3.10, too, the oldest that the project supports.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
OLDEST_PYTHON = "3.10"
HEADER = """\
# Every package that the project installs, directly or not: written by `make lock`, which resolves the other files here.
# For all of Python 3.10 to 3.12, with and without a GPU; pip takes from here what it needs.
"""


def resolve(*names):
    """Returns {normalised name: version} of all packages that the requirements files `names` install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--python-version", OLDEST_PYTHON, "--target", folder, "--report", report]
        command += [argument for name in names for argument in ("-r", REQUIREMENTS / name)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in chosen}


def main():
    """Prints the constraints of both kinds of machine."""
    versions = {}
    for kind in ("cpu.txt", "gpu.txt"):
        resolved = resolve("dev.txt", "web.txt", "build.txt", kind)
        clashes = [name for name in resolved if versions.get(name, resolved[name]) != resolved[name]]
        if clashes:
            sys.exit(f"resolved differently with and without a GPU: {', '.join(clashes)}")
        versions.update(resolved)
    # packages without a wheel, and those for Python 3.10 alone (pip evaluates markers for the Python that runs it), are
    # pinned already
    pins = "\n".join((REQUIREMENTS / name).read_text() for name in ("dev.txt", "horovod.txt", "bench.txt"))
    versions.update(re.findall(r"^([\w-]+)==([\w.]+)", pins, re.MULTILINE))
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(versions.items())))


if __name__ == "__main__":
    main()
