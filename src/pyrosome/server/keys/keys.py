"""What a key looks like, and how one is known again: `pyr-`, a public id, a secret, a checksum.

The id finds the key's row and may be shown.  The secret is drawn at random, so a fast hash of it is as good as a slow
one (docs/adr/0011).  The checksum tells a mistyped key from a wrong one without looking anything up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
import string
import zlib

KEY, INVITE = "pyr-", "pyi-"
ID_CHARS, SECRET_CHARS, CHECK_CHARS = 12, 28, 6  # 28 characters of 62 are 166 bits
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BODY = re.compile(rf"[0-9A-Za-z]{{{ID_CHARS + SECRET_CHARS + CHECK_CHARS}}}", re.ASCII)
NOBODYS = "0" * 64  # the digest of nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Secret:
    """A key or an invite code as its holder has it.  `text` is shown once and kept nowhere."""

    text: str = dataclasses.field(repr=False)
    id: str
    digest: str = dataclasses.field(repr=False)


def new_secret(kind: str, public_id: str = "") -> Secret:
    """A new one, under an id of its own or under that of the key it takes the place of."""
    public_id = public_id or new_id()
    text = kind + public_id + _drawn(SECRET_CHARS)
    text += _check(text)
    return Secret(text, public_id, _digest(text))


def read_secret(kind: str, text: str) -> Secret | None:
    """What a client sent; None where it is no key at all, or a mistyped one."""
    if (
        not text.startswith(kind)
        or not _BODY.fullmatch(text, len(kind))
        or _check(text[:-CHECK_CHARS]) != text[-CHECK_CHARS:]
    ):
        return None
    return Secret(text, text[len(kind) :][:ID_CHARS], _digest(text))


def is_same(digest: str, stored: str) -> bool:
    """Whether two digests are equal, in a time that does not tell how nearly."""
    return hmac.compare_digest(digest, stored)


def new_id() -> str:
    """A public id nobody else has."""
    return _drawn(ID_CHARS)


def _drawn(num_chars: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(num_chars))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"pyrosome-key").hexdigest()


def _check(text: str) -> str:
    rest, chars = zlib.crc32(text.encode()), ""
    for _ in range(CHECK_CHARS):
        rest, digit = divmod(rest, len(_ALPHABET))
        chars += _ALPHABET[digit]
    return chars
