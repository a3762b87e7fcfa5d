"""The command line of ``zspmd-run``: options, plans, output, reports."""
