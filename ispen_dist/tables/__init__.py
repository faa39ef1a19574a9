"""Tables of methods on a task: tuned on dev with equal budgets, read once on test, compared."""
