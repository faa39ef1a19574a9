"""Multi-layer perceptron from a feature row to label logits."""

from functools import partial

from torch import Tensor, nn

from ispen_dist.models.dropout import Dropout
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State
from ispen_dist.ops import constant_linear

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class InputLinear(nn.Linear):
    """A linear layer on data, which may be mostly zero, see `ops.constant_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D) to (B, H)."""
        return constant_linear(x, self.weight, self.bias)


class MLP(StagedNetwork):
    """Feed-forward network.

    With ReLU the second derivative of each hidden unit is zero almost everywhere, so the Hessian
    is that of the piecewise linear network; the other activations are smooth.

    Args:
        num_features: D.
        num_labels: L.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers.
        activation: a name in `ACTIVATIONS`.
        dropout: rate after each hidden layer.
        feature_dropout: rate on the input.
    """

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        *,
        hidden_size: int,
        num_layers: int = 1,
        activation: str = "relu",
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Dropout(feature_dropout)]
        first = InputLinear(num_features, hidden_size)
        for i in range(num_layers):
            linear = nn.Linear(hidden_size, hidden_size) if i else first
            layers += [linear, ACTIVATIONS[activation](), Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_size, num_labels))

    def parts(self) -> list[Part]:
        """Return one stage per linear layer, with what comes before the next one.

        The input is `inputs["features"]` (B, D), the output logits (B, L).
        """
        linear = [i for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear)]
        starts = [0, *linear[1:]]  # the first stage begins with the dropout of the input
        ends = [*linear[1:], len(self.layers)]
        return [
            Part(f"layers.{n}", partial(self._run, self.layers[i:j]), [self.layers[n]])
            for n, i, j in zip(linear, starts, ends, strict=True)
        ]

    def _run(self, layers: nn.Module, inputs: Inputs, *state: Tensor) -> State:
        return (layers(*state) if state else layers(inputs["features"]),)
