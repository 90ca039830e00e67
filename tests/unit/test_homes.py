"""Folders and keys: nobody else reads them, and nothing is half-written."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from fluxmesh.storage.homes import (
    AgentHome,
    Home,
    HomeError,
    create_private,
    private_folder,
    read_own,
    read_private,
    write_private,
)
from fluxmesh.storage.keys import Allowlist, Keys, is_key, load_keys, store_keys


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def open_umask() -> object:
    """The modes must not hang on a careful umask."""
    old = os.umask(0)
    yield
    os.umask(old)


def test_the_folders_follow_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    assert Home.default().mesh == tmp_path / "home" / "mesh.json"
    assert AgentHome.default(7000).authorized == tmp_path / "state" / "agent-7000" / "authorized"
    assert mode(tmp_path / "home") == mode(tmp_path / "state") == 0o700


def test_without_the_environment_agents_have_a_folder_a_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLUXMESH_HOME", raising=False)
    monkeypatch.delenv("FLUXMESH_STATE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.default().folder == tmp_path / ".config" / "fluxmesh"
    assert AgentHome.default(7000).folder == tmp_path / ".local/state/fluxmesh/agent-7000"
    assert AgentHome.default(7001).folder != AgentHome.default(7000).folder


def test_a_folder_that_others_could_look_into_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(0o755)
    assert mode(private_folder(folder)) == 0o700


def test_a_folder_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("link", "file", "file/below"):
        with pytest.raises(HomeError, match=name):
            private_folder(tmp_path / name)


def test_a_file_is_replaced_in_one_piece_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    write_private(path, "old")
    write_private(path, "new")
    assert read_private(path) == "new" and mode(path) == 0o600
    assert os.listdir(tmp_path) == ["mesh.json"]


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    assert create_private(path, "first")
    assert not create_private(path, "second")
    assert read_private(path) == "first"
    assert os.listdir(tmp_path) == ["client.key"]


def test_a_write_that_fails_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    write_private(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_private(path, "\ud800")
    assert read_private(path) == "old" and os.listdir(tmp_path) == ["mesh.json"]
    with pytest.raises(HomeError, match="nowhere"):
        write_private(tmp_path / "nowhere" / "mesh.json", "new")


@pytest.mark.parametrize("others", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, others: int) -> None:
    path = tmp_path / "client.key"
    write_private(path, "secret")
    path.chmod(others)
    with pytest.raises(HomeError, match="rotate"):
        read_private(path)


def test_a_public_file_may_be_read_by_others_and_changed_by_none(tmp_path: Path) -> None:
    path = tmp_path / "client.pub"
    write_private(path, "key")
    path.chmod(0o644)
    assert read_own(path) == "key"
    path.chmod(0o664)
    with pytest.raises(HomeError, match="changed by others"):
        read_own(path)


def test_a_secret_behind_a_link_is_refused(tmp_path: Path) -> None:
    write_private(tmp_path / "real", "secret")
    (tmp_path / "client.key").symlink_to(tmp_path / "real")
    with pytest.raises(HomeError, match="client.key"):
        read_private(tmp_path / "client.key")


def test_keys_are_made_once_even_by_many_at_a_time(tmp_path: Path) -> None:
    loaded: list[Keys] = []
    threads = [
        threading.Thread(target=lambda: loaded.append(load_keys(tmp_path / "home", "client")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8 and len(set(loaded)) == 1
    assert mode(tmp_path / "home" / "client.key") == 0o600
    assert sorted(os.listdir(tmp_path / "home")) == ["client.key", "client.pub"]


def test_stored_keys_replace_the_old_ones(tmp_path: Path) -> None:
    old = load_keys(tmp_path, "client")
    new = Keys.new()
    store_keys(tmp_path, "client", new)
    assert load_keys(tmp_path, "client") == new != old
    assert (tmp_path / "client.pub").read_text().strip() == new.public


def test_the_public_file_follows_a_secret_that_was_put_there_by_hand(tmp_path: Path) -> None:
    load_keys(tmp_path, "client")
    other = Keys.new()
    write_private(tmp_path / "client.key", other.secret + "\n")
    assert load_keys(tmp_path, "client") == other
    assert (tmp_path / "client.pub").read_text().strip() == other.public


def test_a_key_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    write_private(tmp_path / "client.key", "not a key")
    with pytest.raises(HomeError, match=r"client\.key.*40 characters"):
        load_keys(tmp_path, "client")


def test_a_secret_never_shows() -> None:
    keys = Keys.new()
    assert keys.secret not in repr(keys) and keys.secret not in str(keys)
    assert Keys.of(keys.secret) == keys


def test_what_is_a_key_and_what_is_not() -> None:
    assert all(is_key(Keys.new().public) for _ in range(50))
    assert not is_key("")
    assert not is_key("#" * 40)  # right characters, a number that 32 bits don't hold
    assert not is_key(Keys.new().public[:-1])
    assert not is_key("é" * 40)
    assert not is_key("~" * 40)


def test_an_empty_allowlist_lets_nobody_in(tmp_path: Path) -> None:
    assert Allowlist(tmp_path / "authorized").users() == {}


def test_an_allowlist_says_what_its_files_say_now(tmp_path: Path) -> None:
    allowlist = Allowlist(tmp_path / "authorized")
    anna, ben, new = (Keys.new().public for _ in range(3))
    allowlist.add("anna", anna)
    allowlist.add("ben@mac-2.local", ben)
    assert allowlist.users() == {anna: "anna", ben: "ben@mac-2.local"}
    allowlist.add("anna", new)
    assert allowlist.users() == {new: "anna", ben: "ben@mac-2.local"}
    allowlist.remove("ben@mac-2.local")
    allowlist.remove("ben@mac-2.local")
    assert allowlist.users() == {new: "anna"}


def test_a_key_file_that_others_may_change_or_that_is_none_lets_nobody_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowlist = Allowlist(tmp_path / "authorized")
    allowlist.add("anna", Keys.new().public)
    (allowlist.folder / "anna.pub").chmod(0o666)
    write_private(allowlist.folder / "ben.pub", "ssh-ed25519 AAAA")
    write_private(allowlist.folder / "a b.pub", Keys.new().public)
    write_private(allowlist.folder / "carl.pub~", Keys.new().public)
    (allowlist.folder / "dora.pub").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert allowlist.users() == {}
    assert len(caplog.records) == 4  # told once, not at each handshake
    log = " ".join(record.getMessage() for record in caplog.records)
    assert all(name in log for name in ("anna.pub", "ben.pub", "a b.pub", "dora.pub"))


@pytest.mark.parametrize("name", ["", "../anna", ".anna", "a/b", "a b", "a" * 65, "a\n"])
def test_a_name_that_would_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    allowlist = Allowlist(tmp_path / "authorized")
    with pytest.raises(HomeError, match="name"):
        allowlist.add(name, Keys.new().public)
    allowlist.remove(name)
    assert os.listdir(allowlist.folder) == []


def test_a_public_key_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="anna"):
        Allowlist(tmp_path / "authorized").add("anna", "x")
