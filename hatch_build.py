"""Builds the shared library with cargo and puts it into the wheel.

`JAX_MHC_WHEEL` names the platform of the wheel where that is another than this machine: one of
PORTABLE, which cargo-zigbuild makes on any machine, or `any` for a wheel of Python alone.
`JAX_MHC_REPOSITORY` is the address of the repository, for the links in the package's metadata.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# Tag of the wheel, and its target in the words of cargo-zigbuild, with the oldest version of glibc.
PORTABLE = {
    "manylinux_2_28_x86_64": "x86_64-unknown-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-unknown-linux-gnu.2.28",
}

# Headers of jaxlib 0.8.0 are the oldest that every supported jaxlib accepts, so one library serves
# them all (ffi/build.rs). NVRTC compiles the CUDA kernels (kernels/build): what that of CUDA 12
# writes runs on drivers for CUDA 12 and 13.
HEADERS = "jaxlib==0.8.0"
NVRTC = "nvidia-cuda-nvrtc-cu12==12.9.86"

# Between two looks at how far the compiler of the CUDA kernels is.
PROGRESS_SECONDS = 5

READY = "or install a wheel that is built: pip install jax-mhc"

# Targets of links and pictures, in Markdown and in HTML.
_TARGET = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)"\s#]+)')


class BuildError(Exception):
    """An obstacle, with what to do about it, in one sentence."""


class RepositoryHook(MetadataHookInterface):
    """Addresses for a package's page: it has the README, and none of the files beside it."""

    def update(self, metadata):
        """Hatchling calls this with `project` of pyproject.toml, and the version."""
        if "readme" in metadata:  # that of an sdist, whose own build has set both
            return
        readme = Path(self.root, "README.md")
        repository = os.environ.get("JAX_MHC_REPOSITORY", "").rstrip("/")
        if repository:
            text = with_addresses(readme, repository, f"v{metadata['version']}")
        else:
            text = readme.read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(repository) if repository else {}


def urls(repository):
    """The package's links; the site is where GitHub Pages has that of a repository."""
    host, owner, name = repository.removeprefix("https://").split("/")
    return {
        "Homepage": repository,
        "Documentation": f"https://{owner.lower()}.{host.replace('.com', '.io')}/{name}/",
        "Source": repository,
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def with_addresses(readme, repository, tag):
    """The text of a README with an address in place of the path of each file beside it."""

    def address(match):
        path = match[2]
        if not (readme.parent / path).exists():
            return match[0]
        kind = "raw" if path.endswith((".png", ".svg")) else "blob"
        return f"{match[1]}{repository}/{kind}/{tag}/{path}"

    return _TARGET.sub(address, readme.read_text(encoding="utf-8"))


class CargoBuildHook(BuildHookInterface):
    """One wheel serves every Python: the library is no Python extension."""

    def dependencies(self):
        """Hatchling calls this before pip fetches them: an obstacle comes first."""
        if _is_of_python_alone(os.environ):
            return []
        try:
            check(Path(self.root), os.environ)
        except BuildError as error:
            self.app.abort(f"jax-mhc: {error}")
        return _dependencies(os.environ)

    def initialize(self, version, build_data):
        """Hatchling calls this before it packs the wheel."""
        if _is_of_python_alone(os.environ):
            build_data["tag"] = "py3-none-any"
            return
        try:
            library, tag = _build(Path(self.root))
        except BuildError as error:
            self.app.abort(f"jax-mhc: {error}")
        if version == "editable":
            shutil.copy2(library, Path(self.root, "python", "jax_mhc"))
        build_data["force_include"][str(library)] = f"jax_mhc/{library.name}"
        build_data["tag"] = f"py3-none-{tag}"
        build_data["pure_python"] = False


def _is_of_python_alone(env):
    return env.get("JAX_MHC_WHEEL") == "any"


def _dependencies(env):
    """Packages that the build reads from, without those that the variables replace."""
    wanted = [] if "XLA_FFI_INCLUDE_DIR" in env else [HEADERS]
    has_kernels = env.get("JAX_MHC_CUDA_ARCHITECTURES", "").strip() != "none"
    if sys.platform == "linux" and has_kernels and "JAX_MHC_NVRTC" not in env:
        wanted.append(NVRTC)
    return wanted


def _build(root):
    """The library that cargo builds, and the platform in the tag of its wheel."""
    env = dict(os.environ)
    tag = env.get("JAX_MHC_WHEEL")
    target = check(root, env)
    jaxlib = find_spec("jaxlib")
    if jaxlib and "XLA_FFI_INCLUDE_DIR" not in env:
        env["XLA_FFI_INCLUDE_DIR"] = str(Path(jaxlib.origin).parent / "include")
    if (nvrtc := _nvrtc()) and "JAX_MHC_NVRTC" not in env:
        env["JAX_MHC_NVRTC"] = str(nvrtc)
    target_dir = Path(root, env.setdefault("CARGO_TARGET_DIR", "target"))
    if subprocess.run(["cargo", "fetch", "--locked"], cwd=root, env=env).returncode:
        raise BuildError(
            "the crates of Cargo.lock cannot be fetched: run cargo fetch --locked in the sources "
            f"where there is a network, {READY}"
        )
    folders = _folders(root, target_dir, env)
    profile = env.get("JAX_MHC_CARGO_PROFILE", "release")
    command = ["cargo", "zigbuild", "--target", target] if target else ["cargo", "build"]
    command += ["--profile", profile, "--locked", "--package", "jax-mhc-xla-plugin"]
    # Warnings that a later compiler may have are no reason to fail on a user's machine.
    flags = ["--cap-lints", "warn"]
    flags += [f"--remap-path-prefix={folder}={name}" for folder, name in folders]
    command += _set_rustflags(env, flags)
    _add_cxxflags(env, [f"-ffile-prefix-map={folder}={name}" for folder, name in folders])
    _run(command, root, env, target_dir / "cuda" / "progress")
    place = target.partition(".")[0] or env.get("CARGO_BUILD_TARGET", "")
    folder = Path(target_dir, place, profile)
    if target:
        return folder / "libjax_mhc_xla.so", tag
    library = "libjax_mhc_xla" + (".dylib" if sys.platform == "darwin" else ".so")
    return folder / library, re.sub("[-.]", "_", sysconfig.get_platform())


def check(root, env):
    """Sees to it that what the build needs is there; returns cargo-zigbuild's target, or "".

    Raises:
        BuildError: something is missing, or too old.
    """
    if not sys.platform.startswith(("linux", "darwin")) or platform.machine() not in (
        "x86_64",
        "aarch64",
        "arm64",
    ):
        raise BuildError(
            "expected Linux or macOS on x86_64 or arm64 for the kernels, got "
            f"{platform.system()} on {platform.machine()}: set JAX_MHC_WHEEL=any for a wheel that "
            "runs in plain JAX"
        )
    tag = env.get("JAX_MHC_WHEEL")
    if tag is not None and tag not in PORTABLE:
        raise BuildError(f"JAX_MHC_WHEEL: expected any or one of {', '.join(PORTABLE)}, got {tag}")
    oldest = re.search(r'^rust-version = "(.*)"$', Path(root, "Cargo.toml").read_text(), re.M)[1]
    remedy = f"install Rust {oldest} or newer (https://rustup.rs), {READY}"
    if not (shutil.which("cargo", path=env.get("PATH")) and _rustc(env)):
        raise BuildError(f"Rust is missing (cargo and rustc): {remedy}")
    release = re.search(r"^release: ((\d+)\.(\d+).*)$", _rustc(env, "-vV"), re.M)
    if (int(release[2]), int(release[3])) < tuple(map(int, oldest.split("."))):
        raise BuildError(
            f"expected Rust {oldest} or newer, got {release[1]}: run rustup update stable, {READY}"
        )
    if tag:
        if not shutil.which("cargo-zigbuild", path=env.get("PATH")):
            raise BuildError("cargo-zigbuild is missing: run make wheels, which installs it")
        target = PORTABLE[tag].partition(".")[0]
        std = _rustc(env, "--print", "target-libdir", "--target", target).strip()
        if not Path(std).is_dir():
            raise BuildError(f"Rust has no {target}: run rustup target add {target}")
        return PORTABLE[tag]
    # The compiler that the build of the C++ half calls, and rustc to link.
    for variable, default in {"CXX": "c++", "CC": "cc"}.items():
        compiler = shlex.split(env.get(variable) or default)[0]
        if not shutil.which(compiler, path=env.get("PATH")):
            raise BuildError(
                f"there is no C++ compiler ({compiler}): install one, such as Debian's "
                f"build-essential, Fedora's gcc-c++ or Apple's xcode-select --install, {READY}"
            )
    return ""


def _rustc(env, *options):
    """The answer of rustc about itself; "" where there is none."""
    command = [env.get("RUSTC", "rustc"), *(options or ["--version"])]
    try:
        return subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _run(command, root, env, progress):
    """Runs cargo; says meanwhile how many CUDA kernels are compiled, which takes minutes.

    The build of the kernels keeps their number in the file `progress`.
    """
    progress.unlink(missing_ok=True)
    told = None
    with subprocess.Popen(command, cwd=root, env=env) as process:
        while process.poll() is None:
            try:
                process.wait(timeout=PROGRESS_SECONDS)
            except subprocess.TimeoutExpired:
                now = progress.read_text() if progress.exists() else ""
                if now not in ("", told):
                    print(f"CUDA kernels: {now} are compiled", file=sys.stderr, flush=True)
                    told = now
    if process.returncode:
        raise BuildError(f"{shlex.join(command[:2])} failed; its messages are above")


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
    commit = re.search("commit-hash: (.*)", _rustc(env, "-vV"))
    std = Path(_rustc(env, "--print", "sysroot").strip(), "lib", "rustlib", "src", "rust")
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


if __name__ == "__main__":
    try:
        check(Path(__file__).parent, dict(os.environ))
    except BuildError as error:
        sys.exit(f"jax-mhc: {error}")
