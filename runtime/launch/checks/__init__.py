"""What ``zspmd-run doctor`` looks at, on this machine and on others."""
