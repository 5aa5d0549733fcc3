"""The private folder, the key in it, and pseudonyms made with the key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Final

from medclr.errors import ConfigError

HOME_VARIABLE: Final = "MEDCLR_HOME"
KEY_FILE: Final = "key"
MAP_FILE: Final = "references.sqlite"

_KEY_BYTES = 32


def private_home() -> Path:
    """The folder of the key and the map of references: ``$MEDCLR_HOME``, or ``~/.config/medclr``.

    It is not made here: whatever writes into it makes it, for its owner alone (mode 700).

    Raises:
        ConfigError: there is neither the variable nor a home folder.
    """
    given = os.environ.get(HOME_VARIABLE, "").strip()
    try:
        return Path(os.path.abspath(Path(given).expanduser() if given else Path.home() / ".config" / "medclr"))
    except RuntimeError as error:
        raise ConfigError(
            "There is no place for the private key.",
            got="no home folder",
            wanted=f"a home folder, or {HOME_VARIABLE}",
            fix=f"Set {HOME_VARIABLE} to a folder that only you can read.",
        ) from error


def make_home(home: Path) -> None:
    """Make the private folder (mode 700), or check that nobody else may write into the one that is there.

    Raises:
        ConfigError: it cannot be made, or others may write into it.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(home.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            "The private folder cannot be made.",
            got=f"{home}: {error.strerror}",
            wanted="a folder that you may write to",
            fix=f"Set {HOME_VARIABLE} to such a folder, not one beside the scans.",
        ) from error
    if mode & 0o022:
        raise ConfigError(
            "Others may write into the private folder.",
            got=f"{home} with mode {mode:o}",
            wanted="mode 700",
            fix=f"chmod 700 {home}",
        )


def make_private_file(path: Path) -> None:
    """An empty file that its owner alone may read (mode 600), unless there is a file already."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def refuse_readable(path: Path, what: str) -> None:
    """Refuse a private file that others may read or write.

    Raises:
        ConfigError: they may, or it is no file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"{what} is no file.", got=str(path), wanted="a file that only you can read", fix="Move away what is there."
        )
    if mode & 0o077:
        raise ConfigError(
            f"Others may read {what[0].lower()}{what[1:]}.",
            got=f"{path} with mode {stat.S_IMODE(mode):o}",
            wanted="mode 600",
            fix=f"chmod 600 {path}, and consider who may have read it.",
        )


def read_key(home: Path, *, create: bool = True) -> bytes:
    """The key of a private folder, made on first use.

    The first of several processes makes it, and all others read what it made: the file appears whole under its name.

    Args:
        home: the private folder.
        create: whether to make the key where there is none. Never where there is a map of references already, which
            another key could not read.

    Returns:
        32 bytes.

    Raises:
        ConfigError: others may read it, it is damaged, it is missing, or it cannot be made.
    """
    path = home / KEY_FILE
    try:
        mapped = (home / MAP_FILE).exists()  # looked for first: another process makes the key before the map
        if not path.exists():
            if not create or mapped:
                raise ConfigError(
                    "The private key is missing.",
                    got=f"no file {path}",
                    wanted="the key with which the scans were indexed",
                    fix=f"Restore it, set {HOME_VARIABLE} to the folder that holds it, or, to begin anew with other "
                    f"pseudonyms, move {home / MAP_FILE} away and index again.",
                )
            make_home(home)
            _create(path)
        refuse_readable(path, "The private key")
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise ConfigError(
            "The private key cannot be read or made.",
            got=f"{path}: {error.strerror}",
            wanted="a file that you may read, in a folder that you may write to",
            fix=f"Set {HOME_VARIABLE} to a folder that only you can read.",
        ) from error
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            "The private key is damaged.",
            got=f"{path}, which does not hold {2 * _KEY_BYTES} hexadecimal digits",  # never what it does hold
            wanted="the key as medclr wrote it",
            fix="Restore it from a copy. Without one, move it and the map of references away and index again.",
        )
    return key


def _create(path: Path) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    text = os.urandom(_KEY_BYTES).hex().encode() + b"\n"
    handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # unlike a rename, it leaves the key of a faster process alone
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            with (
                suppress(FileExistsError),
                os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file,
            ):
                file.write(text)
    finally:
        part.unlink(missing_ok=True)


class Pseudonyms:
    """Names that stand for patients, studies, series and contents; the same for the same key, and meaningless without.

    HMAC-SHA256 of the kind and the text, 80 bits of it, in lower-case base32.

    Args:
        home: the private folder; :func:`private_home` by default. The key is made there on first use.

    Raises:
        ConfigError: the key cannot be used.

    Example:
        >>> Pseudonyms().patient("P001")  # doctest: +SKIP
        'pat-k4ruxw2dq5lnc7ya'
    """

    def __init__(self, home: Path | None = None) -> None:
        self._key = read_key(private_home() if home is None else Path(home))

    def patient(self, text: str, issuer: str = "") -> str:
        """The pseudonym of a patient.

        Args:
            text: the id; white space around it and the case of letters do not count: files of one patient spell one id
                in both, and two patients whose ids differ in case alone would only be kept in the same split.
            issuer: who gave it; the same id of two issuers is two patients.
        """
        return self._name("pat", _plain(text), _plain(issuer))

    def study(self, uid: str) -> str:
        """The pseudonym of a study."""
        return self._name("stu", _plain(uid))

    def series(self, uid: str) -> str:
        """The pseudonym of a series."""
        return self._name("ser", _plain(uid))

    def content(self, digest: str) -> str:
        """The pseudonym of a digest of voxels: without the key nobody can tell whether a scan of theirs is there."""
        return self._name("vox", _plain(digest))

    def _name(self, kind: str, *texts: str) -> str:
        return f"{kind}-{base64.b32encode(keyed_digest(self._key, kind, *texts)[:10]).decode().lower()}"


def keyed_digest(key: bytes, kind: str, *texts: str) -> bytes:
    """HMAC-SHA256 of texts; those of two kinds, or split elsewhere, never agree."""
    message = b"".join(len(part).to_bytes(8, "big") + part for part in _encoded(kind, *texts))
    return hmac.new(key, message, hashlib.sha256).digest()


def _encoded(*texts: str) -> list[bytes]:
    return [text.encode("utf-8", "surrogateescape") for text in texts]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(text)).replace("\0", " ").split()).casefold()
