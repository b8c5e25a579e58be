"""The repository keeps its own promises: who may import whom, requirements, and every command in the documentation."""

import argparse
import ast
import graphlib
import importlib
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from model.LMConfig import PUBLISHED, LMConfig
from model.loading import count_parameters
from model.model import MiniMindForCausalLM
from model.model_flags import MODEL_FLAGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "model", "dataset", "training", "inference")
MAY_IMPORT = {
    "common": {"common"},
    "model": {"model", "common"},
    "dataset": {"dataset", "model", "common"},
    "inference": {"inference", "model", "common"},
    "training": {"training", "inference", "dataset", "model", "common"},
}
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
MODULES = [path for package in PACKAGES for path in sorted(ROOT.glob(f"{package}/**/*.py"))]
CODE = sorted({*MODULES, *SCRIPTS, *ROOT.glob("scripts/**/*.py")})
DEV_CODE = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
OTHER_PYTHON = "other_python"  # scripts that tests run in an environment with packages of its own
OURS = {*PACKAGES, "scripts", "tests", "benchmarks", *(p.stem for p in (*SCRIPTS, *ROOT.glob("scripts/*"), *DEV_CODE))}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
NOT_IMPORTED = {"ruff", "ninja", "tensorboard", "onnx", "onnxscript"}  # two are run, the others imported by torch
LAZY = {
    "training/deepspeed.py",
    "inference/benchmarks.py",
    "inference/harness.py",
}  # modules on top of an optional package, imported only inside functions
READMES = (ROOT / "README.md", ROOT / "README_en.md")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("dataset/**/*.md")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the packages that absolute imports below `tree` mention, `pytest.importorskip` included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            names.add(node.args[0].value)
    return {name.partition(".")[0] for name in names}


def imported_at_once(tree: ast.Module) -> set[str]:
    """The part of `imported` that happens when the module is imported, not later inside a function."""
    return set().union(*(imported(s) for s in tree.body if not isinstance(s, FUNCTIONS | ast.ClassDef)), set())


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# Modules


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_modules_import_only_what_lies_below_them(path):
    names = imported(parse(path))
    folder = name_of(path).partition("/")[0]
    if folder in MAY_IMPORT:
        wrong = names & OURS - MAY_IMPORT[folder]
        assert not wrong, f"{folder}/ may not import {sorted(wrong)}"
    lazy = {Path(name).stem for name in LAZY} & {
        part
        for statement in parse(path).body
        if isinstance(statement, ast.ImportFrom) and statement.level
        for part in (statement.module, *(alias.name for alias in statement.names))
    }
    assert not lazy, f"import {sorted(lazy)} inside a function: its package is optional"
    scripts = names & {script.stem for script in SCRIPTS} - {path.stem}
    assert not scripts, f"scripts are run, not imported: {sorted(scripts)}"


def imported_files(path: Path, roots: tuple[Path, ...]) -> set[Path]:
    """The files below `roots` that a file imports, also inside functions."""
    places = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            places += [root / alias.name.replace(".", "/") for root in roots for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folders = [path.parents[node.level - 1]] if node.level else roots
            for folder in folders:
                module = folder / (node.module or "").replace(".", "/")
                places += [module, *(module / alias.name for alias in node.names)]  # from training import loop
    return {file for place in places if (file := place.with_name(place.name + ".py")).is_file()}


def order(paths: list[Path], roots: tuple[Path, ...]) -> list[Path]:
    """The files in an order in which each comes after all that it imports. Raises graphlib.CycleError."""
    return list(graphlib.TopologicalSorter({path: imported_files(path, roots) for path in paths}).static_order())


def test_no_circle_of_files_that_import_each_other():
    assert set(order(CODE, (ROOT, ROOT / "scripts"))) == set(CODE)  # scripts find each other without their folder


@pytest.mark.parametrize(
    "import_a", ["from folder.a import f", "from folder import a", "from .a import f", "import folder.a"]
)
def test_a_circle_is_found_in_imports_of_every_form(tmp_path, import_a):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.py").write_text("from .b import g\n")
    (folder / "b.py").write_text("")
    files = [folder / "a.py", folder / "b.py"]
    assert order(files, (tmp_path,)) == files[::-1]
    (folder / "b.py").write_text(f"def g():\n    {import_a}\n")
    with pytest.raises(graphlib.CycleError):
        order(files, (tmp_path,))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_modules_hold_definitions_only(path):
    """No call, loop or `with` at the top level; only a script may extend its search path and call its main."""
    for statement in parse(path).body:
        source = ast.unparse(statement)
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_guard = isinstance(statement, ast.If) and ast.unparse(statement.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        )
        definitions = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *FUNCTIONS.__args__, ast.ClassDef)
        allowed = is_text or is_guard or isinstance(statement, definitions)
        allowed |= path in SCRIPTS and source.startswith("sys.path.insert(")
        assert allowed, f"line {statement.lineno}: {source.splitlines()[0]}"


def test_importing_everything_has_no_effect(tmp_path):
    """In a new process: nothing printed, no file written, no thread, no CUDA context, random generators untouched."""
    program = """
import importlib, random, runpy, sys, threading
import numpy as np, torch, transformers  # the last draws random numbers by way of httpx where rich is installed
from pathlib import Path
def state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = state()
for path in sys.argv[1:]:
    if path.endswith(".py"):
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(path, run_name="imported")
    else:
        importlib.import_module(path)
assert state() == before, "a random generator was used"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert [t.name for t in threading.enumerate()] == ["MainThread"], threading.enumerate()
"""
    scripts = [str(path) for path in SCRIPTS]  # first: they put the repository on the search path
    modules = [name_of(p).removesuffix(".py").replace("/", ".") for p in MODULES if name_of(p) not in LAZY]
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, *scripts, *modules], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# Requirements


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    return {requirement.name: requirement for requirement in parsed}


def third_party(names: set[str]) -> set[str]:
    return names - OURS - set(sys.stdlib_module_names)


def test_requirements_are_exactly_what_is_imported():
    """requirements.txt: imported by the code. -optional: only inside functions. -dev and -extras: by tests and
    benchmarks, and what they use of the optional ones."""
    core, dev, optional = (set(requirements(f"requirements{suffix}.txt")) for suffix in ("", "-dev", "-optional"))
    dev |= set(requirements("requirements-extras.txt"))
    at_once = third_party(set().union(*(imported_at_once(parse(p)) for p in CODE if name_of(p) not in LAZY)))
    anywhere = third_party(set().union(*(imported(parse(path)) for path in CODE)))
    in_tests = third_party(set().union(*(imported(parse(p)) for p in DEV_CODE if p.parent.name != OTHER_PYTHON)))
    assert not at_once - core, f"missing in requirements.txt: {sorted(at_once - core)}"
    assert anywhere == (core | optional) - NOT_IMPORTED
    assert in_tests - core - optional == dev - optional - NOT_IMPORTED


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_pin_inside_its_range(version):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": version}):
                assert pin.name not in pins, f"two pins for {pin.name} on Python {version}"
                (specifier,) = pin.specifier
                pins[pin.name] = specifier.version
    needed = {}
    for suffix in ("", "-dev", "-extras"):
        needed |= requirements(f"requirements{suffix}.txt")
    for name, requirement in needed.items():
        assert requirement.specifier.contains(pins[name]), f"{requirement} is pinned to {pins[name]}"


def test_every_requirement_is_a_range():
    """`make test-lowest` reads the lower bounds off."""
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line


# Documentation


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).rstrip()


def code_blocks(path: Path) -> list[str]:
    """Fenced code blocks, without comments: those are in the language of the document."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return ["\n".join(map(without_comment, block.splitlines())) for block in blocks]


def commands() -> list[tuple[str, str]]:
    """(where, command line) for each command in documents, the Makefile, and the docstrings of scripts."""
    found = []
    for path in DOCUMENTS:
        lines = "\n".join(code_blocks(path)).replace("\\\n", " ").splitlines()
        found += [(name_of(path), line) for line in lines]
    found += [("Makefile", line) for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()]
    for path in SCRIPTS:
        lines = (ast.get_docstring(parse(path)) or "").replace("\\\n", " ").splitlines()
        found += [(name_of(path), line) for line in lines]
    pattern = r"\s*(\.venv/bin/)?(python|torchrun|deepspeed)\s.*?\b[\w/]+\.py\b|\s*make\b"
    return sorted({(where, without_comment(line).strip()) for where, line in found if re.match(pattern, line)})


class Parsed(BaseException):
    """Raised by the scripts' argument parser when a command line was accepted, to keep the script from running."""


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value)
def test_documented_commands_exist_and_their_flags_parse(where, command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
        assert {word for word in words[1:] if "=" not in word} <= targets
        return
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[place]
    assert script.is_file(), f"{where} names {words[place]}, which does not exist"

    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None):
        _, unknown = parse_known_args(parser, args, namespace)
        raise Parsed(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words[place + 1 :]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Parsed as parsed:
        assert not parsed.args[0], f"unknown flags: {parsed.args[0]}"
    except SystemExit:
        pytest.fail(f"{where}: `{command}` is refused: {capsys.readouterr().err}")
    else:
        pytest.fail(f"{script} did not parse its arguments")


TRANSLATED = [
    "README",
    "docs/architecture",
    "docs/conversion",
    "docs/deviations",
    "docs/distributed",
    "docs/server",
    "dataset/README",
    "dataset/sample/README",
]


@pytest.mark.parametrize(("chinese", "english"), [(f"{name}.md", f"{name}_en.md") for name in TRANSLATED])
def test_translations_have_the_same_structure(chinese, english):
    """The same code, and the same sequence of headings, table rows and list items."""
    assert code_blocks(ROOT / chinese) == code_blocks(ROOT / english)

    def structure(name: str) -> list[str]:
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
        return re.findall(r"^(#+|\||- |\d+\. )", text, flags=re.M)

    assert structure(chinese) == structure(english)


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_readme_knows_the_quick_start_and_the_models(path):
    text = path.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^\t\.venv/bin/(python \w+\.py .*)", makefile, flags=re.M):
        assert command in text, f"{name_of(path)} lacks the quick start's `{command}`"
    for name, sizes in PUBLISHED.items():
        with torch.device("meta"):
            parameters = count_parameters(MiniMindForCausalLM(LMConfig(**sizes)))
        assert re.search(rf"^\| {name} \| {parameters:,} \| {sizes['dim']} \| {sizes['n_layers']} ", text, flags=re.M)


def tour() -> list[str]:
    """The commands of `make tour`, in order."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^tour: .*\n((?:\t.*\n)+)", makefile, flags=re.M)
    return re.findall(r"^\t\.venv/bin/(python .*)", recipe, flags=re.M)


@pytest.mark.parametrize(("name", "heading"), [("README.md", "接下来十分钟"), ("README_en.md", "The next ten minutes")])
def test_readme_shows_the_tour_command_by_command(name, heading):
    section = (ROOT / name).read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^python .*", section, flags=re.M)
    assert shown == tour() and len(shown) >= 10


def test_docstring_examples_on_the_quick_start_model_are_run_by_the_tour():
    """`make tour` runs them literally: the one of distillation asked for a teacher that no command had made."""
    examples = [shlex.split(command) for where, command in commands() if where in map(name_of, SCRIPTS)]
    examples = [words for words in examples if "out/quickstart" in words]
    assert {words[1] for words in examples} >= {
        "train_dpo.py", "train_lora.py", "train_distill_reason.py", "train_distillation.py"
    }  # fmt: skip
    assert all(sorted(words) in [sorted(shlex.split(command)) for command in tour()] for words in examples)


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_readme_table_of_defaults_is_true(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # weights in out/ might be of several sizes
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in path.read_text("utf-8").splitlines()]
    header = next(i for i, row in enumerate(rows) if row[1:2] == ["train_pretrain"])
    stages = rows[header][1:-1]
    defaults = [vars(importlib.import_module(stage).parse_args([])) for stage in stages]
    table = list(itertools.takewhile(bool, rows[header + 2 :]))
    assert len(table) >= 6
    for flag, *values, _ in table:
        for stage, value, default in zip(stages, values, defaults, strict=True):
            default = default[flag.removeprefix("--")]
            assert type(default)(value) == default, f"{flag} of {stage} is {default}, not {value}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_flags_named_in_documents_exist(path):
    source = "".join(code.read_text(encoding="utf-8") for code in CODE)
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    others = {"--help", "--node_rank", "--max-restarts", "--model_args"}  # argparse's, torchrun's and lm_eval's
    others |= {f"--{flag.name}" for flag in MODEL_FLAGS}
    unknown = {flag for flag in re.findall(r"`(--[\w-]+)", text) if f'"{flag}"' not in source} - others
    assert not unknown


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"[^\w\- ]", "", heading).strip() for heading in re.findall(r"^#+ (.*)", text, re.M)]
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{name_of(path)} links to the missing heading {target}"
        elif "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), f"{name_of(path)} links to the missing {target}"


def test_ci_and_makefile_use_the_same_commands():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci and "make lint" in ci
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, ".ci/run is not executable"
