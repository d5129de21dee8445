"""How often Python's garbage collector looks, in a process of many activations."""

import gc


def calm_collector() -> None:
    """Have the garbage collector look seldom: little that a node keeps is garbage.

    It would go through all activations again and again: a third of the time of
    claims, and pauses of a tenth of a second at some 50,000 identities. What it finds
    are cycles of user code; they are found later. For a program of its own, once it
    has been loaded: a library leaves the collector as it finds it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
