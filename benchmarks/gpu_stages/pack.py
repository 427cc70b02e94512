"""A build to carry: the extensions for Python 3.12, made on a machine that has a compiler and time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_stages.running import ROOT

FOLDER = ROOT / "build/gpu-pack"
PYTHON = "3.12"  # the version in GPU images at present
REQUIREMENTS = ("setuptools>=77", "pybind11>=2.13")
MOST_BYTES = 40_000_000


class PackError(Exception):
    """A pack that cannot be made, or cannot be used here."""


def sources_digest() -> str:
    """Return a hash of everything that the build depends on."""
    digest = hashlib.sha256()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in sorted([ROOT / "setup.py", *sources]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def make(folder: Path) -> int:
    """Make a pack in ``folder``, in place of the one there; print its size, or what is missing."""
    start = time.monotonic()
    try:
        check_place(folder)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            description = build(scratch)
            replace(folder, scratch / "lib/gmp_kernels", description)
    except (PackError, OSError) as error:
        print(f"gpu_check: no pack was made: {error}")
        return 1
    files = sorted(folder.rglob("*.so"))
    for path in files:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    total = sum(path.stat().st_size for path in files)
    print(f"{folder}: {total / 1e6:.1f} MB in {time.monotonic() - start:.0f} s, {description['compiler']}")
    return 0


def build(scratch: Path) -> dict[str, Any]:
    """Compile into ``scratch/lib`` and describe the result.

    Raises
    ------
    PackError
        Something is missing here, or the compiler failed.
    """
    if shutil.which("nvcc") is None:
        raise PackError("nvcc is not on the PATH; install the CUDA toolkit")
    python = with_requirements(python_to_build_for(), scratch)
    command = [str(python), "setup.py", "-q", "build_ext", "--force", "--parallel", "2"]
    command += ["--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "objects")]
    environment = {**os.environ, "GMP_KERNELS_BUILD_CUDA": "1", "GMP_KERNELS_BUILD_SIMT": "0"}
    environment.pop("GMP_KERNELS_SANITIZE", None)
    print("compiling, a few minutes", flush=True)
    run(command, "the build failed", env=environment)
    built = list((scratch / "lib/gmp_kernels").glob("*.so"))
    if len(built) != 2:
        raise PackError(f"expected two extensions, the build made {[path.name for path in built]}")
    if shutil.which("strip"):
        run(["strip", "--strip-unneeded", *map(str, built)], "strip failed")
    if (size := sum(path.stat().st_size for path in built)) > MOST_BYTES:
        raise PackError(
            f"{size / 1e6:.1f} MB are more than the {MOST_BYTES / 1e6:.0f} MB that are to be carried; compile for "
            "fewer architectures (GMP_KERNELS_CUDA_ARCHS)"
        )
    version = run(["nvcc", "--version"], "nvcc --version failed").strip().splitlines()
    release = next((line for line in version if "release" in line), "nvcc")
    return {"suffix": suffix_of(built[0]), "sources": sources_digest(), "compiler": release}


def suffix_of(path: Path) -> str:
    """Return the part of an extension's name after its first dot, which names its Python and machine."""
    return path.name.partition(".")[2]


def python_to_build_for() -> Path:
    """Return a Python 3.12: the one that runs this, the one on the PATH, or one of pyenv's.

    Raises
    ------
    PackError
        There is none.
    """
    for python in candidates():
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", version], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == PYTHON:
            return python
    raise PackError(f"expected a Python {PYTHON}, as python{PYTHON} on the PATH or among pyenv's; found none")


def candidates() -> Iterator[Path]:
    """Yield Pythons that may be of the right version."""
    yield Path(sys.executable)
    if found := shutil.which(f"python{PYTHON}"):
        yield Path(found)  # may be a shim that fails to run
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{PYTHON}.*/bin/python"), reverse=True)


def with_requirements(python: Path, scratch: Path) -> Path:
    """Return ``python`` if it has the packages that a build needs, else that of a temporary environment with them.

    Raises
    ------
    PackError
        The packages cannot be installed.
    """
    check = "import pybind11, setuptools, sys; sys.exit(int(setuptools.__version__.split('.')[0]) < 77)"
    if subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0:
        return python
    print(f"{python} lacks {' or '.join(REQUIREMENTS)}: installing them in an environment to throw away", flush=True)
    run([str(python), "-m", "venv", str(scratch / "venv")], "no environment could be made")
    inner = scratch / "venv/bin/python"
    missing = f"{' and '.join(REQUIREMENTS)} are missing in {python} and could not be installed"
    run([str(inner), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS], missing)
    return inner


def run(command: list[str], message: str, **options: Any) -> str:
    """Run a command; return what it printed.

    Raises
    ------
    PackError
        The command failed; the message has the end of its output.
    """
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,
    )
    if done.returncode:
        raise PackError(f"{message}:\n{done.stdout[-3000:]}")
    return done.stdout


def check_place(folder: Path) -> None:
    """Check that a pack may be put there, before the minutes that making one takes.

    Raises
    ------
    PackError
        Something else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise PackError(f"{folder} is a file; name a folder")
    if folder.exists() and not (folder / "pack.json").exists() and any(folder.iterdir()):
        raise PackError(f"{folder} is there and no pack; name another folder")
    folder.resolve().parent.mkdir(parents=True, exist_ok=True)


def replace(folder: Path, built: Path, description: dict[str, Any]) -> None:
    """Replace the last pack by the extensions and their description; it stays until the new one is complete."""
    check_place(folder)
    folder = folder.resolve()
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    try:
        new.mkdir()
        for path in built.glob("*.so"):
            shutil.copy(path, new)
        (new / "pack.json").write_text(json.dumps(description, indent=1) + "\n")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


def install(folder: Path, package: Path, suffix: str) -> list[Path]:
    """Put copies of a pack's extensions into the package and return them; running processes keep the old ones.

    Raises
    ------
    PackError
        There is no pack, it is damaged, or it is of another Python, machine or source.
    """
    if not (folder / "pack.json").exists():
        raise PackError(f"no build was carried in {folder}")
    try:
        description = json.loads((folder / "pack.json").read_text())
        carried_suffix, sources = description["suffix"], description["sources"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"the build carried is damaged: {folder / 'pack.json'}: {error!r}") from error
    if carried_suffix != suffix:
        raise PackError(f"the build carried is for {carried_suffix}, this Python takes {suffix}")
    if sources != sources_digest():
        raise PackError("the build carried was made of other sources")
    copies = []
    for path in sorted(folder.glob("*.so")):
        scratch = package / f"{path.name}.{os.getpid()}.new"
        try:
            shutil.copy(path, scratch)
            copies.append(scratch.replace(package / path.name))
        finally:
            scratch.unlink(missing_ok=True)
    return copies
