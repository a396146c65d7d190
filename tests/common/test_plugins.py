"""Modules of the user's own: which are imported, and what is said of those that are not."""

import argparse
import logging
import sys

import pytest

from common import plugins


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory; the modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_current_directory_is_imported_and_its_file_logged(folder, caplog):
    (folder / "own_plugin.py").write_text("value = 3")
    with caplog.at_level(logging.INFO, logger="common.plugins"):
        plugins.load_plugins(["own_plugin"])
    assert sys.modules["own_plugin"].value == 3
    assert f"--plugins own_plugin: {folder / 'own_plugin.py'}" in caplog.text
    plugins.check_plugins(["own_plugin"], "run")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import no_such_module_anywhere",
            "ModuleNotFoundError: No module named 'no_such_module_anywhere' (FOLDER/own_plugin.py:1)",
        ),
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero (FOLDER/own_plugin.py:2)"),
        ("import sys\nsys.exit(3)", "SystemExit: 3 (FOLDER/own_plugin.py:2)"),
        ("def f(:", "SyntaxError: invalid syntax (own_plugin.py, line 1)"),
    ],
)
def test_what_fails_is_one_line_with_its_place(folder, code, message):
    (folder / "own_plugin.py").write_text(code)
    with pytest.raises(plugins.PluginError) as error:
        plugins.load_plugins(["own_plugin"])
    assert str(error.value) == "--plugins own_plugin: " + message.replace("FOLDER", str(folder))


def test_a_missing_module_is_one_line(folder):
    with pytest.raises(plugins.PluginError) as error:
        plugins.load_plugins(["own_plugin"])
    assert str(error.value) == "--plugins own_plugin: ModuleNotFoundError: No module named 'own_plugin'"


def test_a_folder_is_no_module(folder):
    (folder / "own_plugin").mkdir()
    with pytest.raises(plugins.PluginError, match="own_plugin: a folder without __init__.py"):
        plugins.load_plugins(["own_plugin"])


def test_a_module_that_another_one_hides_is_refused(folder):
    (folder / "json.py").write_text("")
    with pytest.raises(plugins.PluginError, match="--plugins json: Python found .* first: rename .*json.py"):
        plugins.load_plugins(["json"])


def test_the_current_directory_is_searched_last(folder):
    (folder / "installed").mkdir()
    sys.path.append(str(folder / "installed"))
    for place in (folder, folder / "installed"):
        (place / "own_plugin.py").write_text("")
    with pytest.raises(plugins.PluginError) as error:
        plugins.load_plugins(["own_plugin"])
    first, second = folder / "installed" / "own_plugin.py", folder / "own_plugin.py"
    assert str(error.value) == f"--plugins own_plugin: Python found {first} first: rename {second}"


def test_a_module_of_a_package_is_found_by_its_dotted_name(folder):
    (folder / "own_package").mkdir()
    for name in ("__init__", "part"):
        (folder / "own_package" / f"{name}.py").write_text("")
    plugins.load_plugins(["own_package.part"])
    assert "own_package.part" in sys.modules
    (folder / "xml").mkdir()
    (folder / "xml" / "dom.py").write_text("")
    with pytest.raises(plugins.PluginError, match="Python found .* first: rename .*xml/dom.py"):
        plugins.load_plugins(["xml.dom"])


def test_no_plugins_leave_the_path_alone(folder):
    before = list(sys.path)
    plugins.load_plugins([])
    assert sys.path == before
    for _ in range(2):
        (folder / "own_plugin.py").write_text("")
        plugins.load_plugins(["own_plugin"])
    assert sys.path == [*before, str(folder)]


def test_a_run_names_all_that_it_misses():
    with pytest.raises(
        plugins.PluginError, match="runs/a was trained with plugins: add --plugins one_plugin two_plugin, or"
    ):
        plugins.check_plugins(["one_plugin", "sys", "two_plugin"], "runs/a")


def test_the_option_may_be_repeated():
    parser = argparse.ArgumentParser()
    plugins.add_option(parser)
    assert parser.parse_args(["--plugins", "a", "b", "--plugins", "c"]).plugins == ["a", "b", "c"]
    assert parser.parse_args([]).plugins == []
