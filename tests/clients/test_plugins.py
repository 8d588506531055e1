"""Commands that other distributions add: found by name, imported only when they run."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import quickchange_client
import typer

METADATA = "Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n"
ENTRY_POINTS = """
[quickchange.commands]
greet = some_plugin:greet
tools = some_plugin:tools
broken = no_such_module:run
list = some_plugin:greet
"""
CODE = '''
import typer

print("plugin imported")
tools = typer.Typer(no_args_is_help=True)


def greet(name: str, loud: bool = False) -> None:
    """Greet somebody."""
    print(("HELLO " if loud else "hello ") + name)
    raise typer.Exit(3)


@tools.command()
def first() -> None:
    """Be first."""
    print("first")


@tools.command()
def second() -> None:
    """Be second."""
    print("second")
'''
RUN = "import sys; {before} from quickchange_client.cli import main; main()"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """Return a folder that holds an installed distribution."""
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(textwrap.dedent(ENTRY_POINTS))
    (tmp_path / "some_plugin.py").write_text(CODE)
    return tmp_path


def run(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with some statements before."""
    code = RUN.format(before=before)
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def with_plugin(plugin: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(*words, before=f"sys.path.insert(0, {str(plugin)!r});")


def test_they_are_listed_without_being_imported(plugin: Path) -> None:
    done = with_plugin(plugin, "--help")
    assert "Provided by some-plugin." in done.stdout
    assert "plugin imported" not in done.stdout


def test_a_function_is_a_command_with_its_own_options_and_exit_code(plugin: Path) -> None:
    done = with_plugin(plugin, "greet", "Ada", "--loud")
    assert (done.returncode, "HELLO Ada" in done.stdout) == (3, True)
    help_text = with_plugin(plugin, "greet", "--help").stdout
    assert "quickchange greet" in help_text
    assert "Greet somebody." in help_text
    assert with_plugin(plugin, "greet").returncode == 2


def test_a_typer_is_a_group_of_commands(plugin: Path) -> None:
    assert "second" in with_plugin(plugin, "tools", "second").stdout
    assert "Be first." in with_plugin(plugin, "tools", "--help").stdout


def test_one_that_cannot_be_loaded_names_its_distribution(plugin: Path) -> None:
    done = with_plugin(plugin, "broken")
    assert done.returncode == 1
    assert "some-plugin" in done.stderr
    assert "no_such_module" in done.stderr


def test_our_own_commands_cannot_be_replaced(plugin: Path) -> None:
    done = with_plugin(plugin, "list", "--help")
    assert "quickchange list" in done.stdout
    assert "plugin imported" not in done.stdout


def test_serve_says_how_to_get_the_server_when_it_is_not_there(tmp_path: Path) -> None:
    """In an interpreter that sees all that is installed but the server."""
    installed = Path(typer.__file__).parent.parent
    for entry in installed.iterdir():
        if "quickchange" not in entry.name:
            (tmp_path / entry.name).symlink_to(entry)
    client = Path(quickchange_client.__file__).parent.parent
    code = RUN.format(before=f"sys.path += [{str(tmp_path)!r}, {str(client)!r}];")
    words = [sys.executable, "-I", "-S", "-c", code, "serve", "--port", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install quickchange-server" in done.stderr
