"""The command `vim-ssl`: finds the scripts, starts only what is asked for, fails in one line."""

import io
import socket
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import vim_ssl
from vim_ssl import cli
from vim_ssl.tasks import registry
from vim_ssl.utils import plugins

ROOT = Path(vim_ssl.__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Install a command `fake` whose main is the function given."""
    monkeypatch.delenv("VIM_SSL_TRACEBACK", raising=False)

    def install(function):
        module = types.ModuleType("vim_ssl_fake")
        module.main = function
        monkeypatch.setitem(sys.modules, "vim_ssl_fake", module)
        monkeypatch.setitem(cli.TOOLS, "fake", cli.Command("vim_ssl_fake", "main", "A fake."))

    return install


def raises(error: BaseException, name: str = "vim_ssl.somewhere"):
    """A main that raises from a module of this name."""
    scope = {"__name__": name, "error": error}
    exec("def main(argv):\n    raise error", scope)
    return scope["main"]


def test_arguments_arrive_and_the_exit_code_returns(command):
    seen = []
    command(lambda argv: seen.append((argv, sys.argv[0])) or 7)
    before = list(sys.argv)
    assert cli.main(["fake", "--lr", "1"]) == 7
    assert seen == [(["--lr", "1"], "vim-ssl fake")]
    assert sys.argv == before


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp932"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_character_that_the_terminal_lacks_is_replaced(command, monkeypatch, encoding, stream):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, stream, terminal)
    text = "8 × 8 · 3 → 4 …\udce9"
    command(lambda argv: print(text, file=getattr(sys, stream), flush=True) or 0)
    assert cli.main(["fake"]) == 0
    printed = terminal.buffer.getvalue().decode(encoding)
    assert printed.startswith("8 ")
    assert "\\udce9" in printed


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []], ids=["help", "h", "nothing"])
def test_the_overview_lists_every_command(capsys, argv):
    assert cli.main(argv) == (0 if argv else 2)
    text = capsys.readouterr().out
    for name in cli.all_commands():
        assert f"  {name} " in text


def test_every_script_is_a_command_and_none_is_started_to_list_it():
    files = {
        path
        for folder in ("recipes", "downstream")
        for path in (ROOT / folder).glob("*.py")
        if not path.name.startswith("_")
    }
    commands = cli.all_commands()
    for path in files:
        found = commands[path.stem.replace("_", "-")]
        assert found.module == f"vim_ssl.{path.parent.name}.{path.stem}"
        assert found.help, f"{path} needs a docstring"


def test_a_file_becomes_a_command(monkeypatch, tmp_path):
    (tmp_path / "count_sheep.py").write_text('"""Count the sheep.\n\nSlowly."""\n1 / 0\n')
    (tmp_path / "_private.py").write_text("")
    package = types.ModuleType("vim_ssl.recipes")
    package.__spec__ = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setitem(sys.modules, "vim_ssl.recipes", package)
    assert cli.scripts("recipes") == {
        "count-sheep": cli.Command("vim_ssl.recipes.count_sheep", "main", "Count the sheep.")
    }


def test_a_plugin_brings_a_task(monkeypatch, tmp_path, capsys):
    (tmp_path / "sheep_task.py").write_text(
        "from vim_ssl.tasks.registry import register_task\n\n"
        "def main(argv):\n    return len(argv)\n\n"
        "register_task('count-sheep', main, 'Count sheep.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("sheep", "sheep_task", "vim_ssl.plugins")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(registry, "TASKS", {})
    assert cli.main(["count-sheep", "1", "2", "3"]) == 3
    assert cli.main(["count-sheeps"]) == 2
    assert "Did you mean 'count-sheep'?" in capsys.readouterr().err
    registry.register_task("wool", "sheep_task", "Count wool.")
    assert cli.main(["wool"]) == 0
    with pytest.raises(ValueError, match="'wool' is already registered by sheep_task"):
        registry.register_task("wool", "other", "Count wool.")
    points.append(EntryPoint("wolf", "no_such_module", "vim_ssl.plugins"))
    assert cli.main(["unknown"]) == 2
    assert "wolf" in capsys.readouterr().err.strip().splitlines()[-1]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vim-ssl {vim_ssl.utils.environment.__version__}\n"


def test_an_unknown_command_gets_the_near_one(capsys):
    assert cli.main(["verfy", "x.pth"]) == 2
    assert "Did you mean 'verify'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("img_size 225 is not divisible by patch_size 16; use 224."),
        FileNotFoundError("no run at runs/7"),
        ImportError("Detection needs pycocotools."),
        ConnectionError("the Hub is unreachable"),
        FloatingPointError("20 steps in a row were not finite; lower base_lr."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_users_mistake_is_one_line(command, capsys, monkeypatch, error):
    command(raises(error))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == f"vim-ssl fake: error: {error}\n"
    monkeypatch.setenv("VIM_SSL_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["fake"])


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (ValueError("shapes (3,) (4,)"), "numpy.linalg"),
        (KeyError("x"), "vim_ssl.objectives.mae"),
        (RuntimeError("x"), "vim_ssl.objectives.mae"),
    ],
    ids=["ValueError-elsewhere", "KeyError", "RuntimeError"],
)
def test_a_defect_keeps_its_traceback(command, error, module):
    command(raises(error, module))
    with pytest.raises(type(error)):
        cli.main(["fake"])


@pytest.mark.slow
def test_a_launched_script_says_one_line_of_its_own():
    """What follows it is the launcher's."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet",
              "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", str(ROOT / "recipes" / "clip_pretrain.py")]  # fmt: skip
    done = subprocess.run([*launch, "--data", "pairs:nowhere"], capture_output=True, text=True)
    assert done.returncode
    (line,) = done.stderr.splitlines()
    assert line.startswith("clip_pretrain.py: error: The folder 'nowhere' does not exist.")


def test_a_missing_path_is_a_users_mistake_wherever_it_is_raised(command, capsys):
    command(lambda argv: Path("not/there").read_text())
    assert cli.main(["fake"]) == 2
    assert "not/there" in capsys.readouterr().err


def test_ctrl_c_is_130(command):
    command(raises(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130


def test_tests_have_no_network():
    with pytest.raises(OSError, match="tests have no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="tests have no network"):
        socket.getaddrinfo("example.org", 80)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_names_that_are_not_utf8_are_printed_in_every_locale(command, monkeypatch):
    command(lambda argv: print("bad\udcff.png") or 0)
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="utf-8", errors="strict"))
    assert cli.main(["fake"]) == 0
    sys.stdout.flush()
    assert screen.getvalue() == b"bad\\udcff.png\n"
