import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """\
from dataclasses import dataclass
from decimal import Decimal
from actors import Cluster, Grain, Rejected, handler

@dataclass
class Balance:
    amount: Decimal = Decimal(0)

class Insufficient(Rejected):
    have: Decimal

class Account(Grain[Balance]):
    @handler
    async def deposit(self, amount: Decimal) -> Decimal:
        self.state.amount += amount
        await self.context.proxy(Account, "2").deposit(amount)
        raise Insufficient(have=amount)

    @handler
    def count(self) -> int:
        return 1

def use(cluster: Cluster) -> Decimal:
    account = cluster.proxy(Account, "42")
    cluster.tell(account.deposit(Decimal(1)))
    number: int = cluster.ask(account.count())
    return cluster.ask(account.deposit(Decimal(number)), timeout=8.0, request_id="a")

async def later(cluster: Cluster) -> Decimal:
    return await cluster.proxy(Account, "42").deposit(Decimal(1))

def break_it() -> Decimal:
    with Cluster.simulated(seed=7, nodes=3, kinds={"account": Account}) as cluster:
        cluster.crash("node-1")
        cluster.cut({"node-1"}, {"node-2"})
        cluster.store.fail(times=1)
        cluster.pause("node-2", seconds=20)
        cluster.run_until(lambda: cluster.now() > 10)
        cluster.heal()
        cluster.check()
        return cluster.ask(cluster.proxy(Account, "42").deposit(Decimal(1)))
"""

WRONG = """
def wrong(cluster: Cluster) -> None:
    account = cluster.proxy(Account, "42")
    cluster.ask(account.deposit("much"))
    cluster.ask(account.nothing())
    text: str = cluster.ask(account.deposit(Decimal(1)))
    Insufficient(much=1)
    Cluster.simulated(kinds={}).explode()
"""


def mypy(tmp_path: Path, source: str) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", ""]
    command += ["--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    done = subprocess.run(
        [*command, str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def test_a_right_program_is_checked_without_a_complaint(tmp_path: Path) -> None:
    assert mypy(tmp_path, PROGRAM) == []


def test_each_wrong_line_is_reported(tmp_path: Path) -> None:
    errors = mypy(tmp_path, PROGRAM + WRONG)

    first = len(PROGRAM.splitlines()) + 4
    lines = sorted({int(line.split(":")[1]) for line in errors})
    assert lines == [first, first + 1, first + 2, first + 3, first + 4]
    assert '"deposit" of "Account" has incompatible type "str"' in errors[0]
    assert 'has no attribute "nothing"' in errors[1]
