"""The folder of what outlives a server."""

import pytest

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.state import state_folder


def test_the_folder_is_the_users_own_unless_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder(ServerOptions()) == tmp_path / "xdg" / "pyrosome"
    assert state_folder(ServerOptions(state_path=str(tmp_path / "named"))) == tmp_path / "named"
    for unset in ("", "relative/path"):  # the specification of these variables has relative paths ignored
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert state_folder(ServerOptions()) == tmp_path / "home" / ".local" / "state" / "pyrosome"


def test_nobody_else_may_look_into_it(tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    for folder in (open_to_all, tmp_path / "new" / "deeper"):
        assert state_folder(ServerOptions(state_path=str(folder))).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(RequestError, match=r"cannot be used: .*; name another with state_path"):
            state_folder(ServerOptions(state_path=str(path)))
