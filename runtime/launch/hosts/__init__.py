"""Which machines: hostfiles, lists, selection."""
