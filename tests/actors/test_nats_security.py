import base64
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest

from actors.nats_connection import (
    ConnectionEvent,
    NatsConnection,
    NatsFailure,
    NatsRefused,
    parse_nats_url,
)
from tests.actors.nats_servers import NatsServer, nats_server
from tests.waiting import eventually

pytestmark = pytest.mark.servers

TLS = Path(__file__).parents[1] / "data" / "tls"
SECRET = "s3cr3t-word"


def with_tls(more: str = "") -> str:
    return (
        f'tls {{ cert_file: "{TLS}/server.pem", key_file: "{TLS}/server.key", '
        f'ca_file: "{TLS}/ca.pem", {more} }}'
    )


@contextmanager
def connected(server: NatsServer, options: str = "") -> Iterator[NatsConnection]:
    """A connection over which a message has gone and come back."""
    url = server.url.replace("127.0.0.1", "localhost") + options
    with closing(NatsConnection.open(parse_nats_url(url))) as connection:
        got: list[bytes] = []
        connection.subscribe("a", lambda _, data: got.append(data))
        assert connection.publish("a", b"x")
        eventually(lambda: got == [b"x"])
        yield connection


def refused(server: NatsServer, options: str = "") -> str:
    """Why no connection is made."""
    url = server.url.replace("127.0.0.1", "localhost") + options
    with pytest.raises(NatsFailure) as error:
        NatsConnection.open(parse_nats_url(url))
    assert not error.value.may_have_happened
    assert SECRET not in str(error.value)
    return f"{type(error.value).__name__}: {error.value}"


def test_tls_trusts_whom_it_is_told_to() -> None:
    with nats_server(more=with_tls()) as server:
        with connected(server, f"?tls_ca={TLS}/ca.pem"):
            pass
        assert "NatsRefused" in refused(server, f"?tls_ca={TLS}/other.pem")
        assert "no trust by TLS" in refused(server, f"?tls_ca={TLS}/other.pem")
        # Nobody else's certificates are asked for by a plain URL.
        assert "no trust by TLS" in refused(server)


def test_tls_holds_the_server_to_its_name() -> None:
    with nats_server(more=with_tls()) as server:
        ca = f"?tls_ca={TLS}/ca.pem"
        assert "no trust by TLS" in refused(server, f"{ca}&tls_hostname=elsewhere")
        with connected(server, f"{ca}&tls_hostname=localhost"):
            pass


def test_a_client_shows_its_certificate_where_the_server_wants_one() -> None:
    with nats_server(more=with_tls("verify: true")) as server:
        ca = f"?tls_ca={TLS}/ca.pem"
        own = f"&tls_cert={TLS}/client.pem&tls_key={TLS}/client.key"
        with connected(server, ca + own):
            pass
        assert "NATS nats://localhost" in refused(server, ca)


def test_tls_may_come_before_the_first_word() -> None:
    with (
        nats_server(more=with_tls("handshake_first: true")) as server,
        connected(server, f"?tls_ca={TLS}/ca.pem&tls_first=true") as connection,
    ):
        assert connection.is_connected


def test_a_password_is_not_said_to_a_server_without_tls() -> None:
    login = f'authorization {{ user: u, password: "{SECRET}" }}'
    with nats_server(more=f"{login}\ntrace: true\ndebug: true") as server:
        host = server.url.removeprefix("nats://")
        url = parse_nats_url(f"nats://u:{SECRET}@{host}?tls=true")
        with pytest.raises(NatsRefused, match="does not ask for TLS"):
            NatsConnection.open(url)
        assert "CONNECT" not in server.log


def test_a_token_opens() -> None:
    login = f'authorization {{ token: "{SECRET}" }}'
    with nats_server(more=login) as server:
        with connected(server, f"?token={SECRET}"):
            pass
        assert "refuses the credentials" in refused(server, "?token=wrong")


def test_an_nkey_opens(tmp_path: Path) -> None:
    pair = new_pair(nkeys.PREFIX_BYTE_USER)
    seed = tmp_path / "seed"
    seed.write_bytes(bytes(pair.seed))
    other = tmp_path / "other"
    other.write_bytes(bytes(new_pair(nkeys.PREFIX_BYTE_USER).seed))
    users = f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
    with nats_server(more=users) as server:
        with connected(server, f"?nkey={seed}"):
            pass
        assert "refuses the credentials" in refused(server, f"?nkey={other}")


# --- credentials: an operator, an account and a user, as `nsc` makes them ---


def new_pair(prefix: int) -> Any:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


def jwt(subject: Any, issuer: Any, name: str, claims: dict[str, Any]) -> str:
    def part(value: dict[str, Any] | bytes) -> str:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    body = {
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": name,
        "nats": {"version": 2, **claims},
    }
    body["jti"] = base64.b32encode(
        hashlib.sha256(json.dumps(body).encode()).digest()
    ).decode()
    said = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    return f"{said}.{part(issuer.sign(said.encode()))}"


def test_a_file_of_credentials_opens(tmp_path: Path) -> None:
    operator = new_pair(nkeys.PREFIX_BYTE_OPERATOR)
    account = new_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    user = new_pair(nkeys.PREFIX_BYTE_USER)
    no_limits = {
        **dict.fromkeys(("subs", "conn", "leaf", "imports", "exports", "data"), -1),
        "payload": -1,
        "wildcards": True,
    }
    by_operator = jwt(operator, operator, "operator", {"type": "operator"})
    by_account = jwt(
        account, operator, "account", {"type": "account", "limits": no_limits}
    )
    by_user = jwt(
        user,
        account,
        "user",
        {"type": "user", "subs": -1, "data": -1, "payload": -1},
    )
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{by_user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n"
        "------END USER NKEY SEED------\n"
    )
    more = (
        f"operator: {by_operator}\nresolver: MEMORY\n"
        f"resolver_preload {{ {account.public_key.decode()}: {by_account} }}"
    )
    with nats_server(more=more, jetstream=False) as server:
        with connected(server, f"?creds={creds}"):
            pass
        creds.write_text(creds.read_text().replace(by_user, by_user[:-4] + "AAAA"))
        assert "refuses the credentials" in refused(server, f"?creds={creds}")


def test_a_password_that_changes_is_seen_and_healed_by_its_return(
    tmp_path: Path,
) -> None:
    def login(password: str) -> str:
        return f'authorization {{ user: u, password: "{password}" }}'

    with nats_server(more=login(SECRET)) as server:
        config = server.folder / "server.conf"
        right = config.read_text()
        host = server.url.removeprefix("nats://")
        url = parse_nats_url(f"nats://u:{SECRET}@{host}")
        with closing(NatsConnection.open(url)) as connection:
            events: list[ConnectionEvent] = []
            connection.listen(events.append)
            server.kill()
            config.write_text(right.replace(SECRET, "another"))
            server.start()
            eventually(lambda: "refuses the credentials" in events[-1].reason)
            server.kill()
            config.write_text(right)
            server.start()
            eventually(lambda: events[-1].name == "Reconnected")
            assert SECRET not in str(events)
