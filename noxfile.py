"""The checks that CI runs, each in its own virtual environment. `nox -R` runs them again in the same environments.

nox -s lint
nox -s "tests(transformers='5.23.0')" -- -k config
"""

from pathlib import Path

import nox

TRIED = dict(line.split("==") for line in Path(".ci/tried.txt").read_text().splitlines() if "==" in line)
PYPROJECT = nox.project.load_toml("pyproject.toml")

TORCH = "torch==2.13.0"  # installed first and alone: together with other packages, pip may choose another build
OLDEST = "4.44.2"
NEWEST = TRIED["transformers"]
A_YEAR_OLD = "4.57.6"  # with sentence-transformers of its time: each release supports a range of transformers
SENTENCE_TRANSFORMERS = {NEWEST: TRIED["sentence-transformers"], A_YEAR_OLD: "5.1.2"}  # else pip chooses
BETWEEN = ["4.48.3", A_YEAR_OLD, "5.0.0", "5.23.0"]
OLDEST_PYTEST = PYPROJECT["tool"]["pytest"]["ini_options"]["minversion"]

# Tests of what depends on differences between releases of transformers. The releases in between run only these.
COMPATIBILITY_TESTS = [
    f"tests/test_{name}.py"
    for name in ("configuration_lsg_albert", "modeling_lsg_albert", "loading", "ecosystem", "tokenizer", "peft")
] + ["tests/test_seq2seq.py", "tests/test_seq2seq_ecosystem.py"]
COMPATIBILITY_TESTS += [f"tests/test_conversion_{name}.py" for name in ("convert", "plan", "verify")]
COMPATIBILITY_TESTS.append("tests/test_pretraining.py")  # resumes with the Trainer of each release
COMPATIBILITY_TESTS.append("tests/test_training_examples.py")  # these resume, too

EMBEDDING_TESTS = ["tests/test_sentence_transformers.py", "tests/test_embed_search.py"]

nox.options.default_venv_backend = "virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's lint and format checks, with the release that the `dev` extra pins."""
    dev = PYPROJECT["project"]["optional-dependencies"]["dev"]
    session.install(next(requirement for requirement in dev if requirement.startswith("ruff==")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def run_pytest(session: nox.Session, transformers: str, *selection: str) -> None:
    """Install a release and the packages that were tried with it, and run a selection of the tests on two cores."""
    pytest = OLDEST_PYTEST if transformers == OLDEST else TRIED["pytest"]
    pins = [f"transformers=={transformers}", f"peft=={TRIED['peft']}", f"pytest=={pytest}"]
    if transformers in SENTENCE_TRANSFORMERS:
        pins.append(f"sentence-transformers=={SENTENCE_TRANSFORMERS[transformers]}")
    session.install(TORCH)
    session.install(".[test]", *pins)
    session.run("python", "-m", "pytest", "-n", "2", "--durations=15", *selection, *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The default tests on the newest release that was tried. CI also runs the command of README.md, which installs the
    newest release on the index. CI runs this session only if the two releases differ."""
    run_pytest(session, NEWEST)


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests on the newest release that was tried."""
    run_pytest(session, NEWEST, "-m", "slow and not gpu")


@nox.session
@nox.parametrize("transformers", [OLDEST, *BETWEEN])
def tests(session: nox.Session, transformers: str) -> None:
    """The default tests on the oldest release, and only the compatibility tests on the releases in between."""
    if transformers == OLDEST:
        return run_pytest(session, transformers)
    run_pytest(session, transformers, *COMPATIBILITY_TESTS, *EMBEDDING_TESTS * (transformers == A_YEAR_OLD))
    # a killed run: the Trainers of the releases differ most in how they resume one
    session.run("python", "-m", "pytest", "-m", "slow", "tests/test_training_examples.py", "-k", "tag_tokens")


@nox.session
def app(session: nox.Session) -> None:
    """The example app, also in a browser if chromium is installed: `apt-get install chromium`."""
    session.install(TORCH)
    session.install(".[test,app]", f"transformers=={NEWEST}", "playwright>=1.49")  # playwright drives chromium
    session.run("python", "-m", "pytest", "-rs", "-m", "not gpu", "tests/test_app.py", *session.posargs)
