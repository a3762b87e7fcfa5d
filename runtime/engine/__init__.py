"""Requests, their schedule and their text; the first user of the worker group."""
