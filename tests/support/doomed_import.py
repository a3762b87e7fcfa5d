"""A worker whose module ends the process that imports it, if that is the rank that the environment names."""

from __future__ import annotations

from support.doomed import Doomed as Doomed
from support.doomed import doom_on_import

doom_on_import()
