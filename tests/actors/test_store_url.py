"""Which URLs name a store, and what a wrong one is told."""

from contextlib import closing
from pathlib import Path

import pytest

from actors.store_memory import MemoryStore
from actors.store_sqlite import SqliteStore
from actors.store_url import BadStore, check_store, open_store
from placement.contracts import Load, Loaded
from placement.identity import Identity


def test_memory_is_a_store_of_its_own_each_time() -> None:
    check_store("memory://")

    store, other = open_store("memory://"), open_store("memory://")
    store.write_members([], 0)

    assert isinstance(store, MemoryStore)
    assert store.url == "memory://"
    assert other.read_sessions().topology.epoch == 0


def test_a_relative_path_begins_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with closing(open_store("sqlite:///relative.db")) as store:
        assert isinstance(store, SqliteStore)
        assert store.url == "sqlite:///relative.db"

    assert [file.name for file in tmp_path.iterdir()] == ["relative.db"]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("plain.db", "plain.db"),
        ("with%20space.db", "with space.db"),
        ("with space.db", "with space.db"),
        ("a%3Fb%23c%25.db", "a?b#c%.db"),
        ("a#b.db", "a#b.db"),
        ("n%C5%93ud.db", "nœud.db"),
        ("nœud.db", "nœud.db"),
        ("a+b&c=d.db", "a+b&c=d.db"),
    ],
)
def test_a_path_may_be_percent_encoded(written: str, name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{written}?synchronous=NORMAL"

    for _ in range(2):
        check_store(url)
        open_store(url).close()

    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_checking_creates_nothing(tmp_path: Path) -> None:
    check_store(f"sqlite:///{tmp_path}/store.db")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "is not a URL"),
        ("store.db", "is not a URL"),
        ("sqlite:store.db", "is not a URL"),
        ("redis://host", "known are memory://, sqlite:///, postgresql://"),
        ("nats://", "names its servers as host:port"),
        ("nats://host?journal=WAL", "unknown option 'journal'; known are "),
        ("nats://host?cluster=a.b", "cluster must be 1 to 64 of A-Z a-z 0-9 _ -"),
        ("nats://host?replicas=0", "replicas must be a number from 1 to 5"),
        ("nats://host?replicas=6", "replicas must be a number from 1 to 5"),
        ("nats://host?timeout_ms=soon", "timeout_ms must be a number from 1 to"),
        ("://x", "unknown scheme ''"),
        ("memory://x", "nothing may follow"),
        ("memory://?synchronous=FULL", "nothing may follow"),
        ("sqlite://", "write sqlite:///relative.db or sqlite:////absolute.db"),
        ("sqlite://store.db", "write sqlite:///relative.db"),
        ("sqlite://host/store.db", "write sqlite:///relative.db"),
        ("sqlite:///", "names no file"),
        ("sqlite:////", "names no file"),
        ("sqlite:///folder/", "names no file"),
        ("sqlite:///?synchronous=FULL", "names no file"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///a%00b", "zero byte"),
        ("sqlite:///a%ff", "not valid UTF-8"),
        ("sqlite:///a\ud800", "not valid UTF-8"),
        ("sqlite:///a.db?", "an option is not name=value"),
        ("sqlite:///a.db?synchronous", "option synchronous has no value"),
        ("sqlite:///a.db?synchronous=", "option synchronous has no value"),
        ("sqlite:///a.db?synchronous=MOSTLY", "must be one of OFF, NORMAL, FULL"),
        ("sqlite:///a.db?synchronous=OFF&synchronous=FULL", "is given twice"),
        ("sqlite:///a.db?journal=WAL", "unknown option 'journal'; known are sync"),
        ("sqlite:///a.db?busy_timeout_ms=soon", "busy_timeout_ms must be a number"),
        ("sqlite:///a.db?busy_timeout_ms=-1", "busy_timeout_ms must be a number"),
        ("sqlite:///a.db?busy_timeout_ms=600001", "from 0 to 600000"),
        ("sqlite:///a.db?max_pages=9999999999", "max_pages must be a number"),
        ("sqlite:///a.db?max_pages=" + "9" * 5_000, "max_pages must be a number"),
        ("sqlite:///a.db?max_pages=²", "max_pages must be a number"),
    ],
)
def test_a_wrong_url_is_told_what_is_wrong(
    url: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    for use in (check_store, open_store):
        with pytest.raises(BadStore) as caught:
            use(url)
        assert why in str(caught.value)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{folder}/store.db"])
def test_r4_5_entries_bear_the_time_at_which_they_were_read(
    url: str, tmp_path: Path
) -> None:
    times = iter((10, 20))
    opened = open_store(url.format(folder=tmp_path), now_ms=lambda: next(times))

    with closing(opened) as store:
        observed = []
        for _ in range(2):
            (loaded,) = store.load([Load(Identity("cart", "42"))])
            assert isinstance(loaded, Loaded)
            observed.append(loaded.entry.observed_at_ms)

    assert observed == [10, 20]
