"""The root of all settings, and the checks that span sections."""

from dataclasses import dataclass, field

from ispen_dist.config.checks import check
from ispen_dist.config.compile import CompileConfig
from ispen_dist.config.data import DataConfig, FeatureConfig
from ispen_dist.config.networks import EnergyConfig, NetworkConfig
from ispen_dist.config.problems import InnerConfig, OuterConfig
from ispen_dist.config.profile import ProfileConfig
from ispen_dist.config.solver import SolverConfig
from ispen_dist.config.train import TrainConfig


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    """Where the examples are and how to read them."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Hashed token features."""
    inference_net: NetworkConfig = field(default_factory=NetworkConfig)
    """The network A_theta that predicts."""
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    """The network E_phi that scores."""
    inner: InnerConfig = field(default_factory=InnerConfig)
    """The inner problem."""
    outer: OuterConfig = field(default_factory=OuterConfig)
    """The outer problem."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """The linear solve between them."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """Compiled functions and kernels."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, seed, records."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of where time and memory go."""

    def __post_init__(self) -> None:
        tagging = self.data.task == "tagging"
        networks = ("bilstm", "transformer") if tagging else ("mlp",)
        energy = "linear_chain" if tagging else "label_interaction"
        where = f"for data.task={self.data.task}"
        inner = self.compile.inner
        for setting, network in (
            ("inference_net", self.inference_net),
            ("energy.features", self.energy.features),
        ):
            network.check(setting)
            check(
                network.name in networks,
                f"{setting}.name",
                f"one of {', '.join(networks)} {where}",
                network.name,
            )
        if self.compile.any:
            for setting, network in (
                ("inference_net", self.inference_net),
                ("energy.features", self.energy.features),
            ):
                check(
                    network.name != "bilstm" or (setting != "inference_net" and not inner),
                    f"{setting}.name",
                    "a network whose shapes do not depend on values, with compile."
                    f"{'inner' if inner else 'curvature'}",
                    network.name,
                    "use transformer, or set compile.inner=false and compile.curvature=false",
                )
        check(self.energy.name == energy, "energy.name", f"{energy} {where}", self.energy.name)
        if self.train.method == "implicit":
            check(
                self.outer.objective not in ("cd", "nce") or self.outer.task_weight > 0.0,
                "outer.task_weight",
                f"a number above 0 for outer.objective={self.outer.objective} "
                "with train.method=implicit",
                self.outer.task_weight,
                "cd and nce hold theta constant, so without the task cost there is no implicit "
                "part; set outer.task_weight or train.method=explicit",
            )
            check(
                self.inner.energy_weight > 0.0,
                "inner.energy_weight",
                "a number above 0 with train.method=implicit",
                self.inner.energy_weight,
                "with lambda = 0 theta does not depend on the energy",
            )
