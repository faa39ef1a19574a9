"""The root of all settings, and the checks that span sections."""

from dataclasses import dataclass, field

from ispen_dist.config.checks import check
from ispen_dist.config.compile import CompileConfig
from ispen_dist.config.data import DataConfig, FeatureConfig
from ispen_dist.config.inference import CHOICES, UNTUNED, InferenceConfig
from ispen_dist.config.networks import EnergyConfig, NetworkConfig
from ispen_dist.config.problems import WITHOUT_THETA, InnerConfig, OuterConfig
from ispen_dist.config.profile import ProfileConfig
from ispen_dist.config.solver import SolverConfig
from ispen_dist.config.train import TrainConfig

FITTING = {
    "tagging": (
        ("bilstm", "transformer", "token_mlp", "pretrained"),
        ("linear_chain", "skip_chain", "high_order", "tag_language_model"),
    ),
    "multilabel": (("mlp",), ("label_interaction",)),
    "segmentation": (("fcn", "efficientnet_lite0"), ("convolutional",)),
}
"""The networks and the energies that fit a task."""
_SHAPES_DEPEND_ON_VALUES = ("bilstm", "pretrained")
"""Networks that cannot be compiled."""


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
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How a structure is predicted."""
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
        self._check_networks()
        self._check_pretrained()
        if self.compile.any:
            self._check_compiled()
        if self.train.method == "implicit":
            self._check_implicit()
        if not self.inference.by_network:
            self._check_by_stander()
        check(
            self.inference.name != "mean_field" or self.train.method != "mle",
            "inference.name",
            "network for train.method=mle",
            self.inference.name,
            "no energy is learned that could correct the network",
        )
        self._check_objective()
        if self.data.task != "segmentation":
            self._check_no_views()
        if self.data.task != "multilabel":
            self._check_no_labels()
        if self.data.train_on_dev:
            self._check_final_fit()
        check(
            self.train.order == "alternate" or self.train.method == "explicit",
            "train.order",
            f"alternate for train.method={self.train.method}",
            self.train.order,
            "the implicit part needs a network trained on the energy; set train.method=explicit",
        )

    def _networks(self) -> tuple[tuple[str, NetworkConfig], ...]:
        return ("inference_net", self.inference_net), ("energy.features", self.energy.features)

    def _check_networks(self) -> None:
        networks, energies = FITTING[self.data.task]
        where = f"for data.task={self.data.task}"
        for setting, network in self._networks():
            network.check(setting)
            expected = f"one of {', '.join(networks)} {where}"
            check(network.name in networks, f"{setting}.name", expected, network.name)
        expected = f"one of {', '.join(energies)} {where}"
        check(self.energy.name in energies, "energy.name", expected, self.energy.name)

    def _check_pretrained(self) -> None:
        networks = (self.inference_net, self.energy.features)
        models = sorted({n.model for n in networks if n.name == "pretrained"})
        check(
            len(models) < 2,
            "energy.features.model",
            f"that of inference_net.model={self.inference_net.model}",
            self.energy.features.model,
            "both read the same sub-words",
        )
        check(
            not models or self.data.format != "npz",
            "data.format",
            "words for a pretrained encoder",
            self.data.format,
            "choose another network, or data of words",
        )

    def _check_compiled(self) -> None:
        inner = self.compile.inner
        for setting, network in self._networks():
            check(
                network.name not in _SHAPES_DEPEND_ON_VALUES
                or (setting != "inference_net" and not inner),
                f"{setting}.name",
                "a network whose shapes do not depend on values, with compile."
                f"{'inner' if inner else 'curvature'}",
                network.name,
                "use transformer, or set compile.inner=false and compile.curvature=false",
            )

    def _check_implicit(self) -> None:
        objective = self.outer.objective
        check(
            objective not in WITHOUT_THETA or self.outer.task_weight > 0.0,
            "outer.task_weight",
            f"a number above 0 for outer.objective={objective} with train.method=implicit",
            self.outer.task_weight,
            f"{objective} holds theta constant, so without the task cost there is no implicit "
            "part; set outer.task_weight or train.method=explicit",
        )
        check(
            self.inner.energy_weight > 0.0,
            "inner.energy_weight",
            "a number above 0 with train.method=implicit",
            self.inner.energy_weight,
            "with lambda = 0 theta does not depend on the energy",
        )

    def _check_by_stander(self) -> None:
        """Check what a network that takes no part after the warm-up rules out."""
        where = f"for inference.name={self.inference.name}"
        hint = "the inference network is a by-stander there; or set inference.name=network"
        for setting, expected, value in (
            ("train.method", "explicit", self.train.method),
            ("train.order", "alternate", self.train.order),
            ("train.fine_tune", 0.0, self.train.fine_tune),
            ("compile.curvature", False, self.compile.curvature),
        ):
            shown = str(expected).lower()
            check(value == expected, setting, f"{shown} {where}", value, hint)

    def _check_final_fit(self) -> None:
        """Check that nothing is left to be chosen on dev."""
        where = "with data.train_on_dev"
        patience = self.train.patience
        hint = "no metric of dev says when to stop"
        check(patience == 0, "train.patience", f"0 {where}", patience, hint)
        if self.data.task == "multilabel":
            for name, untuned in UNTUNED.items():
                value, named = getattr(self.inference, name), name in self.inference.choices
                hint = f"take the one that was tuned without it, or {untuned:g}"
                check(named, f"inference.{name}", f"a {name} {where}", value, hint)

    def _check_no_labels(self) -> None:
        where = f"for data.task={self.data.task}"
        for name in ("decoder", *CHOICES):
            value, expected = getattr(self.inference, name), getattr(InferenceConfig, name)
            hint = f"only labels have a {name}"
            check(value == expected, f"inference.{name}", f"{expected} {where}", value, hint)

    def _check_no_views(self) -> None:
        where = f"for data.task={self.data.task}"
        shifts, mirrored = self.inference.view_shifts, self.inference.view_mirrored
        hint = "only images have views"
        check(shifts == [0], "inference.view_shifts", f"[0] {where}", shifts, hint)
        check(not mirrored, "inference.view_mirrored", f"false {where}", mirrored, hint)

    def _check_objective(self) -> None:
        """Check that the outer loss has the data, energy and structures that it reads."""
        objective, inference = self.outer.objective, self.inference
        check(
            self.outer.entity_weight == 1.0 or self.data.spans == "bio",
            "outer.entity_weight",
            f"1 for data.spans={self.data.spans}",
            self.outer.entity_weight,
            "only tags that spell entities know which tokens are of one; set data.spans=bio",
        )
        if objective == "crf" or inference.name == "viterbi":
            setting = "outer.objective" if objective == "crf" else "inference.name"
            check(
                self.energy.name == "linear_chain",
                "energy.name",
                f"linear_chain for {setting}={objective if objective == 'crf' else 'viterbi'}",
                self.energy.name,
                f"only a chain is solved exactly; change {setting}",
            )
        if inference.cost_augmented:
            margins = ("ssvm", "ssvm_plus") if inference.by_network else ("ssvm",)
            check(
                objective in margins,
                "outer.objective",
                f"{' or '.join(margins)} for inference.name={inference.name} with "
                "inference.cost_augmented=true",
                objective,
                "other losses read no cost-augmented structure; set inference.cost_augmented=false",
            )
            check(
                inference.by_network or self.outer.task_weight == 0.0,
                "outer.task_weight",
                f"0 for inference.name={inference.name} with inference.cost_augmented=true",
                self.outer.task_weight,
                "the outer loss sees the cost-augmented structure alone",
            )
        check(
            objective != "ssvm_plus" or inference.cost_augmented,
            "inference.cost_augmented",
            "true for outer.objective=ssvm_plus",
            inference.cost_augmented,
            "it reads a cost-augmented structure beside the predicted one; or use ssvm",
        )

    @property
    def encoder_model(self) -> str:
        """The pretrained encoder of either network, empty where there is none."""
        return self.inference_net.model or self.energy.features.model
