"""Many runs in one MPI world: `mpiexec -n RANKS python -P world.py FILE`, a JSON list of command lines of busway."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer import cli

for words in json.loads(Path(sys.argv[1]).read_text()):
    code = cli.main(words)
    if code:
        sys.exit(code)
