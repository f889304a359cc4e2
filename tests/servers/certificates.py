"""Certificates of the tests' own, made by the openssl command."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.servers.rabbitmq import missing


class Authority:
    """Signs certificates, in a folder that everybody may read."""

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            missing("no openssl is installed")
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self.file = self._folder / "ca.pem"
        self._serial = 0
        self._openssl(
            *("req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", "ca.key", "-out", "ca.pem"),
            *("-addext", "basicConstraints=critical,CA:TRUE"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    def issue(self, name: str, *, days: int = 2, hosts: str = "") -> tuple[Path, Path]:
        """A certificate and its key, for these hosts (``DNS:localhost``)."""
        self._serial += 1
        extensions = [
            "basicConstraints=CA:FALSE",
            "extendedKeyUsage=serverAuth,clientAuth",
            "subjectKeyIdentifier=hash",
            "authorityKeyIdentifier=keyid",
        ]
        if hosts:
            extensions.append(f"subjectAltName={hosts}")
        (self._folder / "extensions").write_text("\n".join([*extensions, ""]))
        self._openssl(
            *("req", "-nodes", "-subj", f"/CN={name}"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", f"{name}.key", "-out", "asked"),
        )
        self._openssl(
            *("x509", "-req", "-in", "asked", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-set_serial", str(self._serial), "-days", str(days)),
            *("-extfile", "extensions", "-out", f"{name}.pem"),
        )
        found = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        for path in found:
            path.chmod(0o644)  # the server runs as somebody else
        return found

    def _openssl(self, *command: str) -> None:
        done = subprocess.run(
            ["openssl", *command],
            cwd=self._folder,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self._folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
