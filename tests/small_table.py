"""A table of three methods, for tests of tables that train nothing."""

TABLE = {
    "config": "task.yaml",
    "methods": ["mle", "nce_explicit", "nce_implicit"],
    "reference": "mle",
    "metric": "f1",
    "budget": 3,
    "seeds": 2,
    "search": {
        "inner.energy_weight": {"low": 0.1, "high": 10.0, "log": True},
        "inner.steps": [5, 10],
    },
    "search_of": {
        "mle": ["inner.steps"],
        "nce_explicit": ["inner.energy_weight"],
        "nce_implicit": ["inner.energy_weight"],
    },
}
