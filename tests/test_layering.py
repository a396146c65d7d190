"""The rules that hold for all files: who imports whom, who reads the global config, what never appears in the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom: a file imports only from lines below its own. A name stands for a file or for a package with its files.
LINES = (
    {"train", "predict"},
    {"tools"},
    {"media", "export", "inspection"},
    {"eval"},
    {"report", "viz"},
    {"metrics", "charts", "tta", "image_ops"},
    {"callbacks", "checkpoint"},
    {"replicas", "ranks", "watchdog"},
    {"sessions"},
    {"modeling.rcnn"},
    {f"modeling.{part}" for part in ("backbone", "fpn", "rpn", "box_head", "cascade", "mask_head")},
    {"modeling.layers", "modeling.box_ops", "optimizers"},
    {"data"},
    {"dataset", "zoo"},
    {"boxes"},
    {"config"},
)
UNITS = set().union(*LINES)
ALSO_ALLOWED = {("modeling.cascade", "modeling.box_head"), ("callbacks", "checkpoint")}
PACKAGES = {"dataset", "zoo", "tools"}  # whose files may import each other
ENTRY_POINTS = LINES[0]
FREE_PACKAGES = {"tests", "examples"}  # import what they like
SETUP = "setup"  # runs before there is an environment: scripts that know nothing of the rest
READS_CONFIG = {"train", "predict", "tools", "modeling.rcnn", "data", "eval", "export", "inspection"}
CONFIG_FOR_ALL = {"ConfigError", "UserError"}
PRINTS = {"train", "predict", "tools", "examples", SETUP}
MAX_FUNCTION_LINES = 60
RUNS_INPUT = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in ("load", "loads")),
    *("pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
}


def module_name(path):
    """The dotted name of a file relative to the root: modeling/rpn.py is modeling.rpn, dataset/__init__.py dataset."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module):
    """The name in LINES that a module belongs to; None for modules that are not the project's."""
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        if name in UNITS:
            return name
    return parts[0] if parts[0] in {"modeling", SETUP, *FREE_PACKAGES} else None


def imported_modules(tree, path):
    """Yields (line, module, names) for all imports at any depth; names: what a `from` import takes, else ()."""
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            named = node.args and isinstance(node.args[0], ast.Constant)
            yield node.lineno, node.args[0].value if named else "?", ()


def edges(tree, path):
    """Yields (line, unit) for the project's units that a file imports; `from modeling import rpn` is modeling.rpn."""
    for line, module, names in imported_modules(tree, path):
        targets = (
            {f"{module}.{name}" for name in names if f"{module}.{name}" in UNITS} if module == "modeling" else set()
        )
        for target in sorted(targets) or [module]:
            unit = "?" if target == "?" else unit_of(target)
            if unit:
                yield line, unit


def may_import(importer, imported):
    """Whether a file of the unit `importer` may import from the unit `imported`."""
    if importer in FREE_PACKAGES or (importer, imported) in ALSO_ALLOWED:
        return True
    if importer not in UNITS or imported not in UNITS or imported in ENTRY_POINTS:
        return False
    if importer == imported and importer in PACKAGES:
        return True
    if "data" in (importer, imported) and any(unit.startswith("modeling") for unit in (importer, imported)):
        return False
    rank = {unit: number for number, line in enumerate(LINES) for unit in line}
    return rank[importer] < rank[imported]


def layering_faults(source, path):
    """Faults of a file's imports, each "path:line: what"."""
    tree = ast.parse(source)
    module = module_name(path)
    unit = unit_of(module)
    if unit is None or unit == "modeling" and module != "modeling":
        return [f"{path}:1: has no place in the layering"]
    faults = [
        f"{path}:{line}: {module} may not import {imported}"
        for line, imported in edges(tree, path)
        if not may_import(unit, imported)
    ]
    if unit == "dataset" and module != "dataset":
        faults += [
            f"{path}:{line}: a part of dataset may not import from the package itself"
            for line, imported, names in imported_modules(tree, path)
            if imported == "dataset" and any(not (ROOT / "dataset" / f"{name}.py").exists() for name in names or "?")
        ]
    if unit not in READS_CONFIG | FREE_PACKAGES:
        faults += [
            f"{path}:{line}: {module} may take nothing but {', '.join(CONFIG_FOR_ALL)} from config"
            for line, imported, names in imported_modules(tree, path)
            if imported == "config" and not (names and CONFIG_FOR_ALL.issuperset(names))
        ]
    return faults


def aliases(tree):
    """{name in the file: full dotted name} of everything imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def is_true_or_unknown(node):
    return not (isinstance(node, ast.Constant) and node.value in (False, None))


def code_faults(source, path):
    """Faults inside a file: long functions, print in libraries, what could run code from an input file."""
    tree = ast.parse(source)
    names = aliases(tree)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION_LINES}")
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, [names.get(first, first), rest]))
        if called in RUNS_INPUT:
            faults.append(f"{path}:{node.lineno}: {called} can run what an input says")
        if any(keyword.arg == "allow_pickle" and is_true_or_unknown(keyword.value) for keyword in node.keywords):
            faults.append(f"{path}:{node.lineno}: allow_pickle can run what an input says")
        if called == "print" and unit_of(module_name(path)) not in PRINTS and "__main__" not in source:
            faults.append(f"{path}:{node.lineno}: print in a library: use the logger")
    return faults


def project_files():
    """All Python files of the project, relative to its root (nothing below a folder whose name starts with a dot)."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    kept = {unit.split(".")[0] for unit in UNITS} | FREE_PACKAGES | {SETUP}
    return sorted(path for path in files if len(path.parts) == 1 or path.parts[0] in kept)


FILES = [pytest.param(path, id=str(path)) for path in project_files()]
CODE = [pytest.param(path, id=str(path)) for path in project_files() if path.parts[0] != "tests"]


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path):
    assert layering_faults((ROOT / path).read_text(), path) == []


@pytest.mark.parametrize("path", CODE)
def test_code_keeps_the_rules(path):
    assert code_faults((ROOT / path).read_text(), path) == []


def test_the_files_are_found():
    assert {"boxes.py", "modeling/layers.py", "dataset/__init__.py", "setup/environment.py"} <= set(
        map(str, project_files())
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", ["data", "dataset", "boxes", "config"])
def test_import_stays_light(module):
    probe = f"import sys, {module}; print(*sorted({{'tensorflow', 'tensorpack', 'keras'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


# The checker itself, on files that it must refuse and files that it must let pass.


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("boxes.py", "import data"),
        ("boxes.py", "def f():\n    import data"),
        ("boxes.py", "import importlib\nimportlib.import_module('data')"),
        ("boxes.py", "import importlib\nimportlib.import_module(name)"),
        ("boxes.py", "if TYPE_CHECKING:\n    from dataset.record import Record"),
        ("data.py", "from modeling import box_ops"),
        ("data.py", "from modeling.box_ops import encode"),
        ("modeling/rcnn.py", "import data"),
        ("modeling/rpn.py", "from . import box_head"),
        ("modeling/rpn.py", "from .box_head import losses"),
        ("modeling/box_head.py", "from . import box_ops, cascade"),
        ("modeling/box_ops.py", "from .layers import conv2d"),
        ("modeling/layers.py", "from . import rcnn"),
        ("modeling/rpn.py", "import modeling"),
        ("modeling/__init__.py", "from . import rcnn"),
        ("modeling/extra.py", ""),
        ("stray.py", ""),
        ("checkpoint.py", "import callbacks"),
        ("viz.py", "import eval"),
        ("train.py", "import predict"),
        ("tools/doctor.py", "import train"),
        ("eval.py", "from tools.doctor import check"),
        ("eval.py", "import tests.helpers"),
        ("dataset/coco.py", "from dataset import register"),
        ("dataset/coco.py", "import dataset"),
        ("setup/environment.py", "import config"),
        ("modeling/rpn.py", "from config import config"),
        ("modeling/rpn.py", "import config"),
        ("dataset/coco.py", "from config import UserError, config"),
        ("viz.py", "from config import *"),
        ("callbacks.py", "def f():\n    from config import config as c"),
    ],
)
def test_layering_checker_refuses(path, source):
    assert len(layering_faults(source, path)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "train.py",
            "import callbacks, checkpoint, data, eval, viz\nfrom modeling.rcnn import RCNN\nfrom config import config",
        ),
        ("tools/doctor.py", "import eval\nfrom config import config"),
        ("callbacks.py", "import checkpoint\nfrom config import UserError"),
        ("modeling/cascade.py", "from . import box_head, box_ops\nfrom .layers import conv2d"),
        ("modeling/rcnn.py", "import boxes\nfrom config import config\nfrom . import backbone, rpn"),
        ("data.py", "import boxes\nfrom config import config\nfrom dataset import Record"),
        ("dataset/coco.py", "import boxes\nfrom config import UserError\nfrom dataset.record import Record"),
        ("dataset/__init__.py", "from dataset.coco import CocoDataset"),
        (
            "boxes.py",
            "import numpy as np\nfrom config import UserError\nimport importlib\nimportlib.import_module('numpy')",
        ),
        ("tests/test_data.py", "import data, train\nfrom modeling import rcnn\nfrom config import Config"),
        ("examples/demo.py", "import train\nfrom config import config"),
        ("setup/environment.py", "import json"),
    ],
)
def test_layering_checker_accepts(path, source):
    assert layering_faults(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "def f(x):\n    exec(x)",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(f)",
        "from pickle import loads as read\nread(f)",
        "from yaml import load\nload(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=trusted)",
        "print(1)",
        "def f():\n" + "    pass\n" * 60,
        "class A:\n    async def f(self):\n" + "        pass\n" * 60,
    ],
)
def test_code_checker_refuses(source):
    assert len(code_faults(source, "boxes.py")) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("boxes.py", "import numpy as np\nnp.load(f, allow_pickle=False)\nnp.load(f)"),
        ("boxes.py", "import ast\nast.literal_eval('1')\nmodel.eval()\nimport re\nre.compile('a')"),
        ("boxes.py", "import json\njson.load(f)\nimport pickle\npickle.dumps(1)"),
        ("boxes.py", "def f():\n" + "    pass\n" * 59),
        ("tools/doctor.py", "print(1)"),
        ("train.py", "print(1)"),
        ("examples/demo.py", "print(1)"),
        ("setup/environment.py", "print(1)"),
    ],
)
def test_code_checker_accepts(path, source):
    assert code_faults(source, path) == []
