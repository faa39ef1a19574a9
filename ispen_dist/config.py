"""Every setting of a run: one frozen section per module, and the root that holds them.

Defaults < YAML file < command line. A section checks its own fields when it is built; the root
checks what spans sections. Every message names the field to change.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and says what to do."""


def _check(holds: bool, setting: str, expected: str, got: object, do: str = "") -> None:
    if not holds:
        hint = f"; {do}" if do else ""
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}{hint}")


def _check_ranges(section: str, values: object, **limits: tuple[float, float]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(values, name)
        span = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
        _check(abs(value) < math.inf, f"{section}.{name}", "a finite number", value)
        _check(low <= value <= high, f"{section}.{name}", span, value)


_ANY = math.inf


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how to read them."""

    task: Literal["tagging", "multilabel"] = "tagging"
    """Kind of structure: tag sequences or label sets."""
    format: Literal["conll", "conllu", "arff", "svmlight", "npz"] = "conll"
    """File format of all splits."""
    root: str = ""
    """Folder of relative paths. Empty: the environment variable ISPEN_DATA, else ../shared/data.
    `package:NAME` is a data set embedded in the installed package."""
    train: list[str] = field(default_factory=list)
    """Training files, in order. With `split_file`, all files, whose rows are counted through."""
    dev: str = ""
    """Development file. Empty: from `split_file`, or held out of train by `dev_fraction`."""
    test: str = ""
    """Test file. Empty: from `split_file`, or none."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further test sets by name, for evaluate.py --split NAME."""
    split_file: str = ""
    """JSON of zero-based row numbers under train, dev and test."""
    dev_fraction: float = 0.2
    """Share of train that becomes dev where neither a dev file nor a split file is given."""
    dev_seed: int = 0
    """Seed of that split."""
    token_column: int = 0
    """CoNLL: zero-based column of the token."""
    tag_column: int = 1
    """CoNLL: zero-based column of the tag."""
    tag: Literal["upos", "xpos"] = "upos"
    """CoNLL-U: which column is predicted."""
    labels_xml: str = ""
    """ARFF: Mulan XML file that names the labels."""
    num_features: int = 0
    """svmlight: number of features."""
    num_labels: int = 0
    """svmlight: number of labels."""
    zero_based: bool = True
    """svmlight: whether feature indices start at zero."""

    def __post_init__(self) -> None:
        _check(bool(self.train), "data.train", "at least one file", self.train, "name a file")
        _check_ranges(
            "data", self, dev_fraction=(0.0, 0.9), token_column=(0, _ANY), tag_column=(0, _ANY)
        )
        if not self.dev and not self.split_file:
            _check(
                self.dev_fraction > 0.0,
                "data.dev_fraction",
                "a number above 0 without data.dev and data.split_file",
                self.dev_fraction,
                "a dev set selects the model",
            )
        formats = {"tagging": ("conll", "conllu"), "multilabel": ("arff", "svmlight", "npz")}
        _check(
            self.format in formats[self.task],
            "data.format",
            f"one of {', '.join(formats[self.task])} for data.task={self.task}",
            self.format,
            "change data.format or data.task",
        )
        if self.format == "arff":
            _check(
                bool(self.labels_xml),
                "data.labels_xml",
                "the Mulan XML file of the ARFF labels",
                "",
            )
        if self.format == "svmlight":
            _check_ranges("data", self, num_features=(1, _ANY), num_labels=(1, _ANY))


@dataclass(frozen=True)
class FeatureConfig:
    """Hashed token features; tagging only."""

    num_buckets: int = 16384
    """Rows of the embedding table; bucket 0 is padding."""
    max_affix: int = 4
    """Longest prefix and suffix, in characters."""

    def __post_init__(self) -> None:
        _check_ranges("features", self, num_buckets=(2, _ANY), max_affix=(1, 16))


@dataclass(frozen=True)
class NetworkConfig:
    """A network from inputs to logits: the inference network, or the features of an energy."""

    name: Literal["mlp", "bilstm", "transformer"] = "bilstm"
    """Architecture."""
    hidden_size: int = 128
    """Width of hidden layers; per direction in a BiLSTM."""
    num_layers: int = 1
    """Hidden layers, LSTM layers or transformer blocks."""
    activation: Literal["relu", "gelu", "softplus", "tanh"] = "relu"
    """Hidden activation; mlp only."""
    num_heads: int = 4
    """Attention heads; transformer only."""
    embedding_size: int = 64
    """Width of token embeddings; taggers only."""
    dropout: float = 0.0
    """Dropout rate of hidden units."""
    feature_dropout: float = 0.0
    """Dropout rate of whole input features."""

    def check(self, section: str) -> None:
        """Check the settings; `section` is the name they have in messages."""
        _check_ranges(
            section,
            self,
            hidden_size=(1, _ANY),
            num_layers=(1, _ANY),
            num_heads=(1, _ANY),
            embedding_size=(1, _ANY),
            dropout=(0.0, 0.99),
            feature_dropout=(0.0, 0.99),
        )
        if self.name == "transformer":
            _check(
                self.hidden_size % self.num_heads == 0,
                f"{section}.num_heads",
                f"a divisor of {section}.hidden_size={self.hidden_size}",
                self.num_heads,
            )


@dataclass(frozen=True)
class EnergyConfig:
    """The energy network."""

    name: Literal["label_interaction", "linear_chain"] = "linear_chain"
    """Architecture."""
    features: NetworkConfig = field(default_factory=NetworkConfig)
    """Network of the local potentials."""
    num_units: int = 16
    """Interaction units (rows of M); label_interaction only."""
    freeze_local: bool = False
    """Keep the local potentials as pre-trained; only biases and interactions are learned."""

    def __post_init__(self) -> None:
        _check_ranges("energy", self, num_units=(1, _ANY))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    final_fraction: float = 1.0
    """Learning rate at the end as a share of the peak; 1 keeps it constant."""
    clip_norm: float = 5.0
    """Limit on the gradient's norm; 0 switches clipping off."""

    def check(self, section: str) -> None:
        """Check the settings; `section` is the name they have in messages."""
        _check_ranges(
            section,
            self,
            learning_rate=(0.0, _ANY),
            weight_decay=(0.0, _ANY),
            warmup_steps=(0, _ANY),
            final_fraction=(0.0, 1.0),
            clip_norm=(0.0, _ANY),
        )


@dataclass(frozen=True)
class InnerConfig:
    """The inner problem: the inference network on L_MLE + lambda E."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of theta."""
    batch_size: int = 32
    """Examples in a global batch, over all ranks."""
    steps: int = 10
    """Inner steps per outer step."""
    energy_weight: float = 0.1
    """lambda, the weight of the energy in the inner loss."""
    pretrain_learning_rate: float = 1e-3
    """Learning rate at which the local energy is pre-trained on L_MLE in the warm-up rounds; 0
    leaves it at its initial values."""

    def __post_init__(self) -> None:
        self.optimizer.check("inner.optimizer")
        _check_ranges(
            "inner",
            self,
            batch_size=(1, _ANY),
            steps=(1, _ANY),
            energy_weight=(0.0, _ANY),
            pretrain_learning_rate=(0.0, _ANY),
        )


@dataclass(frozen=True)
class SolverConfig:
    """The inverse-Hessian-vector product."""

    name: Literal["cg", "cg_single_reduction", "neumann", "identity"] = "cg"
    """Solver; cg_single_reduction is cg with half the all-reduces, for many ranks."""
    max_steps: int = 10
    """Products per solve."""
    rtol: float = 1e-3
    """Relative residual at which a solve stops; cg and neumann."""
    scale: float = 10.0
    """Divisor of the Neumann series or of the identity."""
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    """Exact Hessian, or its Gauss-Newton part."""
    damping: float = 0.3
    """Added to the diagonal of the curvature."""
    memory: Literal["auto", "graph", "states", "recompute"] = "auto"
    """What a solve keeps between its products: the graph of the whole gradient (fastest, needs all
    parameters on every rank), the states at stage boundaries, or nothing, everything being computed
    again for every product. auto is graph, and states where parameters are sharded."""
    prefetch: bool = True
    """Gather the parameters of the next stage while one is computed: hides communication, holds
    two stages in memory; sharded parameters only."""
    warm_start: bool = True
    """Start from the solution of the previous outer step."""
    on_failure: Literal["skip", "damp", "stop"] = "skip"
    """On negative curvature, divergence or NaN: leave the implicit part out of this step, repeat
    with larger damping, or stop the run."""
    damping_factor: float = 4.0
    """Factor of each repeat under `damp`; the raised damping falls back by its square root after
    every successful solve."""
    max_repeats: int = 5
    """Repeats under `damp` before the implicit part is left out."""

    def __post_init__(self) -> None:
        _check_ranges(
            "solver",
            self,
            max_steps=(1, _ANY),
            rtol=(0.0, 0.999),
            scale=(1e-30, _ANY),
            damping=(0.0, _ANY),
            damping_factor=(1.001, _ANY),
            max_repeats=(0, _ANY),
        )
        if self.on_failure == "damp":
            _check(
                self.damping > 0.0,
                "solver.damping",
                "a number above 0 for solver.on_failure=damp",
                self.damping,
            )


@dataclass(frozen=True)
class CompileConfig:
    """Compiled functions and kernels: the same numbers, faster."""

    inner: bool = False
    """Compile the inner step: forward, energy, backward and optimizer. Not for a bilstm, whose
    shapes depend on lengths, nor under DeepSpeed and FSDP2."""
    whole_round: bool = False
    """With compile.inner, make all inner steps of a round one function that does not return to
    Python in between; compiling it takes longer, the more blocks and steps the longer."""
    curvature: bool = False
    """Compile the curvature, split by what is known when: what depends on the solve point alone is
    computed once per solve. Not for a bilstm."""
    backend: Literal["inductor", "trace"] = "inductor"
    """inductor generates code; trace runs the traced graphs operation by operation, without waiting
    for code, to look for errors."""
    kernels: Literal["auto", "reference", "always"] = "auto"
    """Hand-written kernels: where they are the better choice, nowhere, or wherever they can run
    (also in Triton's interpreter on a CPU, which is slow)."""
    buckets: list[int] = field(default_factory=list)
    """Numbers of tokens to which batches of sequences are padded, increasing, so that there are few
    shapes to compile; longer batches are padded to multiples of the last. Empty: powers of two from
    8 where something is compiled, and no padding otherwise."""

    def __post_init__(self) -> None:
        _check(
            all(a < b for a, b in itertools.pairwise([0, *self.buckets])),
            "compile.buckets",
            "increasing positive numbers",
            self.buckets,
        )

    @property
    def any(self) -> bool:
        """Whether something is compiled."""
        return self.inner or self.curvature


@dataclass(frozen=True)
class OuterConfig:
    """The outer problem: the energy, on the loss of the network trained on it."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    """Of phi. Keep it 10 to 100 times slower than the inner one."""
    batch_size: int = 128
    """Examples in a global batch of the outer loss, and of the inner loss in the solve."""
    objective: Literal["ssvm", "dvn", "cd", "nce", "task"] = "task"
    """Outer loss."""
    task_weight: float = 0.0
    """Weight of the task cost added to the objective."""
    margin_scale: float = 1.0
    """Scale of the cost inside ssvm and cd."""
    num_samples: int = 16
    """Samples per example in cd and nce."""
    dropout: bool = True
    """Evaluate the outer loss under the dropout masks of training, frozen during the solve. On
    training data the network without dropout is close to perfect and its cost says little."""
    held_out_fraction: float = 0.0
    """Share of train kept from the inner problem for the outer loss; 0 uses the training data."""

    def __post_init__(self) -> None:
        self.optimizer.check("outer.optimizer")
        _check_ranges(
            "outer",
            self,
            batch_size=(1, _ANY),
            task_weight=(0.0, _ANY),
            margin_scale=(0.0, _ANY),
            num_samples=(1, _ANY),
            held_out_fraction=(0.0, 0.9),
        )


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its seed, and what happens on the way.

    A round is `inner.steps` inner steps and one outer step; warm-up rounds have no outer step.
    """

    method: Literal["implicit", "explicit", "mle"] = "implicit"
    """Energy learned with the implicit gradient, with its explicit part only, or not at all
    (the inference network on L_MLE alone, for the same number of inner steps)."""
    warmup_rounds: int = 30
    """Rounds on L_MLE alone before the first outer step; the local energy is pre-trained on the
    same batches."""
    max_outer_steps: int = 100
    """Outer steps, one per round after the warm-up."""
    seed: int = 0
    """Seed of initial values, data order, dropout and samples."""
    eval_every: int = 10
    """Rounds between evaluations on dev; the last round is always evaluated."""
    patience: int = 0
    """Evaluations without a better dev metric before the run stops; 0 never stops early."""
    checkpoint_every: int = 50
    """Rounds between checkpoints; the last round always leaves one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the first checkpoint that holds the networks that did best on dev; best.json beside
    it names it."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint or a record cannot be written: stop the run with exit code 5, so that no
    time goes into what may never be kept, or warn, continue and try again at the next save. A run
    that ends with something unwritten has exit code 5 as well. The last good checkpoint stays."""
    log_every: int = 1
    """Rounds between rows of metrics.jsonl."""
    on_not_finite: Literal["skip", "back_off", "stop"] = "skip"
    """On NaN or infinity in the loss or gradient of a step. The step is always left out, on all
    ranks; then the run goes on, goes on with half the learning rates (doubled again after 10 rounds
    without), or stops with exit code 3."""
    max_not_finite: int = 10
    """Steps left out in a row, of one kind (inner, pretrain, outer), after which the run stops with
    exit code 3 in any case."""
    hang_timeout: float = 1800.0
    """Seconds without a finished step, batch of an evaluation, compiled function or save, after
    which a process writes the stacks of its threads and ends with exit code 4; whatever is done for
    the first time has 600 at least. 0 waits for ever."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and solver vectors."""
    num_threads: int = 0
    """CPU threads per process; 0 leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        _check_ranges(
            "train",
            self,
            warmup_rounds=(0, _ANY),
            max_outer_steps=(0, _ANY),
            eval_every=(1, _ANY),
            patience=(0, _ANY),
            checkpoint_every=(1, _ANY),
            keep_checkpoints=(1, _ANY),
            log_every=(1, _ANY),
            max_not_finite=(1, _ANY),
            hang_timeout=(0.0, _ANY),
            num_threads=(0, _ANY),
            seed=(0, 2**32 - 1),
        )


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
            _check(
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
                _check(
                    network.name != "bilstm" or (setting != "inference_net" and not inner),
                    f"{setting}.name",
                    "a network whose shapes do not depend on values, with compile."
                    f"{'inner' if inner else 'curvature'}",
                    network.name,
                    "use transformer, or set compile.inner=false and compile.curvature=false",
                )
        _check(self.energy.name == energy, "energy.name", f"{energy} {where}", self.energy.name)
        if self.train.method == "implicit":
            _check(
                self.outer.objective not in ("cd", "nce") or self.outer.task_weight > 0.0,
                "outer.task_weight",
                f"a number above 0 for outer.objective={self.outer.objective} "
                "with train.method=implicit",
                self.outer.task_weight,
                "cd and nce hold theta constant, so without the task cost there is no implicit "
                "part; set outer.task_weight or train.method=explicit",
            )
            _check(
                self.inner.energy_weight > 0.0,
                "inner.energy_weight",
                "a number above 0 with train.method=implicit",
                self.inner.energy_weight,
                "with lambda = 0 theta does not depend on the energy",
            )
