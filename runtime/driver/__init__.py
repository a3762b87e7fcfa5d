"""The worker group: publishing steps and collecting what ranks answer."""
