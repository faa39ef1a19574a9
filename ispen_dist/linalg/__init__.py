"""Trees, curvature operators and linear solvers. No collectives, no models."""
