"""Builds the shared library with cargo and puts it into the wheel."""

import json
import os
import re
import shlex
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
        subprocess.run(["cargo", "fetch", "--locked"], cwd=self.root, env=env, check=True)
        folders = _folders(Path(self.root), target, env)
        profile = env.get("JAX_MHC_CARGO_PROFILE", "release")
        command = ["cargo", "build", "--profile", profile, "--locked"]
        command += ["--package", "jax-mhc-xla-plugin"]
        # Warnings that a later compiler may have are no reason to fail on a user's machine.
        flags = ["--cap-lints", "warn"]
        flags += [f"--remap-path-prefix={folder}={name}" for folder, name in folders]
        command += _set_rustflags(env, flags)
        _add_cxxflags(env, [f"-ffile-prefix-map={folder}={name}" for folder, name in folders])
        subprocess.run(command, cwd=self.root, env=env, check=True)

        library = "libjax_mhc_xla" + (".dylib" if sys.platform == "darwin" else ".so")
        if version == "editable":
            shutil.copy2(target / profile / library, Path(self.root, "python", "jax_mhc"))
        build_data["force_include"][str(target / profile / library)] = f"jax_mhc/{library}"
        build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"
        build_data["pure_python"] = False


def _nvrtc():
    """The compiler of the CUDA kernels, where pip installed it."""
    try:
        package = find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:  # no `nvidia` at all
        return None
    return package and Path(*package.submodule_search_locations, "lib", "libnvrtc.so.12")


def _folders(root, target, env):
    """The folders of this machine that compilers see, and the names that the library has for them.

    Compilers put paths of sources into the library, in messages of panics and assertions. With
    names in their place the library does not tell who built it where, and is the same bytes
    everywhere. Where several match, the last one counts.
    """

    def rustc(*options):
        command = [env.get("RUSTC", "rustc"), *options]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout

    commit = re.search("commit-hash: (.*)", rustc("-vV"))
    std = Path(rustc("--print", "sysroot").strip(), "lib", "rustlib", "src", "rust")
    # One for each registry, by the name of its host.
    registries = Path(env.get("CARGO_HOME", Path.home() / ".cargo"), "registry", "src").glob("*")
    return [
        (root, "/jax-mhc"),
        (target, "/jax-mhc/target"),
        *((registry, "/cargo") for registry in sorted(registries)),
        # Without the sources of the standard library rustc has this name for them.
        (std, f"/rustc/{commit[1] if commit else 'std'}"),
        *((Path(env[name]), "/xla") for name in ["XLA_FFI_INCLUDE_DIR"] if name in env),
    ]


def _set_rustflags(env, flags):
    """Gives rustc `flags` besides those of the user; returns cargo's options for it."""
    # Cargo reads one of these alone.
    if "CARGO_ENCODED_RUSTFLAGS" in env:
        flags = [env["CARGO_ENCODED_RUSTFLAGS"], *flags]
    elif "RUSTFLAGS" in env:
        flags = [*env["RUSTFLAGS"].split(), *flags]
    else:
        return ["--config", f"build.rustflags = {json.dumps(flags)}"]
    env["CARGO_ENCODED_RUSTFLAGS"] = "\x1f".join(flags)
    return []


def _add_cxxflags(env, flags):
    """Gives the C++ compiler `flags` besides those of the user, in dependencies too."""
    env["CC_SHELL_ESCAPED_FLAGS"] = "1"
    env["CXXFLAGS"] = " ".join([env.get("CXXFLAGS", ""), *map(shlex.quote, flags)]).strip()
