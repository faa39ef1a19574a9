"""Every setting of a run: one frozen section per module, and the root that holds them.

Defaults < YAML file < command line. A section checks its own fields when it is built; the root
checks what spans sections. Every message names the field to change.
"""

from ispen_dist.config.checks import ConfigError
from ispen_dist.config.compile import CompileConfig
from ispen_dist.config.data import DataConfig, FeatureConfig
from ispen_dist.config.inference import InferenceConfig
from ispen_dist.config.networks import EnergyConfig, NetworkConfig
from ispen_dist.config.problems import InnerConfig, OptimizerConfig, OuterConfig
from ispen_dist.config.profile import ProfileConfig
from ispen_dist.config.root import Config
from ispen_dist.config.solver import SolverConfig
from ispen_dist.config.train import TrainConfig

__all__ = [
    "CompileConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EnergyConfig",
    "FeatureConfig",
    "InferenceConfig",
    "InnerConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "OuterConfig",
    "ProfileConfig",
    "SolverConfig",
    "TrainConfig",
]
