"""What is measured beside zspmd: programs of ``scripts/rivals``, each run in processes of its own and imported by nothing of zspmd.

They are files beside the package, not modules of it: they do what no module of zspmd may (``docs/decisions/019-benchmarks.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .machine import installed_version

DIRECTORY = Path(__file__).parents[3] / "scripts" / "rivals"


@dataclass(frozen=True)
class Rival:
    """A program that does what zspmd does by other means.

    Attributes:
        name: as tables have it.
        program: its file's name without the ending.
        needs: the distribution that it uses; None for none.
        variant: what its program is told to do, where it can do several things.
    """

    name: str
    program: str
    needs: str | None = None
    variant: str = ""

    def why_not(self) -> str | None:
        """Return the reason why it cannot be measured here; None where it can."""
        if not (DIRECTORY / f"{self.program}.py").is_file():
            return f"{self.name}: {DIRECTORY / self.program}.py is not there; install zspmd again, or run from a checkout"
        if self.needs is not None and installed_version(self.needs) is None:
            return f"{self.name}: {self.needs} is not installed; pip install {self.needs}"
        return None

    def argv(self, *arguments: object) -> Sequence[str]:
        """Return what this interpreter runs."""
        return (str(DIRECTORY / f"{self.program}.py"), *(str(argument) for argument in arguments))
