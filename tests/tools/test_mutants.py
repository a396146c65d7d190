"""The tool that plants faults, on a project of two functions; and the list of this project's mutations."""

import subprocess
from pathlib import Path

import pytest

from tools import mutants

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
def larger(a, b):
    return a if a > b else b

def count(items):
    total = 0
    while items:
        items = items[1:]
        total += 1
    return total
"""
TESTS = """
import program

def test_larger():
    assert program.larger(1, 2) == 2

def test_count():
    assert program.count([7, 7]) == 2
"""
LIST = """# a comment
module program.py
tests test_program.py

- a if a > b else b
+ a if a < b else b

# ties
- a > b
+ a >= b
equivalent equal numbers are the same

- total = 0
+ total = 1
tests test_program.py -k "larger and not count"

- return total
+ return (

-         items = items[1:]
-         total += 1
+         total += 1
"""


@pytest.fixture
def project(tmp_path):
    """A checkout of PROGRAM and TESTS, and a list of mutations beside it."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "program.py").write_text(PROGRAM)
    (root / "test_program.py").write_text(TESTS)
    (root / ".gitignore").write_text("*.log\n")
    (root / "big.log").write_text("not copied")
    (tmp_path / "mutants.txt").write_text(LIST)
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def run(project, *arguments):
    return mutants.main(["--list", str(project.parent / "mutants.txt"), "--jobs", "2", *arguments], root=project)


@pytest.mark.slow
def test_outcomes(project, monkeypatch, capsys):
    """Killed; equivalent; survived, its tests being the wrong ones; not importable; endless, which fails, too."""
    monkeypatch.setattr(mutants, "SHORTEST", 5)
    monkeypatch.setattr(mutants, "PATIENCE", 1)
    assert run(project) == 1
    out = capsys.readouterr().out
    assert out.count("survived: ") == 1 and "- total = 0\n    + total = 1" in out
    assert out.count("undecided: ") == 1
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("program.py ", "all "))}
    assert rows["all"] == ["2", "1", "1", "1", "0.500"]
    assert (project / "program.py").read_text() == PROGRAM
    assert not list(project.glob("**/__pycache__"))


@pytest.mark.slow
def test_all_killed_is_success_and_tests_that_fail_anyway_decide_nothing(project, capsys):
    (project.parent / "mutants.txt").write_text(LIST.split("# ties")[0])
    assert run(project, "program.py") == 0
    (project / "test_program.py").write_text(TESTS.replace("== 2", "== 3"))
    assert run(project, ".") == 1
    out = capsys.readouterr().out
    assert "fail without a mutation: test_program.py" in out and "undecided: program.py" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LIST.replace("- total = 0", "- total = 7"), "line 13: text occurs 0 times in program.py"),
        (LIST.replace("- total = 0", "- total"), "line 13: text occurs 3 times in program.py"),
        (LIST.replace("equivalent equal numbers are the same", "equivalent"), "line 11: neither module, tests"),
        (LIST.replace("module program.py", ""), "line 5: no module or no tests"),
        (LIST.replace("tests test_program.py\n\n- a if", "\n- a if"), "no module or no tests are named"),
        (LIST + "\nmutate it\n", "neither module, tests, -, + nor equivalent"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_runs(project, text, message, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "run_tests", lambda *_, **__: pytest.fail("ran"))
    (project.parent / "mutants.txt").write_text(text)
    assert run(project) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_module_is_refused(project, capsys):
    assert run(project, "program.py", "progam.py") == 2
    assert "no mutation of progam.py" in capsys.readouterr().err


def test_copies_have_what_git_would_have(project, tmp_path):
    copy = mutants.copy_checkout(project, tmp_path / "copy")
    assert {path.name for path in copy.iterdir()} == {"program.py", "test_program.py", ".gitignore"}


def test_the_bars():
    def verdict(killed, survived, module="a.py"):
        mutations = [mutants.Mutation(module, "x", "y", (), i) for i in range(killed + survived)]
        return mutations, ["killed"] * killed + ["survived"] * survived

    assert mutants.report(*verdict(95, 5))[1]
    assert not mutants.report(*verdict(94, 6))[1]
    (big, outcomes), (small, others) = verdict(190, 0), verdict(9, 1, "b.py")
    assert not mutants.report(big + small, outcomes + others)[1]  # a module needs more than 90 %


def test_this_project_s_mutations_fit_the_program():
    """Each replaces a text that occurs once by another, the result is Python, and its tests exist."""
    found = mutants.read_mutations(ROOT / "tests" / "mutants.txt")
    assert len(found) >= 200
    for mutation in found:
        source = (ROOT / mutation.module).read_text()
        mutated = mutation.apply(source)
        assert mutated != source, mutation
        compile(mutated, mutation.module, "exec")
        for argument in mutation.tests:
            name = argument.partition("::")[0]
            assert not name.startswith("tests") or (ROOT / name).exists(), mutation
