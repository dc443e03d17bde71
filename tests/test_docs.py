"""The commands and the Python that the pages show: those that can be are run, all are checked to be possible."""

import ast
import inspect
import re
import shlex

import pytest
from support import ROOT

import decef
from decef.compression.pipeline import Compression
from decef.plans import plan

PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
PASSED_ON = {decef.compress: Compression, decef.convert: plan}  # what takes the keywords that are not their own


def blocks(page):
    """The Python that a page shows."""
    return [code for kind, code in FENCED.findall((ROOT / page).read_text()) if kind == "python"]


def commands(page):
    """The command lines of a page, in blocks and in its text, without comments."""
    text = (ROOT / page).read_text()
    shown = [code for kind, code in FENCED.findall(text) if kind != "python"]
    lines = [line for code in shown for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python scripts/|make )[^`]*)`", FENCED.sub("", text))
    for line in lines:
        for command in re.sub(r"<([^>]*)>", r"\1", line).split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_can_be_typed(monkeypatch, capsys, page):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from cli import check_arguments, expand

    makefile = (ROOT / "Makefile").read_text()
    for program, *arguments in commands(page):
        if program == "make":
            for word in arguments:
                name, is_setting, _ = word.partition("=")
                assert re.search(rf"\$\({name}\)" if is_setting else rf"^{name}:", makefile, re.MULTILINE), word
        script = next((word for word in (program, *arguments) if word.startswith("scripts/")), None)
        if script is None:
            continue
        name, given = script[len("scripts/") : -len(".py")], arguments[arguments.index(script) + 1 :]
        assert name in SCRIPTS
        if name in ("train", "compress") and given[:1] != ["--from"]:
            try:
                check_arguments(expand([word for word in given if word != "..."]), name)
            except SystemExit:
                pytest.fail(f"{' '.join(given)}: {capsys.readouterr().err}")
        else:
            source = (ROOT / "scripts" / f"{name}.py").read_text()
            for option in given:
                assert not option.startswith("--") or f'"{option}"' in source, f"{name}: {option}"


def dotted(node):
    """The names in `a.b.c`; None for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    before = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return None if before is None else [*before, node.attr]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_all_that_the_python_of_a_page_calls_is_there_and_takes_these_arguments(page):
    names, calls = {}, 0
    for code in blocks(page):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), page, "exec"), names)
        for node in ast.walk(tree):
            path = dotted(node.func) if isinstance(node, ast.Call) else None
            if not path or path[0] not in names or names[path[0]].__name__.startswith("torch"):
                continue
            called = names[path[0]]
            for name in path[1:]:
                called = getattr(called, name)
            calls += 1
            keywords = {keyword.arg: None for keyword in node.keywords}
            passed_on = inspect.signature(PASSED_ON.get(called, called)).parameters
            own = {key for key in inspect.signature(called).parameters if key in keywords}
            assert called not in PASSED_ON or keywords.keys() - own <= passed_on.keys(), ast.unparse(node)
            inspect.signature(called).bind(*node.args, **keywords)
    assert calls


@pytest.mark.parametrize("page", ["docs/layers.md", "docs/releasing.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(page):
        if not re.search("measure_times|export", code):  # the one takes a minute, and the other is tested elsewhere
            exec(compile(code, page, "exec"), names)
    assert list(tmp_path.iterdir())
