"""Multi-layer perceptron from a feature row to label logits."""

from collections.abc import Mapping

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
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
        layers: list[nn.Module] = [nn.Dropout(feature_dropout)]
        width = num_features
        for _ in range(num_layers):
            layers += [
                nn.Linear(width, hidden_size),
                ACTIVATIONS[activation](),
                nn.Dropout(dropout),
            ]
            width = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_labels))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, L) of `inputs["features"]` (B, D)."""
        return self.layers(inputs["features"])
