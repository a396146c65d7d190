"""The rules for all files: the direction of imports, which files read the global config, what code never contains."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# One row per package or top-level file, top to bottom: a row imports only from rows below its own, and from itself.
# Rows in one line do not import each other.
ROWS = (
    {"train", "predict", "tools", "examples"},
    {"training"},
    {"eval"},
    {"inference"},
    {"data"},
    {"dataset", "evaluation", "modeling"},
    {"zoo", "common"},
    {"config"},
)
PROGRAMS = {"train", "predict"}  # nothing imports them
TESTS, SETUP = "tests", "setup"  # tests import all; setup runs before there is an environment, and imports nothing
UNITS = {*set().union(*ROWS), TESTS, SETUP}
READS_CONFIG = {"train", "predict", "tools", "tests"}  # the global one; everything else gets settings as an argument
LIGHT = ("data", "dataset", "common.boxes", "common.workers", "common.checkpoint", "config", "train", "predict")
PRINTS = {"train", "predict", "eval", "tools", "examples", TESTS, SETUP}
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_TOP_FILES, MAX_LATE_IMPORTS = 60, 600, 6, 8
IMPORTS_BY_NAME = {"common/plugins.py", "tools/benchmark.py"}
RUNS_INPUT = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in ("load", "loads")),
    *("pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
}


def module_name(path):
    """The dotted name of a file relative to the root: modeling/rpn.py is modeling.rpn, dataset/__init__.py dataset."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree, path):
    """Yields (line, module, names) for all imports at any depth; names: those that a `from` import takes, else ()."""
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


def may_import(importer, imported):
    """Whether a file of the unit `importer` may import from the unit `imported`."""
    if importer == TESTS:
        return True
    if SETUP in (importer, imported) or imported in {TESTS, *PROGRAMS}:
        return importer == imported
    rank = {unit: number for number, row in enumerate(ROWS) for unit in row}
    return importer == imported or rank[importer] < rank[imported]


def layering_faults(source, path):
    """Faults of a file's imports, each "path:line: what"."""
    unit = module_name(path).split(".")[0]
    if unit not in UNITS:
        return [f"{path}:1: has no row in the layering"]
    faults = []
    for line, module, names in imported_modules(ast.parse(source), path):
        imported = module.split(".")[0]
        if module == "?" and str(path) not in IMPORTS_BY_NAME:
            faults.append(f"{path}:{line}: imports by a name that it computes")
        if imported in UNITS and not may_import(unit, imported):
            faults.append(f"{path}:{line}: {unit} may not import {imported}")
        if module == "config" and unit not in READS_CONFIG and (not names or {"config", "*"} & set(names)):
            faults.append(f"{path}:{line}: {unit} takes settings as an argument, not the global config")
    return faults


def project_graph():
    """{module: set of the project's modules that it imports} of all files but the tests'."""
    modules = {module_name(path): path for path in project_files() if path.parts[0] not in (TESTS, SETUP)}
    graph = {}
    for module, path in modules.items():
        found = set()
        for _, imported, names in imported_modules(ast.parse((ROOT / path).read_text()), path):
            found |= {f"{imported}.{name}" for name in names} | {imported}
        graph[module] = found & modules.keys() - {module}
    return graph


def cycles(graph):
    """The modules that import themselves in the end."""

    def reach(start):
        seen, waiting = set(), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph[module])
        return seen

    return sorted(module for module in graph if module in reach(module))


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


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_faults(source, path):
    """Faults inside a file: long functions, print in libraries, calls that could run code from an input file."""
    tree = ast.parse(source)
    names = aliases(tree)
    faults = []
    for node in functions(tree):
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION_LINES}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, [names.get(first, first), rest]))
        if called in RUNS_INPUT:
            faults.append(f"{path}:{node.lineno}: {called} can run code from an input")
        if any(keyword.arg == "allow_pickle" and is_true_or_unknown(keyword.value) for keyword in node.keywords):
            faults.append(f"{path}:{node.lineno}: allow_pickle can run code from an input")
        unit = module_name(path).split(".")[0]
        if called == "print" and unit not in PRINTS and "__main__" not in source:
            faults.append(f"{path}:{node.lineno}: print in a library: use the logger")
    return faults


def late_imports(source, path):
    """Imports inside functions, each "path:line"."""
    lines = {
        node.lineno
        for function in functions(ast.parse(source))
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return [f"{path}:{line}" for line in sorted(lines)]


def project_files():
    """All Python files of the project, relative to its root; nothing below a folder whose name starts with a dot."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(path for path in files if len(path.parts) == 1 or path.parts[0] in UNITS)


FILES = [pytest.param(path, id=str(path)) for path in project_files()]
CODE = [pytest.param(path, id=str(path)) for path in project_files() if path.parts[0] != TESTS]


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path):
    assert layering_faults((ROOT / path).read_text(), path) == []


@pytest.mark.parametrize("path", CODE)
def test_code_keeps_the_rules(path):
    assert code_faults((ROOT / path).read_text(), path) == []


@pytest.mark.parametrize("path", CODE)
def test_no_file_is_long(path):
    """config.py, a table, is longer."""
    assert str(path) == "config.py" or len((ROOT / path).read_text().splitlines()) <= MAX_FILE_LINES


def test_nothing_imports_itself_in_a_circle():
    assert cycles(project_graph()) == []


def test_the_top_level_shows_the_programs():
    assert len([path for path in project_files() if len(path.parts) == 1]) <= MAX_TOP_FILES


def test_few_imports_stand_inside_functions():
    found = [
        place
        for path in project_files()
        if path.parts[0] not in ("tools", TESTS)
        for place in late_imports((ROOT / path).read_text(), path)
    ]
    assert len(found) <= MAX_LATE_IMPORTS, found


def test_the_files_are_found():
    found = set(map(str, project_files()))
    assert {"data.py", "common/boxes.py", "modeling/layers.py", "dataset/__init__.py", "setup/environment.py"} <= found


def test_tests_mirror_the_folders():
    """Each folder of tests has the name of a package, but for the data of tests."""
    folders = {path.name for path in (ROOT / TESTS).iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {path.name for path in ROOT.iterdir() if path.is_dir()} | {"doors"}


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_import_stays_light(module):
    probe = f"import sys, {module}; print(*sorted({{'tensorflow', 'tensorpack', 'keras'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


# The checkers themselves, on files that they must refuse and files that they must let pass.


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("common/boxes.py", "import data"),
        ("common/boxes.py", "def f():\n    import data"),
        ("common/boxes.py", "import importlib\nimportlib.import_module('data')"),
        ("common/boxes.py", "import importlib\nimportlib.import_module(name)"),
        ("common/boxes.py", "if TYPE_CHECKING:\n    from dataset.record import Record"),
        ("common/checkpoint.py", "from zoo import files"),
        ("zoo/files.py", "from common import boxes"),
        ("dataset/augment.py", "from modeling import box_ops"),
        ("modeling/rcnn.py", "from dataset import Record"),
        ("modeling/rcnn.py", "import data"),
        ("evaluation/metrics.py", "from dataset import Record"),
        ("data.py", "from inference import graph"),
        ("data.py", "import eval"),
        ("inference/predictor.py", "import eval"),
        ("inference/predictor.py", "from training import monitors"),
        ("eval.py", "from training.run import train"),
        ("training/run.py", "import train"),
        ("tools/doctor.py", "import train"),
        ("tools/doctor.py", "from examples import demo"),
        ("train.py", "import predict"),
        ("train.py", "from tools import doctor"),
        ("eval.py", "import tests.helpers"),
        ("stray.py", ""),
        ("stray/file.py", ""),
        ("setup/environment.py", "import config"),
        ("modeling/rpn.py", "from config import config"),
        ("modeling/rpn.py", "import config"),
        ("dataset/coco.py", "from config import UserError, config"),
        ("common/viz.py", "from config import *"),
        ("training/run.py", "def f():\n    from config import config as c"),
        ("data.py", "from config import config"),
    ],
)
def test_layering_checker_refuses(path, source):
    assert len(layering_faults(source, path)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "train.py",
            "import data, eval\nfrom training.run import train\nfrom common import viz\nfrom config import config",
        ),
        ("tools/doctor.py", "import eval\nfrom config import config\nfrom tools import convert"),
        ("examples/demo.py", "from inference import Predictor"),
        (
            "training/guards.py",
            "from common import checkpoint\nfrom config import UserError\nfrom training import input",
        ),
        ("modeling/rpn.py", "from . import box_head, box_ops\nfrom .layers import conv2d"),
        ("modeling/rcnn.py", "from common import boxes\nfrom config import ConfigError\nfrom . import backbone, rpn"),
        ("data.py", "from common import boxes\nfrom config import Config\nfrom dataset import Record"),
        ("inference/predictor.py", "import data\nfrom modeling import rcnn\nfrom evaluation import metrics"),
        ("common/boxes.py", "import numpy as np\nimport importlib\nimportlib.import_module('numpy')"),
        ("common/plugins.py", "import importlib\nimportlib.import_module(name)"),
        ("tests/test_data.py", "import data, train\nfrom modeling import rcnn\nfrom config import Config, config"),
        ("setup/environment.py", "import json\nfrom setup import progress"),
    ],
)
def test_layering_checker_accepts(path, source):
    assert layering_faults(source, path) == []


def test_circles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


@pytest.mark.parametrize(
    ("source", "count"),
    [("import a\nfrom b import c", 0), ("def f():\n    import a\n    from b import c", 2), ("if x:\n    import a", 0)],
)
def test_late_imports_are_counted(source, count):
    assert len(late_imports(source, "data.py")) == count


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
    assert len(code_faults(source, "common/boxes.py")) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("common/boxes.py", "import numpy as np\nnp.load(f, allow_pickle=False)\nnp.load(f)"),
        ("common/boxes.py", "import ast\nast.literal_eval('1')\nmodel.eval()\nimport re\nre.compile('a')"),
        ("common/boxes.py", "import json\njson.load(f)\nimport pickle\npickle.dumps(1)"),
        ("common/boxes.py", "def f():\n" + "    pass\n" * 59),
        ("tools/doctor.py", "print(1)"),
        ("train.py", "print(1)"),
        ("examples/demo.py", "print(1)"),
        ("setup/environment.py", "print(1)"),
    ],
)
def test_code_checker_accepts(path, source):
    assert code_faults(source, path) == []
