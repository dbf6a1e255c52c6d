"""The dual of constrained alignment: solver, feasibility, estimators, uncertainty, frontier and diagnostics.

NumPy and SciPy only.
"""

from can_dist.dual.basis import Mixture, mix, mixing_correlation
from can_dist.dual.belief.diagnosis import Diagnosis, diagnose
from can_dist.dual.belief.trust import Trust, judge
from can_dist.dual.belief.uncertainty import Bootstrap, CrossFit, bootstrap, cross_fit, lam_interval
from can_dist.dual.bound import Bound, lower_bound
from can_dist.dual.columns import Block, ColumnScores, Pass, PassResult, run_pass
from can_dist.dual.estimate import PolicyEstimate, estimate_policy
from can_dist.dual.estimators import ESTIMATORS
from can_dist.dual.feasibility import Feasibility, check_feasibility
from can_dist.dual.feedback import steer
from can_dist.dual.frame import source_column
from can_dist.dual.frontier import Frontier, FrontierPoint, frontier_table
from can_dist.dual.interval import Interval, mean_interval
from can_dist.dual.objective import Evaluation, PartialSums, dual_curve, evaluate, partial_sums
from can_dist.dual.predict import Prediction, predict
from can_dist.dual.solution import DualSolution, Margin, Status
from can_dist.dual.solve import solve_dual, solve_table
from can_dist.dual.strength import Demand, RayPoint, Strength, at_strength, choose_strength, demands_of
from can_dist.dual.table import ScoreTable
from can_dist.dual.tail_frontier import tail_frontier
from can_dist.dual.tails import Column, Settled, columns_from, settle
from can_dist.dual.verdict import estimate_line, verdict

__all__ = [
    "ESTIMATORS",
    "Block",
    "Bootstrap",
    "Bound",
    "Column",
    "ColumnScores",
    "CrossFit",
    "Demand",
    "Diagnosis",
    "DualSolution",
    "Evaluation",
    "Feasibility",
    "Frontier",
    "FrontierPoint",
    "Interval",
    "Margin",
    "Mixture",
    "PartialSums",
    "Pass",
    "PassResult",
    "PolicyEstimate",
    "Prediction",
    "RayPoint",
    "ScoreTable",
    "Settled",
    "Status",
    "Strength",
    "Trust",
    "at_strength",
    "bootstrap",
    "check_feasibility",
    "choose_strength",
    "columns_from",
    "cross_fit",
    "demands_of",
    "diagnose",
    "dual_curve",
    "estimate_line",
    "estimate_policy",
    "evaluate",
    "frontier_table",
    "judge",
    "lam_interval",
    "lower_bound",
    "mean_interval",
    "mix",
    "mixing_correlation",
    "partial_sums",
    "predict",
    "run_pass",
    "settle",
    "solve_dual",
    "solve_table",
    "source_column",
    "steer",
    "tail_frontier",
    "verdict",
]
