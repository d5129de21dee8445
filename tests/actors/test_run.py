import gzip
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from actors.future import Future
from actors.main import main
from actors.requests import SAMPLE, read_requests
from actors.run import WINDOW, BadRun, Delivery, check_changes, parse_change
from actors.store_url import open_store
from messages.payload import BYTES_MAX
from placement.contracts import Load, Loaded, SessionRecord
from placement.errors import OutcomeUnknown
from placement.identity import Identity
from placement.topology import SessionId
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "actors" / "data" / SAMPLE
KEYS = [
    "nodes",
    "requests",
    "answered",
    "failed",
    "identities",
    "activations",
    "double_activations",
    "seconds",
    "requests_per_s",
    "per_node",
]


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["run", *args], input=stdin)


COMMAND = [sys.executable, "-c", "from actors.main import main; main()", "run"]
NOBODY = 65_534


@pytest.fixture
def bare() -> Iterator[Path]:
    """A folder that another user may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="placement-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def read_only(folder: Path) -> Path:
    """Have nobody write in it, nor what is in it."""
    for each in folder.iterdir():
        each.chmod(0o444)
    folder.chmod(0o555)
    return folder


def as_nobody(*args: str) -> "subprocess.CompletedProcess[str]":
    """Run the command without the rights of root, to whom nothing is read-only."""
    become = f"os.setegid({NOBODY}); os.seteuid({NOBODY})"
    program = f"import os, sys; from actors.main import main; {become}; main()"
    if os.geteuid() != 0:
        program = "from actors.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "run", *args],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )


def requests_in(path: Path, identities: int, each: int, kind: str = "item") -> Path:
    lines = [
        json.dumps({"identity": f"{kind}/{number}", "payload": turn})
        for turn in range(each)
        for number in range(identities)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return requests_in(tmp_path / "small.jsonl", 20, 10)


def test_a_run_answers_all_and_sums_up_under_the_fixed_names(small: Path) -> None:
    result = run(str(small), "--json", "--store", "memory://")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert found["requests"] == found["answered"] == 200
    assert found["identities"] == found["activations"] == 20
    assert found["failed"] == found["double_activations"] == 0
    assert sorted(found["per_node"]) == ["node-1", "node-2", "node-3"]
    assert sum(each["requests"] for each in found["per_node"].values()) == 200
    assert result.stderr == ""


def test_the_sample_through_a_kill_a_join_and_a_leave_counts_exactly(
    tmp_path: Path,
) -> None:
    report = tmp_path / "r.jsonl"
    changes = ["--kill", "node-2@20000", "--join", "node-4@30000"]
    changes += ["--leave", "node-1@45000", "--ttl", "1.5"]
    result = run("--durable", *changes, "--report", str(report), "--json")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["failed"] == found["double_activations"] == 0
    assert found["answered"] == 64_469
    assert sorted(found["per_node"]) == ["node-1", "node-2", "node-3", "node-4"]
    compare = [sys.executable, "tests/compare_counts.py", str(TRACE), str(report)]
    assert subprocess.run(compare, cwd=ROOT, check=False).returncode == 0
    row = json.loads(report.read_text().splitlines()[0])
    assert list(row) == ["identity", "count", "owner", "fencing_token", "activations"]


def test_a_second_run_on_the_same_store_counts_nothing_twice(
    tmp_path: Path, small: Path
) -> None:
    rows = []
    for number in range(2):
        report = tmp_path / f"{number}.jsonl"
        result = run(
            str(small),
            "--durable",
            "--store",
            f"sqlite:///{tmp_path}/t.db",
            "--report",
            str(report),
            "--json",
        )
        assert result.exit_code == 0, result.output
        rows.append([json.loads(line) for line in report.read_text().splitlines()])

    assert [row["count"] for row in rows[0]] == [10] * 20
    assert [row["count"] for row in rows[1]] == [10] * 20
    for first, second in zip(*rows, strict=True):
        assert second["fencing_token"] > first["fencing_token"]


def test_a_line_that_comes_twice_counts_twice(tmp_path: Path) -> None:
    report = tmp_path / "r.jsonl"
    line = '{"identity": "item/a b", "payload": null}\n'

    result = run("-", "--report", str(report), "--nodes", "1", stdin=line * 2)

    assert result.exit_code == 0, result.output
    assert "answered" in result.stdout
    assert json.loads(report.read_text())["count"] == 2


def test_a_kind_of_ones_own_may_be_a_threading_actor(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "w.jsonl", 30, 3, kind="worker")
    kind = "worker=tests.actors.actors_under_test:Worker"

    result = run(str(requests), "--kind", kind, "--json", "--nodes", "2")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["activations"] == 30


def test_requests_that_fail_end_with_1_and_say_why(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "w.jsonl", 2, 1, kind="failing")
    kind = "failing=tests.actors.actors_under_test:FailingWorker"

    result = run(str(requests), "--kind", kind, "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 2
    assert "2 failed: ActivationFailed, first line" in result.stderr


def test_a_full_disk_fails_what_it_touches_and_nothing_else(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "many.jsonl", 3_000, 1)

    result = run(
        str(requests),
        "--durable",
        "--json",
        "--ask-timeout",
        "2",
        "--store",
        f"sqlite:///{tmp_path}/t.db?max_pages=60",
    )

    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["answered"] > 0
    assert found["failed"] > 0
    assert found["answered"] + found["failed"] == 3_000
    assert "full" in result.stderr


def test_a_delivery_that_is_stopped_sends_no_more_though_its_window_is_full(
    tmp_path: Path,
) -> None:
    class Silent:
        """A cluster that never answers, and is told so."""

        nodes = ("node-1",)

        def __init__(self) -> None:
            self.futures: list[Future] = []

        def ref(self, identity: str) -> Any:
            return self

        def ask(self, payload: Any, **_: Any) -> Future:
            self.futures.append(Future())
            return self.futures[-1]

    requests = read_requests(str(requests_in(tmp_path / "m.jsonl", 1_000, 1)))
    silent: Any = Silent()
    delivery = Delivery(silent, requests, repeatable=lambda _: True)
    running = threading.Thread(target=delivery.run, args=([],))
    running.start()
    eventually(lambda: len(silent.futures) == WINDOW)

    delivery.stop()
    for future in silent.futures:
        future.set_error(OutcomeUnknown("no answer in time"))
    running.join(10)

    assert not running.is_alive()
    assert delivery.outcome.requests == delivery.outcome.failed == WINDOW
    assert len(silent.futures) == WINDOW


def lock_when_used(path: Path, seconds: float, locked: threading.Event) -> None:
    """Keep everybody else from writing for a while, once some states are stored."""
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        count = "SELECT count(*) FROM identities WHERE snapshot IS NOT NULL"
        eventually(lambda: path.exists() and db.execute(count).fetchone()[0] > 20)
        db.execute("BEGIN EXCLUSIVE")
        locked.set()
        threading.Event().wait(seconds)
        db.execute("ROLLBACK")


def stored_counts(url: str, identities: Iterable[str]) -> dict[str, int]:
    """How many requests each tally has stored."""
    counts = {}
    with closing(open_store(url)) as store:
        for name in identities:
            (loaded,) = store.load([Load(Identity.parse(name))])
            assert isinstance(loaded, Loaded)
            stored = loaded.entry.record.snapshot
            state = {} if stored is None else msgspec.msgpack.decode(stored[7:])
            counts[name] = sum(
                last - first + 1 for ranges in state.values() for first, last in ranges
            )
    return counts


def test_a_store_locked_in_mid_run_fails_what_it_touches_and_nothing_else(
    tmp_path: Path,
) -> None:
    requests = requests_in(tmp_path / "many.jsonl", 300, 60)
    url = f"sqlite:///{tmp_path}/t.db?busy_timeout_ms=200"
    report = tmp_path / "r.jsonl"
    open_store(url).close()
    locked = threading.Event()
    locking = threading.Thread(
        target=lock_when_used, args=(tmp_path / "t.db", 3.0, locked)
    )
    locking.start()
    options = ["--durable", "--json", "--ask-timeout", "2", "--store", url]

    result = run(str(requests), *options, "--report", str(report))
    locking.join()

    assert locked.is_set(), result.output
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["answered"] > 0, result.output
    assert found["failed"] > 0, result.output
    assert found["answered"] + found["failed"] == 18_000, result.output
    assert found["double_activations"] == 0, result.output
    assert "is locked" in result.stderr, result.output
    assert "failed: SaveFailed, first line " in result.stderr, result.output
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    stored = stored_counts(url, [row["identity"] for row in rows])
    assert all(stored[row["identity"]] >= row["count"] for row in rows)
    assert sum(stored.values()) >= found["answered"]


@pytest.mark.parametrize(
    ("folder_mode", "said"),
    [(0o777, "is read-only"), (0o555, "cannot be written to")],
)
def test_a_store_that_is_read_only_is_refused_and_left_alone(
    bare: Path, folder_mode: int, said: str
) -> None:
    small = requests_in(bare / "small.jsonl", 2, 2)
    path = bare / "t.db"
    open_store(f"sqlite:///{path}").close()
    before = path.read_bytes()
    there = sorted(read_only(bare).iterdir())
    bare.chmod(folder_mode)

    ended = as_nobody(str(small), "--store", f"sqlite:///{path}", "--json")

    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"placement: {path}")
    assert said in ended.stderr
    assert path.read_bytes() == before
    assert sorted(bare.iterdir()) == there


def test_the_witness_writes_what_it_saw(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "w.jsonl"

    assert run(str(small), "--witness", str(path), "--nodes", "1").exit_code == 0

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    what = [row["what"] for row in rows]
    assert what.count("started") == what.count("stopped") == 20
    assert what.count("handled") == 200
    assert all(row["at_ns"] > 0 for row in rows)


def other_schema(path: Path) -> None:
    open_store(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def foreign_file(path: Path) -> None:
    path.write_text("this is a letter, not a database\n" * 50)


def foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE letters (text)")
    db.close()


@pytest.mark.parametrize("make", [other_schema, foreign_file, foreign_database])
def test_a_store_file_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, small: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "other.db"
    make(path)
    before = path.read_bytes()

    result = run(str(small), "--store", f"sqlite:///{path}")

    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{nonsense", "line 2: not JSON"),
        (b"[1]", "line 2: not an object"),
        (b'{"payload": 1}', "line 2: field identity is missing"),
        (b'{"identity": "nokind"}', "line 2: field identity: identity 'nokind'"),
        (b'{"identity": 7}', "line 2: field identity: an identity is a text"),
        (b'{"identity": "a/"}', "line 2: field identity: the name after kind/"),
        (b'{"identity": "a/\\u0001"}', "line 2: field identity: name"),
        (b'{"identity": "a/b", "payload": 36893488147419103232}', "field payload"),
        (
            b'{"identity": "a/b", "payload": "' + b"x" * BYTES_MAX + b'"}',
            f"bytes, at most {BYTES_MAX}",
        ),
        (b"\xff\xfe", "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(
    tmp_path: Path, line: bytes, said: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"identity": "a/b"}\n' + line + b"\n")
    store = tmp_path / "never.db"

    result = run(str(path), "--store", f"sqlite:///{store}")

    assert result.exit_code == 2
    assert said in result.stderr
    assert not store.exists()


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"identity": "a/b"}\n' * 1_000)
    empty, torn, corrupt = (tmp_path / n for n in ("e.jsonl", "t.gz", "c.gz"))
    empty.write_bytes(b"\n\n")
    torn.write_bytes(whole[:-10])
    corrupt.write_bytes(whole[:20] + bytes(30) + whole[50:])

    for path, said in (
        (tmp_path / "missing.jsonl", "No such file"),
        (tmp_path, "Is a directory"),
        (empty, "there is no request in it"),
        (torn, "not a whole .gz file"),
        (corrupt, "not a whole .gz file"),
    ):
        result = run(str(path))
        assert result.exit_code == 2, path
        assert said in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kill", "node-9@5"], "there is no node of that name then"),
        (["--leave", "node-9@5"], "there is no node of that name then"),
        (["--kill", "node-1@201"], "the input has requests 1 to 200"),
        (["--kill", "node-1@0"], "the input has requests 1 to 200"),
        (["--kill", "node-1"], "is not NODE@N"),
        (["--kill", "@5"], "is not NODE@N"),
        (["--kill", "node-1@x"], "is not NODE@N"),
        (["--join", "node-1@5"], "there is a node of that name then"),
        (["--kill", "node-1@5", "--leave", "node-1@6"], "no node of that name"),
        (["--nodes", "1", "--kill", "node-1@5"], "no node would be left"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--nodes", "x"], "not a valid integer"),
        (["--store", "what://"], "unknown scheme 'what'"),
        (["--store", "nothing"], "is not a URL"),
        (["--kind", "item"], "is not KIND=module:Class"),
        (["--kind", "item=nothing"], "is not of the form module:Class"),
        (["--kind", "item=no.such.module:X"], "cannot be imported"),
        (["--kind", "item=json:Nothing"], "has no class 'Nothing'"),
        (["--kind", "item=json:JSONDecoder"], "neither a Grain nor"),
        (["--kind", "item=json:dumps"], "is a function, not a class"),
        (["--kind", "i m=json:JSONDecoder"], "kind 'i m' must be"),
        (
            ["--kind", "a=actors.tally:Tally", "--kind", "a=actors.tally:Tally"],
            "is given twice",
        ),
        (["--kind", "item=tests.actors.test_run:SLOW"], "above the safety margin"),
        (["--kind", "item=..nowhere:X"], "imported: TypeError: "),
        (["--kind", "itme=actors.tally:Tally"], "--kind itme=...: no request in"),
        (["--report", "/no/such/folder/r.jsonl"], "there is no such folder"),
        (["--report", "."], ".: it is a folder, not a file"),
        (["--witness", "."], ".: it is a folder, not a file"),
        (["--witness", "n" * 300], "File name too long"),
        (["--ttl", "0"], "ttl must be at least"),
        (["--renew-every", "9"], "renew_every of 9.0"),
        (["--margin", "9"], "margin must be"),
        (["--partitions", "0"], "partitions must be"),
        (["--ask-timeout", "-1"], "ask_timeout must be"),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_that_make_no_sense_end_with_2(
    small: Path, args: list[str], said: str
) -> None:
    result = run(str(small), *args)

    assert result.exit_code == 2, result.output
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ValueError('not today')", "cannot be imported: ValueError: not today"),
        ("def def", "cannot be imported: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("import no_such_module", "cannot be imported: No module named"),
    ],
)
def test_a_kind_whose_module_cannot_be_imported_ends_with_2(
    tmp_path: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    said: str,
) -> None:
    (tmp_path / "boom.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    result = run(str(small), "--kind", "item=boom:X")

    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("placement: module 'boom' ")
    assert said in result.stderr


@pytest.mark.parametrize("option", ["--report", "--witness"])
def test_a_file_where_nothing_may_be_written_is_refused_before_all(
    bare: Path, option: str
) -> None:
    small = requests_in(bare / "small.jsonl", 2, 2)
    (bare / "old.jsonl").write_text("kept")
    before = sorted(read_only(bare).iterdir())

    for name, said in (
        ("new.jsonl", "nothing may be made in its folder"),
        ("old.jsonl", "it may not be written"),
    ):
        ended = as_nobody(str(small), option, str(bare / name))
        assert ended.returncode == 2, ended.stderr
        assert said in ended.stderr
    assert sorted(bare.iterdir()) == before
    assert (bare / "old.jsonl").read_text() == "kept"


@pytest.mark.parametrize("options", [["--json"], []])
def test_where_standard_output_is_full_it_says_so_and_ends_with_1(
    small: Path, options: list[str]
) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*COMMAND, str(small), "--nodes", "1", "--store", "memory://", *options],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert ended.stderr.decode() == (
        "placement: standard output: No space left on device\n"
    )
    assert ended.returncode == 1


def test_seconds_run_from_the_first_request_read(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_slowly(path: str | None) -> Any:
        threading.Event().wait(0.5)
        return read_requests(path)

    monkeypatch.setattr("actors.main.read_requests", read_slowly)
    result = run(str(small), "--json", "--store", "memory://")

    found = json.loads(result.stdout)
    assert found["seconds"] >= 0.5
    assert found["requests_per_s"] <= 400


def slow() -> Any:
    from actors import Grain, Kind  # noqa: PLC0415

    return Kind(Grain, handler_max=60.0)


SLOW = slow()


def test_a_store_in_which_another_process_lives_is_refused(
    tmp_path: Path, small: Path
) -> None:
    url = f"sqlite:///{tmp_path}/t.db"
    renewing = (
        "import threading\n"
        "from actors.store_url import open_store\n"
        "from placement.contracts import SessionRecord\n"
        f"store = open_store({url!r})\n"
        "store.open_session(SessionRecord(session='other.1#1', ttl_ms=60000))\n"
        "print('open', flush=True)\n"
        "count = 0\n"
        "while True:\n"
        "    count += 1\n"
        "    store.renew_session('other.1#1', count)\n"
        "    threading.Event().wait(0.02)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", renewing], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        result = run(str(small), "--store", url)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()

    assert result.exit_code == 2
    assert "of another process is alive in it" in result.stderr


def test_a_run_waits_for_what_a_crash_left_and_goes_on(
    tmp_path: Path, small: Path
) -> None:
    url = f"sqlite:///{tmp_path}/t.db"
    store = open_store(url)
    store.open_session(SessionRecord(session=SessionId("x.1#1"), ttl_ms=100))
    store.close()

    assert run(str(small), "--store", url).exit_code == 0


def test_an_interrupted_run_stops_cleanly_and_says_so(tmp_path: Path) -> None:
    requests = requests_in(tmp_path / "many.jsonl", 200, 2_000)
    options = [str(requests), "--json", "--witness", str(tmp_path / "w.jsonl")]
    started = subprocess.Popen(
        [sys.executable, "-c", "from actors.main import main; main()", "run", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    seen = tmp_path / "w.jsonl"
    while not seen.exists() or not seen.stat().st_size:
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    out, _ = started.communicate(timeout=60)

    assert started.returncode == 130
    found = json.loads(out)
    assert 0 < found["answered"] == found["requests"] < 400_000
    assert found["failed"] == 0


def test_a_terminal_sees_progress_and_a_pipe_does_not(small: Path) -> None:
    command = [sys.executable, "-c", "from actors.main import main; main()", "run"]
    command += [str(small), "--nodes", "1"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert piped.stderr == b""
    assert b"node-1" in piped.stdout

    leader, follower = pty.openpty()
    shown = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=follower,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(follower)
    seen = os.read(leader, 65_536)
    os.close(leader)
    assert b"requests" in seen
    assert b"node-1" in shown.stdout


def test_changes_are_ordered_by_when_they_happen() -> None:
    changes = [parse_change("leave", "d@9"), parse_change("join", "d@3")]

    ordered = check_changes(changes, ["a"], 10)

    assert [change.verb for change in ordered] == ["join", "leave"]
    with pytest.raises(BadRun, match="no node of that name"):
        check_changes([parse_change("kill", "d@2"), *changes], ["a"], 10)


def test_the_id_of_a_request_is_that_of_its_input_and_line(tmp_path: Path) -> None:
    path = requests_in(tmp_path / "a.jsonl", 2, 1)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))

    plain, zipped = read_requests(str(path)), read_requests(str(packed))

    ids = [plain.id_of(request) for request in plain]
    assert ids == [zipped.id_of(request) for request in zipped]
    assert len(set(ids)) == 2
    path.write_text(path.read_text() + " \n")
    assert read_requests(str(path)).digest != plain.digest
