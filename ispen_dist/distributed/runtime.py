"""How a run was launched: the engine that Accelerate's configuration file asks for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ispen_dist.config import Config, ConfigError


@dataclass(frozen=True)
class Runtime:
    """What shards the networks, and in which precision first-order steps run.

    Attributes:
        name: `replicas` (one process, or DDP-like ranks), `zero1`, `zero2`, `zero3` or `fsdp2`.
        precision: `no` or `bf16`.
    """

    name: str
    precision: str = "no"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed is the engine."""
        return self.name.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        """Whether a rank holds only a part of the parameters."""
        return self.name in ("zero3", "fsdp2")

    @property
    def low_precision(self) -> torch.dtype | None:
        """Type of first-order matrix products where it is not that of the parameters."""
        return torch.bfloat16 if self.precision == "bf16" else None


def runtime_from(environment: Mapping[str, str] = os.environ) -> Runtime:
    """Read what `accelerate launch` left in the environment.

    Raises:
        ConfigError: for an engine or a precision that is not supported, naming the setting.
    """

    def asks_for(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes")

    for flag, setting in _UNSUPPORTED.items():
        if asks_for(flag):
            raise ConfigError(
                f"{setting}: expected NO, MULTI_CPU, MULTI_GPU, DEEPSPEED or FSDP, got an engine "
                "whose second derivatives are not supported; use a file of configs/runtime/"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed_precision: expected no or bf16, got {precision}, which needs loss scaling; "
            "set mixed_precision: bf16 in the file of accelerate launch"
        )
    if asks_for("ACCELERATE_USE_DEEPSPEED"):
        return Runtime(f"zero{_zero_stage(environment)}", precision)
    if asks_for("ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ConfigError(
                f"fsdp_version: expected 2, got {version}, whose flat parameters have no second "
                "derivative; set fsdp_version: 2 as in configs/runtime/fsdp2.yaml"
            )
        return Runtime("fsdp2", precision)
    return Runtime("replicas", precision)


_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type: MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use_parallelism_config",
}


def _zero_stage(environment: Mapping[str, str]) -> int:
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ConfigError(
            "deepspeed_config_file: expected none, since both networks get an engine of their own; "
            "give zero_stage and offload devices in the file of accelerate launch"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ConfigError(
            f"deepspeed_config.zero_stage: expected 1, 2 or 3, got {stage}; without sharding use "
            "configs/runtime/ddp.yaml"
        )
    return int(stage)


def check_runtime(config: Config, runtime: Runtime) -> None:
    """Refuse settings that the runtime cannot keep.

    Raises:
        ConfigError: float64 under DeepSpeed or with bf16 first-order steps; a compiled inner step
            where an engine of its own takes the step.
    """
    if config.compile.inner and (runtime.name != "replicas" or runtime.low_precision):
        raise ConfigError(
            f"compile.inner: expected false under {runtime.name} with mixed_precision="
            f"{runtime.precision}, got true; the step is the engine's there, and compile.curvature "
            "works; or use configs/runtime/single.yaml or ddp.yaml without bf16"
        )
    if config.train.dtype == "float64" and (runtime.uses_deepspeed or runtime.low_precision):
        raise ConfigError(
            f"train.dtype: expected float32 under {runtime.name} with mixed_precision="
            f"{runtime.precision}, got float64; DeepSpeed keeps its optimizer in float32 and bf16 "
            "rounds more; use configs/runtime/ddp.yaml or fsdp2.yaml without bf16 for float64"
        )
