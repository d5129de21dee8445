"""NATS URLs: which servers one names, and how to be let in.

A URL is `nats://[user:password@]host:port[,host2:port2]/?options`; a user without
a password is a token. What is secret may also come from files. Options:

    creds, nkey        files: credentials (JWT and seed), a bare seed
    token              a token
    tls                true: refuse a server without TLS; so do those that follow
    tls_ca             file: whom to trust, in place of the system's
    tls_cert, tls_key  files: the client's own certificate
    tls_hostname       the name in the server's certificate, where it is another
    tls_first          true: TLS before the server has said anything
    inbox              what the subjects begin with that answers come to (_INBOX):
                       one of its own where others must not read them
"""

import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from actors.url_options import read_options

__all__ = ["BadNatsUrl", "NatsUrl", "parse_nats_url"]

_HOST = re.compile(r"\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+")
_PORT = re.compile(r"[0-9]{1,5}")
_INBOX = re.compile(r"[A-Za-z0-9_-]{1,128}(\.[A-Za-z0-9_-]{1,128})*")
_FILES = ("creds", "nkey", "tls_ca", "tls_cert", "tls_key")
_FLAGS = ("tls", "tls_first")
_TEXTS = ("token", "tls_hostname", "inbox")
_OPTIONS = (*_FILES, *_FLAGS, *_TEXTS)


class BadNatsUrl(ValueError):
    """The URL cannot be a NATS server, and why; it names no secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsUrl:
    """Where servers are, and what they ask for. Its text shows no secret.

    `options` are those that `parse_nats_url` was told of besides its own.
    """

    servers: tuple[str, ...]
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds: Path | None = field(default=None, repr=False)
    nkey: Path | None = field(default=None, repr=False)
    tls: bool = False
    tls_first: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_hostname: str | None = None
    inbox: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"nats://{','.join(self.servers)}"

    def check(self) -> None:
        """Check the files that it names.

        Raises:
            BadNatsUrl: one of them is not there, or is not what it should be.
        """
        for name in _FILES:
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise BadNatsUrl(f"NATS {self}: {name}: there is no file {path}")
        self.tls_context()

    def tls_context(self) -> ssl.SSLContext | None:
        """What TLS is made with; none where the URL does not ask for it.

        Raises:
            BadNatsUrl: a certificate or key cannot be read.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise BadNatsUrl(
                f"NATS {self}: its certificates cannot be read: {error}"
            ) from None
        return context


def parse_nats_url(url: str, *, more: Sequence[str] = ()) -> NatsUrl:
    """The servers that `url` names, and how to be let in.

    `more` are the names of options that are somebody else's, left as they are.

    Raises:
        BadNatsUrl: it names none, or an option is wrong; the message shows no
            secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() != "nats":
        raise BadNatsUrl("a NATS URL is nats://[user:password@]host:port")
    place, _, query = rest.partition("?")
    login, at, after = place.rpartition("@")
    if not at and "@" in query:
        raise BadNatsUrl("in a NATS URL a ? of a password is written %3F")
    hosts, slash, path = after.partition("/")
    servers = tuple(_server(each) for each in hosts.split(","))
    if slash and path:
        raise BadNatsUrl(f"NATS nats://{hosts}: nothing may follow the first /")
    known = f"NATS nats://{','.join(servers)}"

    def refuse(why: str) -> BadNatsUrl:
        return BadNatsUrl(f"{known}: {why}")

    # Nothing may follow a ? here: a store adds its own to what an engine has.
    names = (*_OPTIONS, *more)
    options = read_options(query, names, refuse=refuse) if query else {}
    given = {name: option.value for name, option in options.items()}
    fields: dict[str, Any] = {
        name: Path(given[name]) for name in _FILES if name in given
    }
    fields |= {name: given[name] for name in _TEXTS if name in given}
    for name in _FLAGS:
        if given.get(name, "false") not in ("true", "false"):
            raise BadNatsUrl(f"{known}: {name} must be true or false")
        fields[name] = given.get(name) == "true"
    fields["tls"] = any(fields.get(name) for name in fields if name.startswith("tls"))
    if given.get("tls") == "false" and fields["tls"]:
        raise BadNatsUrl(f"{known}: tls is false, and other tls options are given")
    if not _INBOX.fullmatch(fields.get("inbox", "_INBOX")):
        raise BadNatsUrl(f"{known}: inbox is no subject")
    if ("tls_key" in fields) > ("tls_cert" in fields):
        raise BadNatsUrl(f"{known}: tls_key is given without tls_cert")
    if at:
        user, colon, password = login.partition(":")
        if not user or (colon and not password):
            raise BadNatsUrl(f"{known}: before the @ are user:password, or a token")
        if colon:
            fields |= {"user": unquote(user), "password": unquote(password)}
        elif "token" in fields:
            raise BadNatsUrl(f"{known}: the token is given twice")
        else:
            fields["token"] = unquote(user)
    ways = [w for w in ("user", "token", "creds", "nkey") if w in fields]
    if len(ways) > 1:
        raise BadNatsUrl(f"{known}: {' and '.join(ways)} are given; one is enough")
    others = MappingProxyType({n: v for n, v in given.items() if n in more})
    return NatsUrl(servers=servers, options=others, **fields)


def _server(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "4222"
    if not _HOST.fullmatch(host):
        # Not shown: where an @ is missing it may be a password.
        raise BadNatsUrl("a NATS URL names its servers as host:port,host:port")
    if not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
        raise BadNatsUrl(f"NATS server {host}: its port must be 1 to 65535")
    return f"{host}:{int(port)}"
