"""Who may reach a service of LMKV's: loopback addresses, and tokens for all others."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Mapping
from pathlib import Path

from lmkv.config import service_token
from lmkv.errors import ConfigError

__all__ = ["is_loopback", "read_token"]


def read_token(token_file: str | None, environ: Mapping[str, str], warnings: list[str]) -> str | None:
    """The token that clients have to show: of the file that ``--token-file`` names, or ``LMKV_TOKEN``.

    Args:
        warnings: is given a line if others may read the file.

    Raises:
        ConfigError: the file can't be read or is empty, or the token is not printable.
    """
    token = service_token(environ)
    if token_file is not None:
        path = Path(token_file)
        try:
            token = path.read_text(encoding="utf-8").strip()
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                warnings.append(f"--token-file: others may read {path}: chmod 600 it")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file: expected a readable file; got: {error}") from None
        if not token:
            raise ConfigError(f"--token-file: expected a token in {path}; got an empty file")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("token: expected printable ASCII without spaces; got something else: choose another")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Names other than ``localhost`` are not looked up and count as far."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
