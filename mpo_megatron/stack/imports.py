"""Why an installed package does not import, and how to fix it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import signal
import subprocess
import sys
import warnings

from mpo_megatron.stack.problem import Problem

REBUILD = {
    "transformer-engine": "NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-cache-dir --force-reinstall --no-deps "
    "--no-build-isolation transformer-engine-torch{pin}",
    "flash-attn": "pip install --no-cache-dir --force-reinstall --no-deps --no-build-isolation flash-attn{pin}",
    "flash-attn-3": "build it again in flash-attention's folder hopper: pip install --no-build-isolation .",
    "apex": "build it again: pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
    "vllm": "pip install vllm{pin}, which brings the torch it is built for",
}
"""The command that rebuilds or reinstalls a package's compiled part; `{pin}` is its version."""
EXTENSION = "NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-build-isolation 'transformer-engine[pytorch]{pin}'"
"""The command that adds Transformer Engine's extension for PyTorch to its core."""
NO_EXTENSION = ("transformer_engine_torch", "Could not find `transformer-engine", "empty `transformer-engine")
"""Its core's error without that extension."""

FAILED = 3
"""Exit code of this module as a program: the module does not import, and the last line tells why."""


def import_error(module: str) -> str | None:
    """Why a module does not import in this process, on one line; None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - packages raise all kinds
        return one_line(error)
    return None


def import_error_apart(module: str, seconds: float = 300) -> str | None:
    """The same in a separate process, which may crash or hang."""
    command = [sys.executable, "-m", __name__, module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"TimeoutError: its import takes more than {seconds:.0f} s"
    if done.returncode < 0:
        return f"Crash: its import ends with {signal.Signals(-done.returncode).name}"
    if done.returncode == FAILED:
        return done.stdout.strip().splitlines()[-1]
    return None if done.returncode == 0 else f"Exit: its import ends the process with code {done.returncode}"


def one_line(error: BaseException) -> str:
    """Kind and message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def reinstall(distribution: str, version: str | None) -> str:
    """The command that reinstalls a package in its current version."""
    command = REBUILD.get(distribution, "pip install --force-reinstall {name}{pin}")
    return command.format(name=distribution, pin=f"=={version}" if version else "")


def diagnose(distribution: str, error: str) -> Problem:
    """What an import's error means.

    Args:
        error: as returned by `import_error`
    """
    version = version_of(distribution)
    if version is None and distribution == "transformer-engine":  # its core alone
        version = version_of("transformer-engine-cu13") or version_of("transformer-engine-cu12")
    what = f"{' '.join(filter(None, (distribution, version)))} is installed but does not import ({error})"
    rebuild = reinstall(distribution, version)
    if "undefined symbol" in error:
        return Problem(what=f"{what}: it is built for another torch", cure=rebuild)
    library = re.search(r"(lib[\w-]+)\.so[.\d]*: cannot open shared object", error)
    if library and library[1] == "libcuda":
        return Problem(
            what=f"{what}: there is no NVIDIA driver", cure="start the container with --gpus all, or install the driver"
        )
    if library and re.search(r"lib(cudart|cublas|cublasLt|nvrtc|cufft|cusparse|cusolver|curand)\.so\.\d+", error):
        return Problem(what=f"{what}: it is built for another CUDA", cure=rebuild)
    if library and library[1].startswith("libcudnn"):
        return Problem(what=f"{what}: there is no cuDNN", cure="pip install --force-reinstall --no-deps nvidia-cudnn-cu13")
    if found := re.search(r"GLIBC(?:XX)?_[\d.]+", error):
        return Problem(what=f"{what}: it is built for a system with {found[0]}", cure=rebuild)
    missing = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", error)
    if version_of("transformer-engine-torch") is None and any(sign in error for sign in NO_EXTENSION):
        return Problem(
            what=f"{what}: its extension for PyTorch is missing", cure=EXTENSION.format(pin=f"=={version}" if version else "")
        )
    if missing:
        return Problem(what=what, cure=f"pip install {missing[1].partition('.')[0]}, or reinstall: {rebuild}")
    return Problem(what=what, cure=rebuild)


if __name__ == "__main__":
    if found := import_error(sys.argv[1]):
        print(f"\n{found}", flush=True)
        sys.exit(FAILED)
