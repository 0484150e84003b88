import importlib.util

import pytest

import cotwin


def test_no_command_shows_all(capsys):
    assert cotwin.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cotwin.COMMANDS)


def test_unknown_command_suggests(capsys):
    assert cotwin.main(["recrod"]) == 2
    assert "Did you mean 'record'" in capsys.readouterr().err


@pytest.mark.parametrize("module", [module for module, _ in cotwin.COMMANDS.values()])
def test_every_command_has_a_module(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", ["report", "demos", "keys", "bridge", "demo"])
def test_help_answers(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cotwin.main([name, "--help"])
    assert not exit_.value.code
    assert f"usage: cotwin {name}" in capsys.readouterr().out
