"""docs/extending.md, followed from top to bottom in one empty folder, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_works_from_top_to_bottom_in_an_empty_folder(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive"}
    printed = None
    for language, code in BLOCKS:
        if language == "text":
            assert printed == code
            continue
        if language != "bash":
            name = code.split("\n")[0].removeprefix("# ")
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(code)
        if language != "yaml":
            command = ["bash", "-ec", code] if language == "bash" else ["python", name]
            result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert result.returncode == 0, f"{code}\n{result.stdout}{result.stderr}"
            printed = result.stdout
    rows = (tmp_path / "runs/my-1/metrics.jsonl").read_text()
    assert '"step": 3, "loss"' in rows and "path: sums" in (tmp_path / "runs/my-1/recipe.yaml").read_text()
