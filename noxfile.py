"""Every way of working on Drift, each a session: `nox -s NAME`; `nox --list` names them all.

Sessions that run Drift's own code share one environment, built once by the session `workshop`; the others
need one or two tools and have a small environment of their own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "imports", "proto", "docs", "standalone"]

ROOT = Path(__file__).parent
PACKAGES = ("drift-scheduler", "drift-kernels", "drift-core", "drift-gateway")
CONSTRAINTS = ("-c", "constraints.txt")
# Installed first and by exactly this name: a looser spelling lets pip choose the largest build there is.
TORCH = "torch==2.13.0"
BUILD_TOOLS = ("hatchling", "editables")
TEST_TOOLS = (
    "buf-bin",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "jsonschema",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp-proto-grpc",
    "transformers",
    "trustme",
)
# A process of pytest per core, but no more than memory is for: each holds torch and transformers, half a GB.
ALL_AT_ONCE = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
TYPE_TOOLS = ("mypy", "types-grpcio", "types-protobuf")
STUB_TOOLS = ("grpcio-tools==1.81.1", "mypy-protobuf", "buf-bin")
# What proto/ said when it was last committed; it may only ever say more.
BASELINE = "proto/baseline.binpb"
# Where protoc's stubs are kept.
STUBS = "packages/drift-gateway/src"
# Clients nobody here wrote, each group in an environment of its own: they want different releases of protobuf.
TRITON_CLIENT = ("tritonclient[grpc]==2.73.0",)
OPENAI_CLIENT = ("smg==1.13.0", "openai==3.54.0")

WORKSHOP_BIN = ROOT / ".nox" / "workshop" / ("Scripts" if os.name == "nt" else "bin")


@nox.session(default=False)
def workshop(session: nox.Session) -> None:
    """Build the environment that tests, types, docs, demo, serve and bench share."""
    stamp = Path(session.virtualenv.location) / "installed-for"
    wanted = _fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        session.log("the environment is up to date")
        return
    session.install(TORCH)
    session.install(*CONSTRAINTS, *BUILD_TOOLS, *TEST_TOOLS, *TYPE_TOOLS)
    editable = [word for name in PACKAGES for word in ("-e", f"packages/{name}")]
    # With Triton, which compiles and interprets the kernels' tests without a device.
    editable[editable.index("packages/drift-kernels")] += "[cuda]"
    session.install(*CONSTRAINTS, "--no-build-isolation", *editable)
    session.run("python", "-m", "pip", "check", silent=True)
    stamp.write_text(wanted)


@nox.session(python=False, requires=["workshop"])
def tests(session: nox.Session) -> None:
    """Run all tests, as many at once as there are cores; arguments after -- go to pytest, which then runs alone."""
    # Tests start hundreds of processes, each of which would compile Drift anew where bytecode may not be kept.
    env = {"PYTHONDONTWRITEBYTECODE": ""}
    _in_workshop(session, "pytest", *(session.posargs or ALL_AT_ONCE), **env)


@nox.session(python=False, requires=["workshop"])
def types(session: nox.Session) -> None:
    """Check the types of the four packages and of tools/ with mypy --strict."""
    _in_workshop(session, "mypy", *session.posargs)
    _in_workshop(session, "mypy", "tools")


@nox.session(python=False, requires=["workshop"])
def docs(session: nox.Session) -> None:
    """Run the commands of README and docs as written (see CONTRIBUTING, "Documentation that runs")."""
    options = [f"--node-modules={_node_modules(session)}"] if shutil.which("npm") else []
    _in_workshop(session, "python", "tools/docs_commands.py", *options, *session.posargs)


@nox.session(python=False, requires=["workshop"])
def demo(session: nox.Session) -> None:
    """Serve the embedded model and stream a handful of concurrent requests to the terminal."""
    _in_workshop(session, "drift", "demo", *session.posargs)


@nox.session(python=False, requires=["workshop"])
def serve(session: nox.Session) -> None:
    """Run `drift serve`; arguments after -- go to it."""
    _in_workshop(session, "drift", "serve", *session.posargs)


@nox.session(python=False, requires=["workshop"])
def bench(session: nox.Session) -> None:
    """Compare the policies on the default grid, or run one benchmark: `nox -s bench -- cpu` runs bench/cpu.py."""
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if not path.stem.startswith("_"))
    name, *options = session.posargs or ("grid",)
    if name not in names:
        session.error(f"no benchmark {name!r}; there are: {', '.join(names)}")
    _in_workshop(session, "python", f"bench/{name}.py", *options)


@nox.session(python=False, requires=["workshop"], default=False)
def kernels(session: nox.Session) -> None:
    """Compile every GPU kernel for every architecture; fails if docs/kernels.md's table was another one."""
    _in_workshop(session, "python", "tools/kernel_table.py", *session.posargs)


@nox.session(python=False, requires=["workshop"], default=False)
def kernel_sweep(session: nox.Session) -> None:
    """Run attention in Triton's interpreter on 300 random batches (`-- 1000`: on that many)."""
    command = ("packages/drift-kernels/tests/triton/test_interpreted_sweep.py", "-q", "--timeout", "900")
    env = {"TRITON_INTERPRET": "1", "DRIFT_SWEEP": session.posargs[0] if session.posargs else "300"}
    _in_workshop(session, "pytest", *command, "-W", "ignore::RuntimeWarning", **env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff; `nox -s lint -- fix` repairs what it can."""
    session.install(*CONSTRAINTS, "ruff")
    if session.posargs == ["fix"]:
        session.run("ruff", "check", "--fix", ".")
        session.run("ruff", "format", ".")
        return
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def imports(session: nox.Session) -> None:
    """Check who imports whom (the contracts are in pyproject.toml)."""
    session.install(*CONSTRAINTS, "import-linter")
    sources = os.pathsep.join(str(ROOT / "packages" / name / "src") for name in PACKAGES)
    session.run("lint-imports", *session.posargs, env={"PYTHONPATH": sources})


@nox.session
def proto(session: nox.Session) -> None:
    """Lint the wire API, refuse changes that break clients, write stubs and baseline again; fail if they changed."""
    session.install(*CONSTRAINTS, *STUB_TOOLS)
    session.run("buf", "lint")
    session.run("buf", "breaking", "--against", BASELINE)
    # Beside the tree, where other sessions may be reading; only what differs is put into it.
    made = Path(session.create_tmp()).resolve() / "made"
    shutil.rmtree(made, ignore_errors=True)
    out = made / STUBS
    out.mkdir(parents=True)
    (made / BASELINE).parent.mkdir()
    session.run("buf", "build", "--exclude-source-info", "--output", str(made / BASELINE))
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    options.append(f"--mypy_grpc_out=quiet:{out}")  # types of services and stubs
    session.run("python", "-m", "grpc_tools.protoc", "-Iproto", *options, *sources)
    changed = _renew(made)
    if changed:
        session.error(
            f"stubs or baseline differed from what proto/ says and were rewritten; commit {', '.join(changed)}"
        )


@nox.session(requires=["workshop"], default=False)
def interop(session: nox.Session) -> None:
    """Stream through tritonclient, smg with openai, buf curl and @grpc/grpc-js; needs node, npm and jq."""
    folder = Path(session.create_tmp()).resolve()
    for program in ("node", "npm", "jq"):
        if shutil.which(program) is None:
            session.error(f"{program} is not installed; the clients in JavaScript and the shell need it")
    session.install(*CONSTRAINTS, "buf-bin", "virtualenv")
    pythons = {}
    for name, packages in (("triton", TRITON_CLIENT), ("openai", OPENAI_CLIENT)):
        pythons[name] = folder / name / "bin" / "python"
        if not pythons[name].exists():
            session.run("python", "-m", "virtualenv", str(folder / name), silent=True)
        session.run(str(pythons[name]), "-m", "pip", "install", "-q", *packages, external=True)
    modules = _node_modules(session)
    options = [f"--triton={pythons['triton']}", f"--openai={pythons['openai']}", f"--node-modules={modules}"]
    _in_workshop(session, "python", "tools/interop.py", f"--buf={Path(session.bin) / 'buf'}", *options)


@nox.session(reuse_venv=False)
def standalone(session: nox.Session) -> None:
    """Install drift-scheduler's wheel, alone, and use it: no torch, no grpc, no other drift package."""
    wheel = _build(session, "drift-scheduler", Path(session.create_tmp()))
    session.install(*CONSTRAINTS, str(wheel))
    session.install(*CONSTRAINTS, "pytest", "pytest-timeout", "hypothesis")
    session.run("python", "tools/alone.py", "drift_scheduler", "torch", "grpc", "drift_core", "drift_kernels")
    flags = (
        "--workload sharegpt --rate 4 --requests 50 --device a100-80gb --model llama-3.1-8b --dispatch gang"
    )
    session.run("drift", "simulate", *flags.split())
    session.run("pytest", "packages/drift-scheduler/tests", *session.posargs)


@nox.session(reuse_venv=False, default=False)
def wheels(session: nox.Session) -> None:
    """Build all four wheels; install each with nothing but what it declares, and import it."""
    folder = Path(session.create_tmp())
    built = {name: str(_build(session, name, folder)) for name in PACKAGES}
    check = ("python", "tools/alone.py")
    session.install(*CONSTRAINTS, built["drift-scheduler"])
    session.run(*check, "drift_scheduler", "torch", "grpc", "drift_core", "drift_kernels")
    session.run("python", "-m", "pip", "uninstall", "-qy", "drift-scheduler")
    session.install(TORCH)
    session.install(*CONSTRAINTS, built["drift-kernels"])
    session.run(*check, "drift_kernels", "grpc", "drift_scheduler", "drift_core")
    session.install(*CONSTRAINTS, *(built[name] for name in PACKAGES[:3]))
    session.run(*check, "drift_core", "grpc", "drift_gateway")
    session.install(*CONSTRAINTS, *built.values())
    session.run(*check, "drift_gateway", "pytest", "transformers")
    session.run("python", "-m", "pip", "check")
    session.run("drift", "--help")


def _in_workshop(session: nox.Session, command: str, *arguments: str, **env: str) -> None:
    path = os.pathsep.join((str(WORKSHOP_BIN), os.environ.get("PATH", "")))
    env |= {"PATH": path, "VIRTUAL_ENV": str(WORKSHOP_BIN.parent)}
    # Ctrl-C reaches the command itself; nox leaves it the time to end in good order.
    session.run(
        str(WORKSHOP_BIN / command),
        *arguments,
        env=env,
        external=True,
        interrupt_timeout=30,
        terminate_timeout=10,
    )


def _node_modules(session: nox.Session) -> Path:
    """The packages that examples/clients/package.json names, installed below .nox."""
    folder = ROOT / ".nox" / "node"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (ROOT / "examples" / "clients" / "package.json").read_bytes()
    stamp = folder / "installed-for"
    if not stamp.is_file() or stamp.read_bytes() != wanted:
        (folder / "package.json").write_bytes(wanted)
        quiet = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts")
        session.run("npm", "--prefix", str(folder), "install", *quiet, external=True)
        stamp.write_bytes(wanted)
    return folder / "node_modules"


def _fingerprint() -> str:
    """Digest of every file that decides what the workshop holds."""
    files = [ROOT / "noxfile.py", ROOT / "constraints.txt"]
    files += [ROOT / "packages" / name / "pyproject.toml" for name in PACKAGES]
    digest = hashlib.sha256(str(ROOT).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _renew(made: Path) -> list[str]:
    """Put every file below `made` that differs from the repository's into its place there; return their paths."""
    changed = []
    for path in sorted(file for file in made.rglob("*") if file.is_file()):
        name = path.relative_to(made)
        here = ROOT / name
        if not here.is_file() or here.read_bytes() != path.read_bytes():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, here)
            changed.append(str(name))
    return changed


def _build(session: nox.Session, name: str, folder: Path) -> Path:
    """Build one wheel into an empty folder of its own; return its path."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), f"packages/{name}")
    (wheel,) = target.glob("*.whl")
    return wheel
