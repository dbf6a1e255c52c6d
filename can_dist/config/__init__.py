"""What a run is: strict models with bounds, read from YAML, every problem reported at once.

The fields marked ``runtime`` (actor counts, logging, checkpoint frequency) do not change what is computed, only
where and how it is watched; they are left out of a stage's identity, so editing them recomputes nothing.
"""

from can_dist.config.base import identity as identity
from can_dist.config.cluster import Cluster as Cluster
from can_dist.config.load import dump_yaml as dump_yaml
from can_dist.config.load import for_method as for_method
from can_dist.config.load import load_config as load_config
from can_dist.config.load import margins_text as margins_text
from can_dist.config.load import validate_config as validate_config
from can_dist.config.load import with_margins as with_margins
from can_dist.config.methods import METHODS as METHODS
from can_dist.config.methods import Caid as Caid
from can_dist.config.methods import Cdpo as Cdpo
from can_dist.config.methods import Human as Human
from can_dist.config.methods import PrimalDual as PrimalDual
from can_dist.config.methods import PSacpo as PSacpo
from can_dist.config.methods import Sacpo as Sacpo
from can_dist.config.methods import SafeDpo as SafeDpo
from can_dist.config.methods import Step as Step
from can_dist.config.root import Config as Config
from can_dist.config.scorers import Beaver as Beaver
from can_dist.config.scorers import Guard as Guard
from can_dist.config.scorers import HttpScorer as HttpScorer
from can_dist.config.scorers import LogRatio as LogRatio
from can_dist.config.scorers import Model as Model
from can_dist.config.scorers import MultiHead as MultiHead
from can_dist.config.scorers import PythonCallable as PythonCallable
from can_dist.config.scorers import Scorer as Scorer
from can_dist.config.scorers import SequenceClassifier as SequenceClassifier
from can_dist.config.sections import Constraint as Constraint
from can_dist.config.sections import Evaluate as Evaluate
from can_dist.config.sections import Generate as Generate
from can_dist.config.sections import Label as Label
from can_dist.config.sections import Lora as Lora
from can_dist.config.sections import Prompts as Prompts
from can_dist.config.sections import Solve as Solve
from can_dist.config.sections import StrengthChoice as StrengthChoice
from can_dist.config.sections import Train as Train
from can_dist.config.sources import DataSource as DataSource
