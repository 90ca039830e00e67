"""An ssh server of this test's own on loopback, and a user with a home of its own to log in as.

`Server` needs Linux, root, and openssh-server, which `.ci/run` installs. Everything that it
makes is in the folder that it is given, but for the user, whom `close` removes with all its
processes.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.ports import free_ports
from tests.processes import commands_of

USER = "fluxmesh-ssh-test"
ADDRESS = "127.0.0.2"  # of this machine too, but not what a hostfile takes for it
ALIAS = "mac1"  # what hostfiles call it; ~/.ssh/config knows the rest


class Server:
    """sshd on a free port, known to ssh as `ALIAS`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        (self.port,) = free_ports(1, ADDRESS)
        self.config = folder / "ssh_config"
        self.log = folder / "sshd.log"
        self._add_user()
        for name in ("host", "user", "stranger"):
            key = folder / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self._let_in()
        self._configure()
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = shutil.which("sshd") or "/usr/sbin/sshd"
        command = [sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(self.log)]
        self.process = subprocess.Popen(command)
        self._wait()

    def ssh(self, key: str = "user") -> str:
        """What FLUXMESH_SSH has to be, with the key of that name."""
        return f"ssh -F {self.config} -o IdentityFile={self.folder / key}"

    def processes(self) -> list[list[str]]:
        """The command lines of all that the user runs."""
        return [words for words in commands_of(self.home).values() if words]

    def cut(self) -> None:
        """Ends every connection from the server's side, as a network that is gone would.

        Each is held by two processes of sshd, of which the one without privileges has the socket;
        what the user runs is left alone.
        """
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        subprocess.run(["userdel", "-f", USER], check=True, capture_output=True)

    def _add_user(self) -> None:
        subprocess.run(["userdel", "-f", USER], check=False, capture_output=True)
        self.home.mkdir()
        command = ["useradd", "-M", "-d", str(self.home), "-s", "/bin/sh", "-p", "*"]
        subprocess.run([*command, USER], check=True, capture_output=True)
        code = f"{sys.executable} -c 'import fluxmesh_agent, fluxmesh_coordinator, mlx.core'"
        done = subprocess.run(["su", USER, "-c", code], cwd="/", capture_output=True, check=False)
        self.folder.chmod(0o711)
        if done.returncode != 0:
            # This clone lies where nobody else may look: another name and home, root's rights.
            subprocess.run(["userdel", "-f", USER], check=True, capture_output=True)
            subprocess.run([*command, "-o", "-u", "0", USER], check=True, capture_output=True)
        owner = pwd.getpwnam(USER)
        os.chown(self.home, owner.pw_uid, owner.pw_gid)
        self.uid = owner.pw_uid

    def _let_in(self) -> None:
        folder = self.home / ".ssh"
        folder.mkdir(mode=0o700)
        keys = folder / "authorized_keys"
        keys.write_text((self.folder / "user.pub").read_text())
        for path in (folder, keys):
            os.chown(path, self.uid, pwd.getpwnam(USER).pw_gid)

    def _configure(self) -> None:
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {ADDRESS}\nPort {self.port}\nHostKey {self.folder / 'host'}\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\n"
            f"PidFile {self.folder / 'sshd.pid'}\n"
        )
        known = (self.folder / "host.pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text(f"[{ADDRESS}]:{self.port} {' '.join(known)}\n")
        self.config.write_text(
            f"Host {ALIAS}\n  HostName {ADDRESS}\n  Port {self.port}\n  User {USER}\n"
            f"  UserKnownHostsFile {self.folder / 'known_hosts'}\n  IdentitiesOnly yes\n"
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((ADDRESS, self.port), 1):
                return
            time.sleep(0.05)
        self.process.terminate()
        raise AssertionError(f"sshd does not listen: {self.log.read_text()}")
