"""The examples of docs/extending.md run, in order, as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("extending")


def commands():
    """(language, code, expected output or None) of every block that runs."""
    for (language, code), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language in ("python", "bash"):
            yield language, code, following[1] if following[0] == "text" else None


@pytest.mark.parametrize(("language", "code", "expected"), list(commands()), ids=lambda value: None)
def test_every_example_on_the_page_runs(language, code, expected, folder):
    if language == "python":
        script = folder / code.split("\n")[0].removeprefix("# ")
        script.write_text(code)
        command = [sys.executable, "-P", str(script)]
    else:
        command = ["bash", "-ec", code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    if expected is not None:
        assert result.stdout == expected
