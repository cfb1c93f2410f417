"""Faces beyond the core calls, each a module of its own that users import by name.

What: conveniences written on the public API, under the module paths that Ray Core users know.
Who calls it: user code.
May touch: only what `poolray.api` offers; a util has no private way into the machines.
Invariants: nothing here is imported by `import poolray` itself, so that the start stays short.
"""
