"""What one run of the benchmarks is told."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENPI_VARIABLE = "OPENPI_SOURCE"
OPENPI_HINT = (
    f"openpi's own server is left out; to compare with it: git clone https://github.com/Physical-Intelligence/openpi, "
    f"then set {OPENPI_VARIABLE}=openpi"
)
CACHE = Path(tempfile.gettempdir()) / "policy-benchmarks"


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        bundle: The policy whose chunks are timed.
        openpi: A checkout of openpi; None leaves that server out.
        quick: Few rounds: to see that everything runs, not to believe the numbers.
        cache: Where bundles are kept that take minutes to write.
    """

    bundle: Path
    openpi: Path | None
    quick: bool
    cache: Path = CACHE

    def rounds(self, thorough: int) -> int:
        """Return how many rounds stand for `thorough` ones."""
        return max(1, thorough // 10) if self.quick else thorough


def find_openpi() -> Path | None:
    """Return the checkout that OPENPI_SOURCE names; raises FileNotFoundError if it is none."""
    named = os.environ.get(OPENPI_VARIABLE)
    if not named:
        return None
    path = Path(named).resolve()
    if not (path / "src/openpi/serving/websocket_policy_server.py").exists():
        raise FileNotFoundError(f"{OPENPI_VARIABLE}={named} has no src/openpi/serving/websocket_policy_server.py")
    return path
