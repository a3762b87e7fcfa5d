"""From a plan to processes, and their supervision to the end."""
