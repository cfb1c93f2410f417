"""Calls of actors that go straight from the caller's process to the actor's."""
