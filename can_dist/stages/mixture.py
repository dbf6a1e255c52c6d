"""policies → policy: θ_ref + Σ_i a_i (θ_i − θ_ref) of one trained on r + ⟨λ, g⟩ and one on each score g_j alone.

The coefficients are in closed form from the validation responses (:mod:`can_dist.dual.basis`), so a mixture for other
margins needs no training. They hold where mixing weights mixes log-ratios, which is measured on the mixed policy.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from can_dist.config import Model
from can_dist.dual import Mixture, ScoreTable
from can_dist.dual.basis import Basis, basis_of, mixes, mixing_correlation, mixture_of, outside, reachable
from can_dist.dual.strength import ADVISED_PROMPTS, MIN_PROMPTS, plus_minus
from can_dist.dual.table import FloatArray
from can_dist.errors import DataError, InfeasibleConstraint, NumericalError
from can_dist.modeling.loading import model_digest, model_directory
from can_dist.stages.estimate import MIXTURE, validation_log_probs, with_log_probs, without_strength
from can_dist.stages.solve import cvar_offset, demands, load_solution, score_table, solved_columns
from can_dist.stages.train import policy_model
from can_dist.tables.artifacts import Artifact, StageDirectory, write_json
from can_dist.tables.schemas import LOGP_REFERENCE
from can_dist.training import ADAPTER, POLICY
from can_dist.workspace import Workspace

MAIN = "r + ⟨λ, g⟩"
"""What the policy of all scores is called beside those of a constraint; no constraint can have this name."""

MIXED = "the mixture"
ALONE = "policy of "
"""Before the name of the constraint that a policy was trained for alone."""


def mixture(
    work: Workspace,
    policies: Mapping[str, Artifact],
    reference: Model,
    solution: Artifact,
    validation: Artifact,
) -> Artifact:
    """Return the artifact whose ``policy/`` is the mixture that meets a solution's margins, laid out like ``train``'s.

    Args:
        work: The run.
        policies: The policy of r + ⟨λ, g⟩ as '', and that of each constraint's score alone by its name.
        reference: What all of them were trained from.
        solution: Of which the margins are; not necessarily those that '' was trained for.
        validation: Scores, with ln π_ref, of the reference's responses to prompts that nothing was trained on.

    Raises:
        DataError: Too few validation prompts, or policies of other references, tensors or tokenizers.
        NumericalError: Two policies say the same, or the policies cannot tell two constraints apart.
        InfeasibleConstraint: Mixing weights does not mix log-ratios as far as these margins; the range is named.
    """
    _check_reference(policies, reference)
    log_probs = {
        name: validation_log_probs(work, policy_model(policy, reference), validation, policy_name(name))
        for name, policy in policies.items()
    }
    inputs = {"solution": solution, "validation": validation}
    inputs |= {f"policy-{name}" if name else "policy": policy for name, policy in policies.items()}
    inputs |= {f"log_probs-{name}" if name else "log_probs": scores for name, scores in log_probs.items()}
    beta = load_solution(solution).beta
    stage = work.open("mixture", "policy", {"beta": beta}, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("mixture", "policy"):
        shown = {name or MAIN: scores for name, scores in log_probs.items()}
        demanded = demands(solution)
        try:
            told = told_by(validation, shown, solution)
            basis = basis_of(told.table, told.ref_N, told.policy_N, beta=beta)
            mixed = mixture_of(basis, demanded)
            model = _write(work, stage, policies, reference, mixed)
            written = shown | {MIXED: validation_log_probs(work, model, validation, "mixture")}
            told = told_by(validation, written, solution)
            mixed_N = told.policy_N.pop(MIXED)
            correlation = mixing_correlation(told.table, told.ref_N, told.policy_N, mixed_N, mixed.coefficient)
            if not mixes(correlation):
                raise outside(mixed.coefficient, correlation, _reach(basis, solution, mixed, correlation))
        except (NumericalError, InfeasibleConstraint) as refusal:
            shutil.rmtree(stage.path, ignore_errors=True)  # what was written holds for nothing
            raise _refused(refusal, policies[""]) from None
        return _commit(work, stage, mixed, correlation)


@dataclass(frozen=True)
class Told:
    """What validation responses tell of policies: scores as the dual reads them, ln π_ref, and ln π_i by policy."""

    table: ScoreTable
    ref_N: FloatArray
    policy_N: dict[str, FloatArray]


def told_by(validation: Artifact, log_probs: Mapping[str, Artifact], solution: Artifact) -> Told:
    """Read the validation scores and the log-probabilities of policies by name, of the responses that have all."""
    columns = {name: f"ln π of {name}" for name in log_probs}  # a constraint's score has its plain name
    rows = with_log_probs(validation, {columns[name]: scores for name, scores in log_probs.items()})
    identity = solution.manifest["identity"]
    table = score_table(
        rows, identity["reward"], solved_columns(solution), identity["log_weight"], str(validation.path)
    )
    policy_N = {name: rows.column(column).to_numpy() for name, column in columns.items()}
    return Told(table, rows.column(LOGP_REFERENCE).to_numpy(), policy_N)


def policy_name(name: str) -> str:
    """Return what messages call a policy of the basis."""
    return f"{ALONE}{name}" if name else "policy"


def check_validation(validation: Artifact | None, policy: Artifact) -> Artifact:
    """Return the validation scores; raise ``DataError`` where they are too few to tell policies apart by."""
    num_prompts = 0 if validation is None else len(validation.table.column("prompt_id").unique())
    if validation is None or num_prompts < MIN_PROMPTS:
        raise DataError(
            f"basis: {num_prompts} validation prompts, and policies cannot be told apart by fewer than {MIN_PROMPTS}; "
            f"{ADVISED_PROMPTS} are advised. Raise prompts.num_validation, or bring more prompts.\n  The policy as "
            f"trained is whole ({policy.path}); --set basis=false goes on with it."
        )
    return validation


def for_other_margins(policy: Artifact) -> bool:
    """Return whether a policy is a mixture, or its strength, for other margins than those of its own run."""
    mixed = without_strength(policy)
    if mixed.stage != "mixture":
        return False
    labelled = mixed.input("policy").input("preferences").manifest["inputs"]["solution"]
    return bool(labelled["digest"] != mixed.manifest["inputs"]["solution"]["digest"])


def inputs_of(mixed: Artifact, role: str) -> dict[str, Artifact]:
    """Return the inputs of a mixture in a role, ``policy`` or ``log_probs``, by constraint; '' is r + ⟨λ, g⟩'s."""
    return {
        name.removeprefix(role).removeprefix("-"): mixed.input(name)
        for name in mixed.manifest["inputs"]
        if name.startswith(role)
    }


def weights_text(coefficient: Mapping[str, float]) -> str:
    """Return the coefficients of a mixture as text."""
    return ", ".join(f"{weight:.3g} of {name}" for name, weight in coefficient.items())


def _check_reference(policies: Mapping[str, Artifact], reference: Model) -> None:
    digest = model_digest(reference)
    for name, policy in policies.items():
        if policy.manifest["identity"].get("reference") != digest:
            raise DataError(
                f"basis: {policy.path} ({policy_name(name)}) was not trained from the weights of {reference.model!r}. "
                "Policies of one reference can be mixed."
            )


def _refused(refusal: Exception, policy: Artifact) -> Exception:
    text = str(refusal).removeprefix("basis: ")
    return type(refusal)(
        f"basis: {text}\n  The policy as trained is whole ({policy.path}); --set basis=false goes on with it."
    )


def _write(
    work: Workspace, stage: StageDirectory, policies: Mapping[str, Artifact], reference: Model, mixed: Mixture
) -> Model:
    """Write the mixed policy, and its adapter where all policies have one; return the policy as a model."""
    from can_dist.training.mixture import mix_adapters, mix_policies

    for folder in (POLICY, ADAPTER):
        shutil.rmtree(stage.path / folder, ignore_errors=True)  # whole, but left without a manifest by a kill
    directories = {name or MAIN: policy.path for name, policy in policies.items()}
    out, largest = stage.path / POLICY, work.config.train.max_shard_size_mb
    models = {name: path / POLICY for name, path in directories.items()}
    mix_policies(model_directory(reference), models, mixed.coefficient, out, largest)
    if all((path / ADAPTER).is_dir() for path in directories.values()):
        adapters = {name: path / ADAPTER for name, path in directories.items()}
        mix_adapters(adapters, mixed.coefficient, stage.path / ADAPTER)
    return Model(model=str(out), template=reference.template, template_options=reference.template_options)


def _reach(basis: Basis, solution: Artifact, mixed: Mixture, correlation: float) -> dict[str, float]:
    """Return the largest margin of each constraint that a refused mixture lets expect, without the CVaR's offset."""
    offset = cvar_offset(solution)
    largest = reachable(basis, demands(solution), mixed, correlation)
    return {name: margin - offset.get(name, 0.0) for name, margin in largest.items()}


def _commit(work: Workspace, stage: StageDirectory, mixed: Mixture, correlation: float) -> Artifact:
    write_json(stage.path / MIXTURE, mixed.to_dict() | {"correlation": correlation})
    written = [p for folder in (POLICY, ADAPTER) for p in (stage.path / folder).rglob("*") if p.is_file()]
    gains = ", ".join(f"{name} {plus_minus(gain)}" for name, gain in mixed.improvement.items())
    work.say(
        f"mixture: {weights_text(mixed.coefficient)}: {gains}, reward {plus_minus(mixed.reward_improvement)}, KL "
        f"{mixed.kl.mean:.3g} to second order; correlation of mixed weights with mixed log-ratios {correlation:.4f}"
    )
    files = [MIXTURE, *(str(path.relative_to(stage.path)) for path in written)]
    return stage.commit(files, info={"coefficient": mixed.coefficient, "correlation": correlation})
