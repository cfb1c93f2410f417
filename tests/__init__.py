"""The proofs: what each folder holds and may do is said in its own docstring."""
