"""Agents on other nodes: how they are started, what is proved before a rank is, and how long they may be silent."""
