"""The shape of the repository: which way imports go, what is documented, and what is not there."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.config import field_names, register_schemas

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "client", "server", "simulations")
FORBIDDEN = {
    "common": {"client", "server", "simulations", "benchmarks", "tests"},
    "client": {"server", "simulations", "benchmarks", "tests"},
    "server": {"client", "simulations", "benchmarks", "tests"},
    "simulations": {"benchmarks", "tests"},
}
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
CONF = ROOT / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
GROUPS = [path for path in YAMLS if path.parent != CONF and path not in EXPERIMENTS]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home)/")


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """First part of every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            yield node.module.split(".")[0]


def repository_files():
    """What git tracks or would track, tests apart."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.startswith("tests/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_there_is_something_to_look_at():
    assert len(MODULES) >= 30
    assert len(YAMLS) >= 11
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path):
    """simulations -> {server, client} -> common; what a site runs cannot reach the coordinator."""
    package = path.relative_to(ROOT).parts[0]
    assert FORBIDDEN[package].isdisjoint(imported(path))


def public_definitions(node, prefix=""):
    """Every module, class and function whose name, and that of what holds it, is public."""
    yield prefix or "the module", node
    for child in node.body:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(child, kinds) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}".lstrip(".")
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, name)
            else:
                yield name, child


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    assert bare == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_those_of_this_checkout(package):
    """Names like `common` are common: another installed package could stand in front."""
    assert Path(importlib.import_module(package).__file__) == ROOT / package / "__init__.py"


@pytest.mark.parametrize("path", GROUPS, ids=name_of)
def test_every_group_file_composes_and_its_values_arrive(path):
    """A file no job can reach, or a key no schema knows, is dead weight that looks alive."""
    register_schemas()
    group = path.parent.name
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("simulate", [f"{group}={path.stem}"])
    text = path.read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert written
    groups = written if text.startswith("# @package _global_") else {group: written}
    for group, key, value in (
        (g, *each) for g, values in groups.items() for each in values.items()
    ):
        assert f"{group}.{key}" in set(field_names())
        if value == "???":
            assert OmegaConf.is_missing(composed[group], key)
            continue
        arrived = OmegaConf.to_container(composed[group])[key]
        if isinstance(arrived, list):
            arrived = [getattr(each, "name", each) for each in arrived]
        # YAML 1.1 reads 1e-4 as text; OmegaConf reads it as a number.
        assert getattr(arrived, "name", arrived) == (
            float(value) if isinstance(arrived, float) else value
        )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_experiment_composes_and_its_choices_and_values_arrive(path):
    """An experiment is chosen beside the main job's groups: `+experiment=NAME`."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("simulate", [f"+experiment={path.stem}"], return_hydra_config=True)
    assert path.read_text(encoding="utf-8").startswith("# @package _global_")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    choices = composed.hydra.runtime.choices
    for entry in values.pop("defaults"):
        ((group, name),) = entry.items()
        assert choices[group.removeprefix("override /")] == name
    sweep = values.pop("hydra", None)
    if sweep is not None:
        assert composed.hydra.mode.name == sweep["mode"] == "MULTIRUN"
        arrived = OmegaConf.to_container(composed.hydra.sweeper.params)
        assert arrived == sweep["sweeper"]["params"]
        assert {*arrived} <= set(field_names())
    for group, settings in values.items():
        arrived = OmegaConf.to_container(composed[group])
        assert {key: arrived[key] for key in settings} == settings


def test_every_default_of_the_main_job_is_a_file():
    defaults = yaml.safe_load((CONF / "simulate.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {
        group: name
        for entry in defaults
        if isinstance(entry, dict)
        for group, name in entry.items()
    }
    ours = {group: name for group, name in chosen.items() if not group.startswith("override ")}
    assert set(ours) == {path.parent.name for path in GROUPS}
    assert all((CONF / group / f"{name}.yaml").is_file() for group, name in ours.items())


def test_no_file_names_a_path_of_one_machine():
    files = repository_files()
    assert len(files) >= 50
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{name_of(path)}:{n}" for n, line in lines if MACHINE_PATH.search(line)]
    assert found == []


def test_pattern_of_a_machine_path_finds_one():
    slash = "/"
    assert MACHINE_PATH.search(f"cd {slash}work/main")
    assert MACHINE_PATH.search(f'"{slash}tmp/x"')
    assert not MACHINE_PATH.search(f"https://example.org{slash}work/main")


def test_no_tracked_file_is_empty():
    """An empty file is something a tool left behind."""
    assert [name_of(path) for path in repository_files() if path.stat().st_size == 0] == []
