"""Modules whose paths programs know from the reference's `ray.experimental`.

What: faces that users import by name.
Who calls it: user code.
May touch: what faces may; see each module.
Invariants: nothing here is imported by `import poolray` itself.
"""
