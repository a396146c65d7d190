"""Set-up: prerequisites, the launcher of the entry points, repair of the environment, the cache of Horovod's wheel."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import is_alive, wait_until

import environment as environment_module
import horovod_wheel
import progress
from environment import Environment
from progress import SetupError

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
HEADER = """#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'"""


def script(path, *lines):
    """Writes an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


# ---- prerequisites


@pytest.fixture
def machine(tmp_path):
    """A folder for PATH with all that the set-up needs of the machine, as far as setup/prerequisites can see."""
    tools = tmp_path / "bin"
    for tool in ("make", "git", "g++"):
        script(tools / tool)
    script(tools / "python3.11", 'case "$2" in *print*) echo python3.11-venv ;; esac')
    return tools


def check(machine, *arguments, **variables):
    command = [ROOT / "setup" / "prerequisites", *arguments]
    return subprocess.run(command, env={"PATH": str(machine), **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("compiler",)])
def test_nothing_is_missing(machine, arguments):
    result = check(machine, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (0, "python3.11\n", "")


@pytest.mark.parametrize("tool", ["make", "git", "g++"])
def test_missing_tool_is_one_line_with_its_package(machine, tool):
    (machine / tool).unlink()
    result = check(machine, "compiler")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"missing: {re.escape(tool)}.* \(Debian: apt-get install {re.escape(tool)}\)\n", result.stderr)


def test_compiler_is_only_asked_for_horovod(machine):
    (machine / "g++").unlink()
    assert check(machine).returncode == 0


@pytest.mark.parametrize(
    ("probe", "package"), [("ensurepip", "python3.11-venv"), ("libGL", "libgl1"), ("libgthread", "libglib2.0-0")]
)
def test_python_without_a_part(machine, probe, package):
    script(machine / "python3.11", f'case "$2" in *{probe}*) exit 1 ;; *print*) echo python3.11-venv ;; esac')
    result = check(machine)
    assert result.returncode == 1
    assert re.fullmatch(rf"missing: [^\n]* \(Debian: apt-get install {re.escape(package)}\)\n", result.stderr)


def test_python_missing_or_unsuitable(machine):
    (machine / "python3.11").unlink()
    script(machine / "python3", "exit 1")  # say 3.13
    result = check(machine)
    assert result.returncode == 1
    assert re.fullmatch(r"missing: Python 3\.11 [^\n]*python3\.11 python3\.11-venv\)\n", result.stderr)
    result = check(machine, PYTHON="python3")
    assert "missing: PYTHON=python3 is no Python 3.10 to 3.12" in result.stderr


def test_python3_stands_in(machine):
    (machine / "python3.11").rename(machine / "python3")
    assert check(machine).stdout == "python3\n"


def test_everything_missing_is_said_at_once(machine):
    for tool in machine.iterdir():
        tool.unlink()
    assert len(check(machine, "compiler").stderr.splitlines()) == 4


# ---- the launcher


@pytest.fixture
def checkout(tmp_path):
    """A folder with a blank in its name: the launcher, an environment that prints its arguments, a script `tool.py`."""
    root = tmp_path / "the checkout"
    (root / "setup").mkdir(parents=True)
    shutil.copy(ROOT / "setup" / "python", root / "setup")
    script(root / ".venv" / "bin" / "python", 'for argument; do echo "<$argument>"; done')
    (root / "tool.py").write_text(HEADER + "\n")
    (root / "tool.py").chmod(0o755)
    return root


def run(*command, cwd=None):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_script_runs_in_its_environment(checkout, tmp_path):
    assert run("./tool.py", "a b", "$x", "", cwd=checkout).stdout == "<./tool.py>\n<a b>\n<$x>\n<>\n"
    (tmp_path / "link").symlink_to(checkout / "tool.py")
    assert run("./link", "1", cwd=tmp_path).stdout == "<./link>\n<1>\n"
    (tmp_path / "python").symlink_to(checkout / "setup" / "python")
    assert run("./python", "2", cwd=tmp_path).stdout == "<2>\n"


def test_no_environment_is_one_line(checkout):
    (checkout / ".venv" / ".setup").mkdir()
    (checkout / ".venv" / ".setup" / "unfinished").touch()
    half = run("./tool.py", cwd=checkout)
    shutil.rmtree(checkout / ".venv")
    for result in (half, run("./tool.py", cwd=checkout)):
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [
            f"no complete environment in {checkout}/.venv: run 'make setup' in {checkout} first"
        ]


@pytest.mark.parametrize("name", ["train.py", "predict.py"])
def test_entry_points_start_with_the_launcher(name):
    assert (ROOT / name).read_text().splitlines()[0] == HEADER
    assert os.access(ROOT / name, os.X_OK)


# ---- long commands


def test_failed_command_shows_its_end(tmp_path, capsys):
    log = tmp_path / "step.log"
    with pytest.raises(
        SetupError, match=rf"step failed with exit code 3: its whole output is in {re.escape(str(log))}"
    ):
        command = ["sh", "-c", "echo 'x.cc:1: error: no header'; seq 100; echo why >&2; exit 3"]
        progress.run_logged(command, log=log, env=dict(os.environ))
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["  | x.cc:1: error: no header", *(f"  | {number}" for number in range(92, 101)), "  | why"]


def test_long_command_gives_signs_of_life(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # the command ends when the test has seen its first sign of life

    def release(log):
        line = progress.last_lines(log, 1)
        if line:
            fifo.write_text("go\n")
        return "".join(line)

    monkeypatch.setattr(progress, "milestone", release)
    progress.run_logged(
        ["sh", "-c", f"echo Collecting x; read go <'{fifo}'"], log=tmp_path / "log", env=dict(os.environ)
    )
    assert "s: Collecting x" in capsys.readouterr().out


def test_milestone_is_the_last_telling_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("Collecting a\n[ 12%] Building CXX object x.o\n    | ~~~^\nwarning: y\n\n")
    assert progress.milestone(log) == "[ 12%] Building CXX object x.o"


def test_interrupt_ends_the_whole_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.05)
    note = tmp_path / "grandchild"

    def interrupt(_log):
        if note.exists() and note.read_text().endswith("\n"):
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(progress, "milestone", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command = ["sh", "-c", f"sleep 300 & echo $! >'{note}'; wait"]
        progress.run_logged(command, log=tmp_path / "log", env=dict(os.environ))
    wait_until(lambda: not is_alive(int(note.read_text())))


# ---- the environment


class FakeEnvironment(Environment):
    """An environment whose pip only notes what it was asked; `on_pip(arguments, env)` may do or raise something."""

    def __init__(self, path, kind="cpu"):
        super().__init__(path, kind)
        self.calls = []
        self.on_pip = lambda arguments, env: None

    def pip(self, *arguments, log, env=None):
        self.calls.append(arguments)
        (self.state / log).write_text("")
        self.on_pip(arguments, env)

    def count(self, subcommand):
        return sum(arguments[0] == subcommand for arguments in self.calls)


def fake_venv(command, *, log, env):
    """Stands in for run_logged: "python -m venv PATH"."""
    script(Path(command[-1]) / "bin" / "python")


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """A sound environment of the running Python's version, without packages."""
    monkeypatch.setattr(environment_module, "run_logged", fake_venv)
    environment = FakeEnvironment(tmp_path / "venv")
    with environment.locked():
        environment.create()
    return environment


def test_environment_is_sound(venv):
    assert venv.fault() is None
    assert venv.fault("{}.{}".format(*sys.version_info[:2])) is None


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda venv: venv.unfinished.touch(), "interrupted"),
        (lambda venv: venv.identity_file.unlink(), "interrupted"),
        (lambda venv: venv.identity_file.write_text('{"path'), "interrupted"),
        (lambda venv: venv.python.unlink(), "no Python"),
        (lambda venv: script(venv.python, "exit 1"), "does not run"),
        (lambda venv: setattr(venv, "kind", "gpu"), "takes the gpu packages"),
        (
            lambda venv: venv.identity_file.write_text('{"path": "/elsewhere", "python": "3.11", "kind": "cpu"}'),
            "moved",
        ),
    ],
)
def test_damaged_environment_is_made_anew(venv, damage, fault):
    half_a_package = venv.path / "lib" / "package"
    half_a_package.mkdir(parents=True)
    venv.note("base", "digest")
    damage(venv)
    assert fault in venv.fault()
    venv.create()
    assert venv.fault() is None
    assert not half_a_package.exists() and not venv.is_current("base", "digest")


def test_another_python_is_only_taken_when_asked_for(venv):
    assert "PYTHON asks for 3.7" in venv.fault("3.7")


def test_foreign_environment_is_left_alone(tmp_path):
    own = script(tmp_path / "venv" / "bin" / "python")
    with (
        pytest.raises(SetupError, match="was not made by this set-up: move it away"),
        FakeEnvironment(tmp_path / "venv").locked(),
    ):
        pass
    assert own.exists() and not (tmp_path / "venv" / ".setup").exists()


@pytest.mark.parametrize(("printed", "sound"), [("Collecting a", True), ("Installing collected packages: a", False)])
@pytest.mark.parametrize("error", [SetupError, KeyboardInterrupt])
def test_failed_install_is_known_by_how_far_it_got(venv, monkeypatch, printed, sound, error):
    def fail(self, *arguments, log, env=None):
        (self.state / log).write_text(printed)
        raise error("no network")

    monkeypatch.setattr(FakeEnvironment, "pip", fail)
    with pytest.raises(error):
        venv.install("package", log="base.log")
    assert (venv.fault() is None) == sound


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The environment of a project whose set-up can be run; its pip only notes its calls, and builds fake wheels."""
    monkeypatch.setattr(environment_module, "run_logged", fake_venv)
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    monkeypatch.setattr(environment_module, "REQUIREMENTS", tmp_path / "requirements")
    monkeypatch.setattr(environment_module, "accelerator", lambda: "cpu")
    monkeypatch.setattr(horovod_wheel, "works", lambda environment: True)
    monkeypatch.setenv("RCNN_WHEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHON", raising=False)
    shutil.copytree(REQUIREMENTS, tmp_path / "requirements")
    environment = FakeEnvironment(tmp_path / ".venv")
    environment.on_pip = build_wheel
    monkeypatch.setattr(environment_module, "Environment", lambda path, kind: environment)
    return environment


def test_second_setup_does_nothing(project, capsys):
    environment_module.main(["dev", "horovod"])
    assert "Making the environment" in capsys.readouterr().out
    project.calls.clear()
    environment_module.main(["dev", "horovod"])
    assert project.calls == [] and capsys.readouterr().out == ""


def test_setup_takes_no_more_than_it_is_asked_for(project):
    environment_module.main([])
    files = [Path(argument).name for arguments in project.calls for argument in arguments if "txt" in str(argument)]
    assert sorted(files) == ["common.txt", "constraints.txt", "cpu.txt"]


def test_changed_requirements_are_installed(project):
    environment_module.main(["dev"])
    project.calls.clear()
    with open(environment_module.REQUIREMENTS / "dev.txt", "a") as requirements:
        requirements.write("another==1.0\n")
    environment_module.main(["dev"])
    assert project.count("install") == len(project.calls) == 1 and "dev.txt" in str(project.calls)


def test_unknown_group_is_refused(project):
    with pytest.raises(SetupError, match="unknown group docs"):
        environment_module.main(["docs"])


def test_gpu_is_seen(monkeypatch, tmp_path):
    script(tmp_path / "nvidia-smi", "echo GPU 0: Some")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment_module.accelerator() == "gpu"
    if not Path("/proc/driver/nvidia").exists():
        script(tmp_path / "nvidia-smi", "echo GPU 0: broken; exit 9")
        assert environment_module.accelerator() == "cpu"


# ---- Horovod's wheel


def build_wheel(arguments, env):
    """What pip does when asked for the wheel."""
    if arguments[0] == "wheel":
        folder = Path(arguments[arguments.index("--wheel-dir") + 1])
        (folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").write_text("whole")


def fail_with(error):
    """Returns what pip does when it fails in the middle of writing the wheel."""

    def build(arguments, env):
        if arguments[0] == "wheel":
            build_wheel(arguments, env)
            raise error

    return build


def wheels(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.whl"))


def another(project):
    """Another environment that sees the same cache; its pip builds no wheels."""
    venv = FakeEnvironment(project.path.parent / "another")
    with venv.locked():
        venv.create()
    return venv


def install_horovod(venv):
    folder = horovod_wheel.wheel_folder(REQUIREMENTS, venv.kind, venv.identity()["python"])
    horovod_wheel.install(venv, REQUIREMENTS, folder, "digest")


def test_wheel_is_built_once(project, tmp_path):
    environment_module.main(["horovod"])
    (wheel,) = wheels(tmp_path)
    assert wheel.read_text() == "whole" and project.count("wheel") == 1
    second = another(project)
    install_horovod(second)
    assert second.count("wheel") == 0 and wheel in second.calls[-1]
    assert second.is_current("horovod", "digest")


@pytest.mark.parametrize("error", [SetupError("compiler"), KeyboardInterrupt(), OSError("disk full")])
def test_failed_build_leaves_no_wheel(project, tmp_path, error):
    project.on_pip = fail_with(error)
    with pytest.raises(type(error)):
        environment_module.main(["horovod"])
    assert wheels(tmp_path) == []
    assert project.fault() is None  # the rest of the environment stays usable
    project.on_pip = build_wheel
    environment_module.main(["horovod"])
    assert len(wheels(tmp_path)) == 1


def test_leftover_of_a_killed_build_is_not_taken(project, tmp_path):
    folder = tmp_path / "cache" / f"{horovod_wheel.BUILDING}killed"
    folder.mkdir(parents=True)
    (folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").write_text("half")
    environment_module.main(["horovod"])
    assert [wheel.read_text() for wheel in wheels(tmp_path)] == ["whole"]
    assert not folder.exists()


def test_wheel_that_cannot_be_imported_is_not_kept(project, tmp_path, monkeypatch):
    monkeypatch.setattr(horovod_wheel, "works", lambda environment: False)
    with pytest.raises(SetupError, match="can't be imported: the reason is in"):
        environment_module.main(["horovod"])
    assert wheels(tmp_path) == []


def test_cached_wheel_that_stopped_working_is_replaced(project, tmp_path, monkeypatch):
    environment_module.main(["horovod"])
    wheels(tmp_path)[0].write_text("for an older system")
    monkeypatch.setattr(horovod_wheel, "works", lambda venv: Path(venv.calls[-1][-1]).read_text() == "whole")
    second = another(project)
    second.on_pip = build_wheel
    install_horovod(second)
    assert second.count("wheel") == 1
    assert [wheel.read_text() for wheel in wheels(tmp_path)] == ["whole"]


def test_cached_wheel_that_stopped_working_goes_even_if_the_build_fails(project, tmp_path, monkeypatch):
    environment_module.main(["horovod"])
    monkeypatch.setattr(horovod_wheel, "works", lambda venv: False)
    second = another(project)
    second.on_pip = fail_with(SetupError("compiler"))
    with pytest.raises(SetupError, match="compiler"):
        install_horovod(second)
    assert wheels(tmp_path) == []


def test_key_tells_what_the_wheel_depends_on(project, tmp_path):
    folders = {
        horovod_wheel.wheel_folder(REQUIREMENTS, kind, python) for kind in ("cpu", "gpu") for python in ("3.10", "3.11")
    }
    newer = shutil.copytree(REQUIREMENTS, tmp_path / "newer")
    (newer / "cpu.txt").write_text("tensorflow-cpu==9.9.9\n")
    folders.add(horovod_wheel.wheel_folder(newer, "cpu", "3.11"))
    (newer / "horovod.txt").write_text("horovod==9.9.9\n")
    folders.add(horovod_wheel.wheel_folder(newer, "cpu", "3.11"))
    assert len(folders) == 6


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("RCNN_WHEEL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert horovod_wheel.cache_folder() == tmp_path / ".cache" / "mask-rcnn" / "wheels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert horovod_wheel.cache_folder() == tmp_path / "xdg" / "mask-rcnn" / "wheels"


def test_unusable_cache_is_one_line(project, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SetupError, match="name another in RCNN_WHEEL_CACHE"):
        environment_module.main(["horovod"])


def test_missing_compiler_is_said_before_anything_is_made(project, machine, monkeypatch):
    (machine / "g++").unlink()
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(SetupError, match="Horovod can't be built yet"):
        environment_module.main(["horovod"])
    assert project.calls == [] and not project.python.exists()


def test_build_sees_the_forwarding_header_and_no_foreign_make(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MAKEFLAGS", " --jobserver-auth=3,4")
    seen = {}

    def look(arguments, env):
        build_wheel(arguments, env)
        if arguments[0] == "wheel":
            header = Path(env["CPLUS_INCLUDE_PATH"].split(":")[0]) / "tensorflow/compiler/xla/client/xla_builder.h"
            seen.update(env, header=header.read_text())

    project.on_pip = look
    environment_module.main(["horovod"])
    assert '#include "xla/hlo/builder/xla_builder.h"\n' in seen["header"]
    assert seen["MAKEFLAGS"] == f"-j{os.cpu_count()}"
    assert seen["HOROVOD_WITH_GLOO"] == seen["HOROVOD_WITHOUT_MPI"] == "1" and "HOROVOD_GPU_OPERATIONS" not in seen
    assert "MAKEFLAGS" not in environment_module.clean_environment()


def test_gpu_build_uses_the_nccl_of_tensorflow(venv, tmp_path, monkeypatch):
    venv.kind = "gpu"
    script(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.delenv("HOROVOD_CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    nccl = venv.path / "lib" / "python3.11" / "site-packages" / "nvidia" / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "lib" / "libnccl.so.2").write_text("library")
    settings = horovod_wheel.build_variables(venv, tmp_path)
    assert settings["HOROVOD_GPU_OPERATIONS"] == "NCCL" and settings["HOROVOD_NCCL_INCLUDE"] == str(nccl / "include")
    assert (Path(settings["HOROVOD_NCCL_LIB"]) / "libnccl.so").read_text() == "library"
    assert settings["HOROVOD_CUDA_HOME"] == settings["CUDAToolkit_ROOT"] == str(tmp_path / "cuda")


def test_missing_cuda_compiler_is_one_line(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(machine))
    monkeypatch.setattr(horovod_wheel, "cuda_toolkit", lambda: None)
    with pytest.raises(SetupError, match="needs nvcc: .*CUDA_HOME"):
        horovod_wheel.check_compiler(tmp_path, "gpu")
    horovod_wheel.check_compiler(tmp_path, "cpu")


@pytest.mark.slow
def test_two_processes_reduce(tmp_path):
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("no Horovod in this environment: run make horovod")
    program = tmp_path / "reduce.py"
    program.write_text(
        "import tensorflow as tf, horovod.tensorflow as hvd\n"
        "hvd.init()\n"
        "total = hvd.allreduce(tf.constant([1.0, 10.0]) * (hvd.rank() + 1), op=hvd.Sum, name='x')\n"
        "open(f'{hvd.rank()}.txt', 'w').write(f'{hvd.size()} {total.numpy().tolist()}')\n"
    )
    command = [sys.executable, "-m", "horovod.runner.launch", "-np", "2", sys.executable, program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2 [3.0, 30.0]"] * 2


# ---- requirements and Makefile


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path):
    """{name: version} of a requirements file; every line must pin exactly."""
    found = {}
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-r "):
            match = re.fullmatch(r"([\w.-]+)(\[[\w-]+\])?==([\w.]+)( *;.*)?", line)
            assert match, f"{path.name}: {line} is no exact pin"
            found[normal(match[1])] = match[3]
    return found


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.name)
def test_versions_are_pinned_and_agree(path):
    constraints = pins(REQUIREMENTS / "constraints.txt")
    assert {name: constraints.get(name) for name in pins(path)} == pins(path)


def test_constraints_cover_what_is_installed():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in the project's own environment")
    requirements = importlib.import_module("pip._vendor.packaging.requirements")
    constraints, todo, seen = pins(REQUIREMENTS / "constraints.txt"), [], {}
    for name in ("common.txt", "cpu.txt", "gpu.txt", "dev.txt", "web.txt"):
        todo += pins(REQUIREMENTS / name)
    while todo:
        name = todo.pop()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of the other kind of machine, or of another Python
        if name not in seen:
            seen[name] = package.version
            needs = [requirements.Requirement(line) for line in package.requires or ()]
            todo += [normal(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    assert len(seen) > 40
    assert {name: constraints.get(name) for name in seen} == seen


def test_make_demo_waits_for_nothing_else():
    commands = run("make", "--dry-run", "demo", cwd=ROOT).stdout
    assert "setup/environment.py" in commands and "-m examples.demo" in commands
    assert not re.search(r"horovod|dev|pytest|ruff|compiler", commands)


def test_make_help_is_the_default():
    assert re.search(r"^make demo +\w+", run("make", cwd=ROOT).stdout, re.MULTILINE)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_setup_is_repaired(tmp_path):
    for name in ("Makefile", "setup", "requirements"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    log = tmp_path / ".venv" / ".setup" / "base.log"
    process = subprocess.Popen(["make", "setup"], cwd=tmp_path, start_new_session=True)
    while process.poll() is None and not (log.exists() and "Installing collected packages" in log.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run(tmp_path / "setup" / "python", "-c", "").returncode == 2
    again = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "its set-up was interrupted" in again.stdout
    probe = "import cv2, pycocotools.mask, tensorpack"
    assert run(tmp_path / "setup" / "python", "-c", probe).returncode == 0
    assert "Making" not in run("make", "setup", cwd=tmp_path).stdout
