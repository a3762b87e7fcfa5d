"""Programs of the sides that zspmd-run bench measures, each run in processes of its own."""
