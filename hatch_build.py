"""Builds the shared library with cargo and puts it into the wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CargoBuildHook(BuildHookInterface):
    """One wheel serves every Python: the library is no Python extension."""

    def initialize(self, version, build_data):
        """Hatchling calls this before it packs the wheel."""
        env = dict(os.environ)
        jaxlib = find_spec("jaxlib")
        if jaxlib and "XLA_FFI_INCLUDE_DIR" not in env:
            env["XLA_FFI_INCLUDE_DIR"] = str(Path(jaxlib.origin).parent / "include")
        if (nvrtc := _nvrtc()) and "JAX_MHC_NVRTC" not in env:
            env["JAX_MHC_NVRTC"] = str(nvrtc)
        target = Path(self.root, env.setdefault("CARGO_TARGET_DIR", "target"))
        command = ["cargo", "build", "--release", "--locked", "--package", "jax-mhc-xla-plugin"]
        # Warnings that a later compiler may have are no reason to fail on a user's machine.
        command += ["--config", 'build.rustflags = ["--cap-lints", "warn"]']
        subprocess.run(command, cwd=self.root, env=env, check=True)

        library = "libjax_mhc_xla" + (".dylib" if sys.platform == "darwin" else ".so")
        if version == "editable":
            shutil.copy2(target / "release" / library, Path(self.root, "python", "jax_mhc"))
        build_data["force_include"][str(target / "release" / library)] = f"jax_mhc/{library}"
        build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"
        build_data["pure_python"] = False


def _nvrtc():
    """The compiler of the CUDA kernels, where pip installed it."""
    try:
        package = find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:  # no `nvidia` at all
        return None
    return package and Path(*package.submodule_search_locations, "lib", "libnvrtc.so.12")
