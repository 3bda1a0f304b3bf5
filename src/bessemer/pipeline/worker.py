"""One of the processes that make a stage together: `python -m bessemer.pipeline.worker JSON`, started by `launch`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bessemer.core.environment import set_environment
from bessemer.core.errors import BessemerError
from bessemer.pipeline.launch import MISTAKE


def main(request: dict[str, Any]) -> int:
    """Make the stage of a request; returns the exit code."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.api import prepare
    from bessemer.pipeline.launch import Ranks

    stage, mistake = request.pop("stage"), Path(request.pop("mistake"))
    ranks = Ranks.from_environment(os.environ)
    try:
        prepare(**request, progress=progress_for_terminal(), ranks=ranks).run(only=stage)
    except BessemerError as error:
        if not mistake.exists():
            mistake.write_text(str(error), encoding="utf-8")
        return MISTAKE
    return 0


if __name__ == "__main__":
    set_environment()
    sys.exit(main(json.loads(sys.argv[1])))
