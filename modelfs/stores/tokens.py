"""Tokens in files: read anew for every question, so that a mounted secret can be rotated."""

from __future__ import annotations

from pathlib import Path

from modelfs.errors import AccessDenied


def read_token(path: str, store: str) -> str:
    """Return the token in the file at `path`, an option of the store with the URL `store`; blocks.

    Raises:
        AccessDenied: the file cannot be read, or what it holds cannot be sent in a header.

    """
    try:
        token = Path(path).expanduser().read_text().strip()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise AccessDenied(f"{store}: token_file {path} cannot be read: make it readable") from error
    return checked_token(token, f"token_file {path}", store)


def checked_token(token: str, origin: str, store: str) -> str:
    """Return `token` if it can be sent in a header; `origin` says where it was found.

    Raises:
        AccessDenied: it cannot.

    """
    if not token.isascii() or not token.isprintable() or not token:
        raise AccessDenied(f"{store}: {origin} holds no token: correct it")
    return token
