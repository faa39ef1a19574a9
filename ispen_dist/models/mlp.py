"""Multi-layer perceptron from a feature row to label logits."""

from collections.abc import Mapping

from torch import Tensor, nn


class MLP(nn.Module):
    """Feed-forward network with softplus hidden layers, smooth so that curvature exists.

    Args:
        num_features: D.
        num_labels: L.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers.
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
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(feature_dropout)]
        width = num_features
        for _ in range(num_layers):
            layers += [nn.Linear(width, hidden_size), nn.Softplus(), nn.Dropout(dropout)]
            width = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_labels))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, L) of `inputs["features"]` (B, D)."""
        return self.layers(inputs["features"])
