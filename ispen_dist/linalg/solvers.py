"""The table from a name in the configuration to a solver.

To add one: write it in a file of its own, add a row here, and add the name to the `Literal` in
`config/solver.py`. `outer.build_solver` fills its fields by their names.
"""

from ispen_dist.linalg.conjugate_gradients import CG, SingleReductionCG
from ispen_dist.linalg.neumann import Identity, Neumann
from ispen_dist.linalg.nystrom import Nystrom
from ispen_dist.linalg.preconditioned import PreconditionedCG
from ispen_dist.linalg.sama import Sama
from ispen_dist.linalg.solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    "cg": CG,
    "cg_single_reduction": SingleReductionCG,
    "pcg": PreconditionedCG,
    "neumann": Neumann,
    "nystrom": Nystrom,
    "identity": Identity,
    "sama": Sama,
}
