"""The direction of imports, and where distribution may be named."""

import ast
import importlib.util
import sys
import tomllib
from pathlib import Path

import problems
import pytest

from ispen_dist.models.registry import ENERGIES, NETWORKS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ispen_dist"
LAYERS = [
    ["config", "exits", "linalg", "ranges", "stopping", "watchdog"],
    ["graphs"],
    ["ops"],
    ["data", "command_line"],
    ["models"],
    ["objectives"],
    ["implicit"],
    [
        "engine",
        "replicas",
        "players",
        "optim",
        "seeding",
        "views",
        "metrics",
        "manifest",
        "decisions",
        "schedule",
        "write_failures",
    ],
    ["pruning"],
    ["checkpoint"],
    ["saver"],
    ["inference"],
    ["losses"],
    ["evaluate", "inner", "not_finite", "outer"],
    ["average", "diagnosis", "inner_graphs", "inner_program", "selection"],
    ["run_state"],
    ["plan", "predictor", "prediction_files", "distributed"],
    ["source"],
    ["recording"],
    ["rounds"],
    ["trainer"],
    ["tables"],
]
DISTRIBUTED_WORDS = {"accelerate", "deepspeed", "torch.distributed"}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


LEVEL = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    unit = unit_of(path)
    assert unit in LEVEL, f"{unit}: name its layer in {Path(__file__).name}"
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "ispen_dist" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != unit:
            assert LEVEL[parts[1]] <= LEVEL[unit], f"{path.name} imports {name} from above"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_distribution_lives_in_one_folder(path):
    if unit_of(path) == "distributed":
        return
    for name in imported_names(path):
        assert not any(name == word or name.startswith(word + ".") for word in DISTRIBUTED_WORDS), (
            f"{path.name} imports {name}; only ispen_dist/distributed may"
        )


def test_linalg_knows_no_models_and_no_collectives():
    for path in (PACKAGE / "linalg").glob("*.py"):
        ours = {n for n in imported_names(path) if n.startswith("ispen_dist")}
        assert all(n.startswith("ispen_dist.linalg") for n in ours), path.name


def test_the_import_name_kernels_is_not_ours():
    """transformers probes a package of that name; see fact 8 of the design."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(str(spec.origin)).parents


def test_the_package_list_is_complete():
    """Listed by hand, since a folder is installed under another name."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    folders = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in PACKAGE.rglob("*/*.py")}
    assert set(setuptools["packages"]) == folders | {"ispen_dist", "ispen_kernels"}
    assert setuptools["package-dir"] == {"ispen_kernels": "kernels"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = {"torch", "triton", "ispen_kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported_names(path)} <= allowed


def test_every_network_and_energy_has_a_tiny_problem():
    configs = [problems.config_of(task) for task in problems.TASKS]
    configs += [problems.tagging_config(energy=energy) for energy in problems.TAGGING_ENERGIES]
    assert {config.inference_net.name for config in configs} == NETWORKS.keys()
    assert {config.energy.name for config in configs} == ENERGIES.keys()
