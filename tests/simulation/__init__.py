"""The simulator: the real machines under a virtual clock, with workers, links and faults of ours.

    driver ──▶ ┌ SimNode ┐ ◀──reports── SimWorker          one seed decides everything:
    driver ──▶ │  Node   │ ──packets──▶ SimWorker          programs, delays, losses, deaths
               └────┬────┘
                 PeerLink ~~~ lossy network ~~~ PeerLink ── SimHead, other SimNodes

What: plays random programs on one node or several, and checks from outside what comes of them.
Who calls: `python -m tests.simulation`, `test_simulation.py`.
May touch: nothing but the machines; time is a number and chance a seed.
Invariants: the same seed and options give the same run, event by event.
"""
