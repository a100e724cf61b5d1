"""Where a run happens, and what it writes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fisherprune.runs.kinds import FOLDER, must
from fisherprune.runs.loggers import LOGGERS
from fisherprune.runs.option import Effect, option


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Where a run happens, and what it writes."""

    device: str = option(
        "auto",
        "auto (cuda where there is one), cpu, cuda or cuda:INDEX",
        must(
            re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?").fullmatch,
            "auto, cpu, cuda or cuda:INDEX",
        ),
        must(lambda name: len(name.partition(":")[2]) <= 3, "cuda:999 at most"),
        effect=Effect.PLACE,
    )
    output_dir: str = option(
        "runs",
        "the run makes a folder of its own in it",
        FOLDER,
        effect=Effect.PLACE,
        metavar="DIR",
    )
    log: tuple[str, ...] = option(
        (),
        f"show the metrics there too: {', '.join(LOGGERS)} (default: in none)",
        must(lambda names: {*names} <= LOGGERS.keys(), f"some of {', '.join(LOGGERS)}"),
        effect=Effect.PLACE,
        metavar="NAME",
    )
    tensorboard: bool = option(
        False, "the same as --log tensorboard", effect=Effect.PLACE
    )

    @property
    def loggers(self) -> tuple[str, ...]:
        """Where the metrics are shown, each place once."""
        chosen = (*self.log, *["tensorboard"] * self.tensorboard)
        return tuple(dict.fromkeys(chosen))
