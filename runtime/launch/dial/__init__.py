"""Nodes that call in by themselves: one command a node, or another launcher's processes."""
