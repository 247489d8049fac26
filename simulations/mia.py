"""`coterie audit mia`: membership inference on a released model, to show what an attack looks like.

Two attacks on the model of a finished simulation, told apart by its training records and by public
ones it never saw: the loss (who fits better was there), and RMIA, which asks how much better than
a reference model trained on other records. What they reach is a lower bound on what somebody could;
near zero it says that these attacks are weak, and nothing of others.

Sources: Yeom et al. (2018), arXiv:1709.01604; Zarifzadeh et al. (2024), arXiv:2312.03262.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from client.audit import check_ledger, fault_of, signed_into
from client.persons import usable
from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import Config, NoiseSource, PrivacyMode, TaskConfig
from common.data import load_splits
from common.errors import ConfigError
from common.model import FineTuned, pieces, read_of, targets_of
from common.privacy.lower_bounds import Audit, Coins, Scores, bounds_of, told
from common.records import Records
from common.tasks import TASKS, build_model, reader_of
from server.release import load_released
from server.report import read_report
from server.resume import stored_config
from simulations.partition import deal

MOST = 1000
"""Records of each kind that are looked at."""
FEWEST = 10
"""Of each kind; of fewer nothing can be said."""
BATCH = 64
OUTSIDE = 0.3
"""How much of a record's usual fit is due to reference models that never saw it (RMIA's a)."""
GAMMA = 1.0
"""How much better than others a record must fit than the reference tells."""
NOTE = (
    "A bound near zero says that these two attacks are weak here; it never says that the model is "
    "safe. It holds if chance decided which records were trained on, as a simulation's split does."
)


@dataclass(frozen=True)
class Attack:
    """How well one attack told members from others."""

    audit: Audit
    auc: float
    """How often a member scores more than another; 0.5 is guessing."""
    tpr: float
    """Share of members found where one other in a hundred is taken for one."""

    def content(self) -> dict[str, Any]:
        """What `--json` gives."""
        return {**self.audit.content(), "auc": self.auc, "tpr_at_1_percent_fpr": self.tpr}


def tell_mia(run: Path, *, ledger: str, json: bool) -> dict[str, Any] | None:
    """Attacks the model of a run, prints and, where a ledger is named, signs the results.

    Returns: what a machine that asked gets. Raises: VerificationError if a claim is falsified.
    """
    if ledger:
        check_ledger(ledger)  # before the work
    attacks = attacked(run)
    content = {
        "run": str(run),
        "audits": [attack.content() for attack in attacks],
        "note": NOTE,
    }
    audits = [attack.audit for attack in attacks]
    if ledger:
        if math.isinf(audits[0].claimed_epsilon):
            raise ConfigError(f"ledger={ledger}: the run claims nothing that could be signed")
        for attack in attacks:
            signed_into(ledger, attack.audit, attack.content())
    fault = fault_of(audits, content)
    if not json:
        show_attacks(attacks, Console(markup=False))
    if fault is not None:
        raise fault
    return content if json else None


def attacked(run: Path) -> list[Attack]:
    """Both attacks on the model of a finished simulation.

    Raises: VerificationError if it is none; ConfigError if its records are elsewhere, or too few.
    """
    report, _ = read_report(run)
    config = stored_config(run)
    if config.is_deployed:
        raise ConfigError(f"{run}: its records are at their sites; only a simulation has them here")
    members, others, public = _records(config)
    target, task = load_released(run / "model")
    reference = _reference(config, public)
    found = [_fits(config, task, target, records) for records in (members, others)]
    usual = [_fits(config, task, reference, records) for records in (members, others)]
    half = len(others) // 2
    among = _odds(found[1][half:], usual[1][half:])
    scores = {
        "loss threshold": (found[0], found[1][:half]),
        "RMIA, one reference model": (
            _rmia(_odds(found[0], usual[0]), among),
            _rmia(_odds(found[1][:half], usual[1][:half]), among),
        ),
    }
    epsilon = report["privacy"]["epsilon"]["pld"]
    claimed = math.inf if epsilon == "inf" else float(epsilon)
    return [_attack(name, *each, claimed, config) for name, each in scores.items()]


def _records(config: Config) -> tuple[Records, Records, Records]:
    """Some members; some that no model saw; those that the reference is trained on."""
    task = TASKS[config.task.name]
    read = reader_of(config.task.name, task.load_processor(config.model))
    splits = load_splits(config.data, task.toy_examples, read)
    dealt = deal(splits.train, config.federation, seed=config.seed)
    used = [
        (site, index)
        for site, (name, records) in enumerate(
            zip(config.federation.site_names, dealt, strict=True)
        )
        if name != config.federation.leave_out
        for index in range(len(usable(records, config.privacy)))
    ]
    draw = np.random.default_rng(config.seed)
    chosen = draw.permutation(len(used))[:MOST]
    own = [usable(records, config.privacy) for records in dealt]
    by_site = [
        own[site].subset([used[at][1] for at in chosen if used[at][0] == site])
        for site in range(len(own))
    ]
    members = Records(
        tuple(content for records in by_site for content in records.contents),
        np.concatenate([records.labels for records in by_site]),
    )
    others = splits.holdout.subset(draw.permutation(len(splits.holdout))[: 2 * MOST])
    for name, count in (
        ("training", len(members)),
        ("hold-out", len(others) // 2),
        ("validation", len(splits.validation)),
    ):
        if count < FEWEST:
            raise ConfigError(f"data: too few {name} records to attack with; {FEWEST} are needed")
    return members, others, splits.validation


def _reference(config: Config, public: Records) -> FineTuned:
    """The same model, trained on public records, without privacy, for as many steps."""
    federation = config.federation
    plain = replace(
        config,
        privacy=replace(
            config.privacy,
            mode=PrivacyMode.none,
            noise=NoiseSource.seeded,
            max_records_per_person=None,
            site_epsilons=[],
        ),
        data=replace(config.data, declared_records=len(public) * federation.sites),
        federation=replace(federation, local_steps=federation.local_steps * federation.rounds),
    )
    model = build_model(plain)
    site = Site("reference", public, tuple(config.data.labels), None)
    vector, _ = Trainer(plain).train(site, parameters.flatten(model), round_number=1)
    parameters.load(model, vector)
    return model.eval()


@torch.inference_mode()
def _fits(config: Config, settings: TaskConfig, model: FineTuned, records: Records) -> Scores:
    """(N,) minus the loss of each record."""
    task = TASKS[config.task.name]
    encoded = task.encode(task.load_processor(config.model), records, settings)
    found = [
        -task.loss_vector(model(**read_of(piece)), targets_of(piece)).double().numpy()
        for piece in pieces(encoded, BATCH)
    ]
    return np.concatenate(found)


def _odds(fit: Scores, usual: Scores) -> Scores:
    """(N,) log of p(x) under the model over p(x) under models that may have seen it or not."""
    outside = np.log(((1 + OUTSIDE) * np.exp(usual) + (1 - OUTSIDE)) / 2)
    odds: Scores = fit - outside
    return odds


def _rmia(odds: Scores, among: Scores) -> Scores:
    """(N,) share of other records that a record beats by `GAMMA`; ties by how far it does."""
    beaten = np.searchsorted(np.sort(among), odds - math.log(GAMMA), side="right") / len(among)
    return beaten + 1e-9 * odds


def _attack(name: str, inside: Scores, outside: Scores, claimed: float, config: Config) -> Attack:
    scores, present = fair_game(inside, outside, np.random.default_rng())
    bounds = bounds_of(scores, present, delta=config.privacy.delta, by=("one_run",))
    audit = Audit(f"mia: {name}, on the released model", bounds, claimed, config.privacy.delta)
    rank = stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    threshold = np.quantile(outside, 0.99)
    return Attack(audit, float(rank), float((inside > threshold).mean()))


def fair_game(inside: Scores, outside: Scores, draw: np.random.Generator) -> tuple[Scores, Coins]:
    """Scores of records that are members or not each by a fair coin, as a bound needs them.

    Guarantee: where chance decided who is a member, these coins are fair and independent; as many
    records as leave either kind short once in 10,000 games.
    """
    room = min(len(inside), len(outside))
    m = 2 * room
    while m / 2 + 2 * math.sqrt(m) > room and m > 1:
        m -= 1
    present = draw.random(m) < 0.5  # noqa: PLR2004 - a fair coin
    while not max(present.sum(), (~present).sum()) <= room:
        present = draw.random(m) < 0.5  # noqa: PLR2004
    scores = np.empty(m)
    for which, pool in ((present, inside), (~present, outside)):
        scores[which] = draw.choice(pool, int(which.sum()), replace=False)
    return scores, present


def show_attacks(attacks: list[Attack], console: Console) -> None:
    """Prints the results for a person."""
    table = Table(title="Attacks on the released model", title_justify="left")
    for column in ("attack", "AUC", "lower bound", "claimed", "ceiling", "records", "verdict"):
        table.add_column(column, no_wrap=column == "verdict")
    for attack in attacks:
        audit = attack.audit
        table.add_row(
            audit.design.removeprefix("mia: ").partition(",")[0],
            f"{attack.auc:.3f}",
            f"{audit.bounds.lower_bound:.3f}",
            f"{audit.claimed_epsilon:.3f}",
            f"{audit.bounds.ceiling:.2f}",
            str(audit.bounds.m),
            audit.verdict,
        )
    console.print(table)
    console.print(f"AUC 0.5 is guessing. Bounds at {attacks[0].audit.confidence:.0%} confidence.")
    console.print(NOTE, highlight=False)
    if weak := told([attack.audit for attack in attacks]):
        console.print(weak, highlight=False)
