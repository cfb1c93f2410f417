"""What concerns actors: their life cycle, the order of their calls, their restarts and handles.

What: decides where in its life an actor is and which of its calls may run next.
Who calls it: the Node machine for the actors it hosts, the Head machine for the directory.
May touch: nothing. Time and new ids arrive as arguments, effects leave as values.
Invariants: the calls of one caller keep their order, across retries too, wherever the actor
promises order; a dead actor never runs a call again.
"""
