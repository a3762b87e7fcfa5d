"""Collectives over one mesh axis, by backend."""
