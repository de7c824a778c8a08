"""README and docs/ are true: code runs, commands compose, links lead on; the site builds."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torchrl.envs import RewardScaling

from prelar_trl.config import METHODS
from prelar_trl.envs import make_env, registry
from prelar_trl.modules.latent_actions import base
from prelar_trl.recipes.command_line import as_typed
from prelar_trl.recipes.entry import settings
from tests.toy_runs import make_clips

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
README = (ROOT / "README.md").read_text("utf-8")
ALL = {**TEXT, "README.md": README}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`((?:prelar-|python |make |torchrun )[^`]+)`")
API = "models objectives modules data envs record updates probes hub sweep".split()


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of lines above it."""
    return [
        (text.count("\n", 0, found.start(2)), found.group(2))
        for found in FENCE.finditer(text)
        if found.group(1) == language
    ]


def stores_and_an_environment() -> dict[str, Any]:
    """What data.md has its reader bring."""
    for name in ("metaworld", "mine"):
        make_clips(Path("videos", name), max_steps=24)
    policy, transform = None, RewardScaling(0.0, 1.0)
    return {"env": make_env("toy", max_steps=10), "policy": policy, "transform": transform}


BROUGHT = {"docs/data.md": stores_and_an_environment}


@pytest.mark.parametrize("page", [page for page in ALL if blocks(ALL[page], "python")])
def test_python_blocks_run_in_the_order_of_the_page(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, known in ((base, "_KINDS"), (registry, "SUITES")):  # as they were, afterwards
        monkeypatch.setattr(module, known, dict(getattr(module, known)))
    names = {"__name__": "page"} | BROUGHT.get(page, dict)()
    for line, block in blocks(ALL[page], "python"):
        code = compile("\n" * line + block, page, "exec")  # so that an error names its line
        exec(code, names)  # noqa: S102
        shown = capsys.readouterr().out
        assert shown or "print(" not in block


def test_every_block_says_what_it_is() -> None:
    for page, text in TEXT.items():
        languages = {found.group(1) for found in FENCE.finditer(text)}
        assert languages <= {"python", "bash", "text"}, page
        assert text.count("```") == 2 * len(FENCE.findall(text)), page


def commands() -> list[Any]:
    """Every command of a block, or in the text if it begins with a program of ours."""
    found = []
    for page, text in ALL.items():
        text = re.sub(r"\\\n *", "", text)  # a command of several lines
        lines = [line for _, block in blocks(text, "bash") for line in block.splitlines()]
        ours = re.compile(r"(prelar-|python recipes/|make )")
        plain = [line for _, block in blocks(text, "") for line in block.splitlines()]
        lines += [line for line in plain if ours.match(line)]
        spans = [span for span in SPAN.findall(FENCE.sub("", text)) if "=" in span]
        found += [pytest.param(line, id=f"{page}: {line}") for line in lines + spans if line]
    return found


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_the_program_takes(command: str) -> None:
    command = re.sub(r"<[^>]*>", "some", command).replace("=N", "=3")
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        words = ["python", *words[[word.startswith("recipes/") for word in words].index(True) :]]
    program, *rest = words
    if program == "make":
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program.startswith("prelar-"):
        check_recipe(program.removeprefix("prelar-").replace("-", "_"), rest)
    elif program == "python" and rest[0].startswith("recipes/"):
        check_recipe(Path(rest[0]).stem, rest[1:])
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1])
    elif program == "python":
        source = (ROOT / rest[0]).read_text("utf-8")
        flags = [word for word in rest[1:] if word.startswith("--")]
        assert all(f'"{flag}"' in source for flag in flags)
    else:
        raise AssertionError(f"{program}: no test knows this program")


def check_recipe(name: str, arguments: list[str]) -> None:
    """The arguments compose to a configuration; only ``...`` may stand for what is missing."""
    node = ConfigStore.instance().load(f"{name}_schema.yaml").node
    configs = ROOT / "configs"
    groups = [folder.name for folder in configs.iterdir() if folder.is_dir()]
    given = [word for word in arguments if word != "..." and not word.startswith("--")]
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose(name, as_typed(given, OmegaConf.get_type(node), groups))
    if given == arguments:
        settings(config)


def test_every_link_leads_to_a_file() -> None:
    for page, text in ALL.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_readme_names_every_recipe_and_method_and_no_other() -> None:
    named = set(re.findall(r"recipes/(\w+)\.py", README))
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert named == recipes | {"schema", "environments"}
    assert [method for method in METHODS if f"`{method}`" not in README] == []


class Page(HTMLParser):
    """What a page of the site shows and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ids, self.loads, self.links = path, set[str](), [], []
        self.tables = 0
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        self.tables += tag == "table"
        if tag in ("img", "script", "link"):
            self.loads += [x for name in ("src", "href") if (x := found.get(name))]
        if tag == "a" and (target := found.get("href")):
            self.links.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.relative_to(out).as_posix(): Page(path) for path in out.rglob("*.html")}


def test_every_page_is_on_the_site_with_its_tables(site: dict[str, Page]) -> None:
    for page, text in TEXT.items():
        tables = len(re.findall(r"^\|(?:---\|)+$", text, re.MULTILINE))
        assert site[page.removeprefix("docs/").replace(".md", ".html")].tables == tables, page


def test_the_site_loads_nothing_from_elsewhere(site: dict[str, Page]) -> None:
    for page in site.values():
        if page.path.name != "404.html":  # its paths begin with a slash
            for target in page.loads:
                assert page.path.parent.joinpath(target.partition("?")[0]).is_file(), target


def test_every_link_of_the_site_leads_to_a_place(site: dict[str, Page]) -> None:
    by_path = {page.path.resolve(): page for page in site.values()}
    for page in site.values():
        for target in page.links if page.path.name != "404.html" else []:
            file, _, anchor = target.partition("#")
            there = by_path[page.path.parent.joinpath(file).resolve() if file else page.path]
            assert not anchor or anchor in there.ids, f"{page.path.name}: {target}"


@pytest.mark.parametrize("name", API)
def test_every_public_name_is_explained(name: str, site: dict[str, Page]) -> None:
    module = importlib.import_module(f"prelar_trl.{name}")
    ids = site[f"api/{name}.html"].ids
    names = [x for x in module.__all__ if not inspect.ismodule(getattr(module, x))]
    if name == "objectives":
        names += [f"functional.{x}" for x in module.functional.__all__]
    assert not [x for x in names if f"{module.__name__}.{x}" not in ids]
