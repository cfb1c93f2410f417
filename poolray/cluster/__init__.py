"""The shell that runs the machines on many hosts: head and node daemons, links, transfer, sign-on.

What: carries messages between processes on different machines over ZeroMQ, and starts and stops the
daemons that hold a Node or the Head.
Who calls it: `poolray.session` when it is given an address, and the command line.
May touch: sockets, clocks, processes and disk. It decides nothing; that is for `node` and `head`.
Invariants: a payload of the user's is never unpickled here; of the other shell nothing is imported
but what a node's shell needs wherever it runs (`local.node_shell` and what it stands on).
"""
