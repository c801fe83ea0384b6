"""Compiles C++ operators for MindSpore's `ops.Custom(func_type="aot")`, from setup.py and by hand.

setup.py loads this file by its path, because importing the package `models.kernels` needs MindSpore:

    build = runpy.run_path("models/kernels/build.py")
    setup(ext_modules=[build["operators"]("models.kernels._native", "models/kernels/csrc")],
          cmdclass={"build_ext": build["BuildOperators"]})

`python -P models/kernels/build.py` compiles the kernels in place. The compiler is `$CXX` or g++. Code is made for this
machine's CPU (`-march=native`); `BUSWAY_MARCH` names another, as in ``BUSWAY_MARCH=x86-64-v3``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

# Rounding is kept (no -ffast-math): the fp64 reference needs its digits, and a NaN must stay one for the loop to see
# it. No code here reads errno or floating-point traps, and without them square roots become vectors.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wall")


def compile_library(
    sources: Sequence[str], output: str, include_dirs: Sequence[str] = (), link: Sequence[str] = ()
) -> None:
    """Compile C++ `sources` into the shared library `output`, written by rename so that no process maps half a file.

    Raises OSError when there is no compiler, and subprocess.CalledProcessError when it fails.
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{output}.{os.getpid()}"
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *FLAGS,
        f"-march={os.environ.get('BUSWAY_MARCH', 'native')}",
        *(f"-I{folder}" for folder in include_dirs),
        *sources,
        *link,
        "-o",
        partial,
    ]
    try:
        subprocess.run(command, check=True)
        os.replace(partial, output)
    finally:
        Path(partial).unlink(missing_ok=True)


def operators(name: str, folder: str, include_dirs: Sequence[str] = (), link: Sequence[str] = ()) -> Extension:
    """The library `name` (a dotted module name) of all C++ files in `folder`, for setup()."""
    files = Path(folder)
    return Extension(
        name,
        sources=sorted(map(str, files.glob("*.cc"))),
        depends=sorted(map(str, files.glob("*.h"))),
        include_dirs=list(include_dirs),
        extra_link_args=list(link),
        language="c++",
    )


class BuildOperators(build_ext):
    """setuptools' build_ext for such libraries. Without a compiler the install goes on: every operator has a slower
    form in Python. One line of the build says what was compiled, and the run says what it uses.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """`models/kernels/_native.so`: these are no Python modules, so the name carries no Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = self.get_ext_fullpath(ext.name)
        try:
            compile_library(ext.sources, library, ext.include_dirs, ext.extra_link_args)
        except (OSError, subprocess.CalledProcessError) as error:
            ext.optional = True  # copy_extensions_to_source then skips the missing file
            Path(library).unlink(missing_ok=True)  # of an earlier build, perhaps of other sources
            print(f"{ext.name}: {error}", file=sys.stderr)

    def run(self) -> None:
        super().run()
        failed = [ext.name for ext in self.extensions if ext.optional]
        compiled = [ext.name for ext in self.extensions if not ext.optional]
        slower = f"; without {' and '.join(failed)} runs are slower" if failed else ""
        print(f"busway: compiled {' and '.join(compiled) or 'nothing'}{slower}")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    compile_library(sorted(map(str, (here / "csrc").glob("*.cc"))), str(here / "_native.so"))
