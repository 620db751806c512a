"""The checks that CI runs, each in a virtual environment of its own; `nox -R` runs them again in the same ones.

nox -s lint
nox -s "tests(transformers='5.23.0')" -- -k config
"""

import nox

TORCH = "torch==2.13.0"  # installed first and alone: a range asked for beside other packages may bring another build
OLDEST = "4.44.2"
BETWEEN = ["4.48.3", "4.57.6", "5.0.0"]
NEWEST = "5.23.0"

# What these files test never meets transformers, so the releases in between need not run them again.
TORCH_ONLY_TESTS = ["tests/test_lsg_attention.py", "tests/test_lsg_sparsity.py"]

nox.options.default_venv_backend = "virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's lint and format checks, with the release that the `dev` extra pins."""
    dev = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
    session.install(next(requirement for requirement in dev if requirement.startswith("ruff==")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
@nox.parametrize("transformers", [NEWEST, OLDEST, *BETWEEN])
def tests(session: nox.Session, transformers: str) -> None:
    """The tests on one release: with the slow ones on the newest, without the torch-only files on those in between."""
    session.install(TORCH)
    session.install(".[test]", f"transformers=={transformers}")
    selection = []
    if transformers == NEWEST:
        selection = ["-m", "not gpu"]
    elif transformers in BETWEEN:
        selection = [f"--ignore={path}" for path in TORCH_ONLY_TESTS]
    session.run("python", "-m", "pytest", *selection, *session.posargs)
