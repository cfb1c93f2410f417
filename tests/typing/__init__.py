"""What type checkers must accept and refuse; read by them, never run.

A line that must be refused carries `# type: ignore[code]`, with mypy's code. `test_typing.py` takes
these marks away and compares where errors are with where marks were.
"""
