from functools import partial

from actors.world import World


def test_what_is_planned_runs_as_if_each_were_asked_for_alone() -> None:
    """Also what is due at the same time, and what a planned turn asks for."""
    times = (5, 3, 9, 3, 7, 9, 0)

    def run(*, is_planned: bool) -> list[tuple[int, str]]:
        world = World(1)
        began_ns, seen = world.now_ns, list[tuple[int, str]]()

        def note(name: str) -> None:
            seen.append((world.now_ns - began_ns, name))
            if name.startswith("planned"):
                world.at(world.now_ns + 2, note, f"after {name}")

        world.at(began_ns + 3, note, "asked before")
        turns = [(began_ns + at, f"planned {n}") for n, at in enumerate(times)]
        if is_planned:
            world.plan((at_ns, note, (name,)) for at_ns, name in turns)
        else:
            for at_ns, name in turns:
                world.at(at_ns, note, name)
        world.at(began_ns + 3, note, "asked after")
        for until in (2, 3, 20):
            seen.append((until, f"{world.waiting_count} wait"))
            world.run_until(began_ns + until)
        seen.append((20, f"{world.waiting_count} wait"))
        return seen

    planned = run(is_planned=True)
    assert planned == run(is_planned=False)
    assert len([name for _, name in planned if name.startswith("planned")]) == 7
    assert planned[-1] == (20, "0 wait")


def test_of_several_plans_each_goes_on() -> None:
    world = World(1)
    seen: list[str] = []
    for name in "abc":
        world.plan(
            (world.now_ns + at, partial(seen.append, name), ()) for at in range(3)
        )
    world.run_until(world.now_ns + 10)
    assert seen == list("abcabcabc")
