"""What ``zspmd-run`` starts by name."""
