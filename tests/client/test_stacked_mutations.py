"""The mutation suite of sites that step together: break it on purpose, and a named check says so.

As `test_mutations`, of which the tools are: each row breaks the code that several sites share in
one way, and drives it as a cohort does. What the loop has in common with it (noise, coins, clip
factors, the mechanism) is broken here, too, and must not hide in company.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity
from scipy import stats

from client import stacked_step
from client.clipping import engines, stacked
from client.cohort import Cohort
from client.meters import SamplerMeter
from client.site import Site
from client.train import Trainer
from common import parameters
from common.config import NoiseSource, TuningMethod
from common.messages import Instruction
from common.parameters import Layout
from common.privacy.mechanism import Mechanism, mechanism_of, round_event
from common.privacy.noise import Randomness
from common.records import Records
from common.tasks import build_model

from .ledgers import ledger_of
from .test_cohort import asked, context_of
from .test_mutations import (
    Mutation,
    cosine,
    edit,
    fixed_size,
    noise,
    shuffled,
    too_many,
    with_replacement,
)

SITES, RECORDS, ROUNDS = 3, 60, 18
WORDS = ("goal", "match", "team", "coach", "bank", "shares", "market", "loan")


def site_of(number, records=RECORDS):
    texts = tuple(
        f"the {WORDS[(i + number) % 8]} {WORDS[i // 8 % 8]} today" for i in range(records)
    )
    patients = tuple(f"patient {i // 4}" for i in range(records))
    held = Records(texts, np.arange(records) % 2, patients)
    return Site(f"site-{number}", held, ("sport", "money"), None)


def of_three(config):
    """The tiny run, its head alone trained, at three sites."""
    federation = replace(config.federation, sites=SITES)
    tuning = replace(config.tuning, method=TuningMethod.head)
    return replace(config, federation=federation, tuning=tuning)


# How the code is driven.


def rehearse(config):
    """What a process does before it charges any site."""
    trainer = Trainer(config)
    assert trainer.together == SITES


def train(config, rounds=ROUNDS):
    """Round after round, at three sites together."""
    trainer, sites = Trainer(config), [site_of(number) for number in range(SITES)]
    assert trainer.together == SITES, "agreement: the engine for several sites was not used"
    vector = parameters.flatten(trainer._model)
    for number in range(1, rounds + 1):
        found = trainer.train_together(sites, vector, round_number=number)
        for each in found:
            if isinstance(each, Exception):
                raise each
        vector = found[0][0]


def agree(config):
    """What is quick and not exact is refused: something slower, or the loop, trains."""
    stack = Trainer(config)._stack
    assert stack is not None, "agreement: left to the loop"
    assert type(stack.engine) is stacked.LinearLayers, "agreement: left to a slower engine"


def empty_updates(config, round_number=1):
    """What sites without records answer: noise alone."""
    trainer = Trainer(config)
    assert trainer.together == SITES
    start = parameters.flatten(trainer._model)
    sites = [site_of(number, 0) for number in range(SITES)]
    found = trainer.train_together(sites, start, round_number=round_number)
    return trainer, [vector - start for vector, _ in found]


def check_fresh_noise(config):
    """Sites that step together add independent noise, and so does each in another process."""
    _, (first, second, _) = empty_updates(config)
    _, (again, *_) = empty_updates(config)
    assert abs(cosine(first, second)) < 0.9, "fresh-noise: two sites added the same noise"
    assert abs(cosine(first, again)) < 0.9, "fresh-noise: a site added the same noise twice"


def check_charged_noise(config):
    """Each adds the noise that is charged for it."""
    event, mechanism, squares = round_event(config), mechanism_of(config), []
    for number in range(1, 8):
        trainer, updates = empty_updates(config, number)
        rates = trainer._stack.rates.numpy()
        for update in updates:
            added = update / rates * mechanism.divisor / mechanism.clip_norm
            added /= config.privacy.max_records_per_person or 1
            squares.append(added**2 / event.noise_multiplier**2 / event.steps)
    measured, count = float(np.sum(squares)), np.size(squares)
    odds = min(stats.chi2.cdf(measured, count), stats.chi2.sf(measured, count))
    assert odds > 1e-9, "charged-noise: the noise is not that of the event that is charged"


def check_fresh_coins(config):
    """Sites that step together draw each by its own coins."""
    original, drawn = SamplerMeter.read, []

    def spying(self, sample, *, units):
        if units == RECORDS:
            drawn.append(sample.tolist())
        original(self, sample, units=units)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerMeter, "read", spying)
        train(config, rounds=1)
        train(config, rounds=1)
    assert len(drawn) == 2 * SITES * config.federation.local_steps
    different = {tuple(sample) for sample in drawn}
    assert len(different) == len(drawn), "fresh-coins: two sites, or steps, drew the same"


def check_persons_together(config):
    """A person's records are all drawn or none, at each site."""
    original, drawn = stacked_step._Walk.clipped_sums, []

    def spying(self, samples, clip_norm):
        drawn.extend(set(sample.tolist()) for sample in samples.values())
        return original(self, samples, clip_norm)

    trainer, sites = Trainer(config), [site_of(number) for number in range(SITES)]
    assert trainer.together == SITES
    owners = trainer._prepared(sites[0]).owners
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_step._Walk, "clipped_sums", spying)
        trainer.train_together(sites, parameters.flatten(trainer._model), round_number=1)
    held = [set(np.flatnonzero(owners == owner).tolist()) for owner in set(owners.tolist())]
    together = all(own <= step or not own & step for step in drawn for own in held)
    assert together, "persons-together: a person was drawn with some of their records"


def check_equals_loop(config):
    """With seeded noise each gets what the loop gives it, over several pieces and steps."""
    config = replace(config, privacy=replace(config.privacy, noise=NoiseSource.seeded))
    trainer, beside = Trainer(config), Trainer(config)
    assert beside.together == SITES
    start = parameters.flatten(trainer._model)
    sites = [site_of(0, 90), site_of(1, 0), site_of(2, 70)]
    found = beside.train_together(sites, start, round_number=1)
    for site, (vector, _) in zip(sites, found, strict=True):
        alone, _ = trainer.train(site, start, round_number=1)
        assert np.abs(vector - alone).max() <= 1e-6, "equals-loop: a site got something else"


def check_charged_before(config):
    """Every site's books hold its charge before a record of any is looked at."""
    sites = [replace(site_of(n), ledger=ledger_of(f"site-{n}")) for n in range(SITES)]
    original = Trainer.train_together

    def spying(self, *arguments, **options):
        charged = [site.ledger.books.open_reservations("reserved") for site in sites]
        assert all(charged), "charged-before: data were touched and nothing was charged"
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_together", spying)
        replies = ask(config, sites)
    for site, reply in zip(sites, replies, strict=True):
        assert reply.has_content(), "charged-before: not answered"
        (reservation,) = site.ledger.books.reservations.values()
        assert reservation.event == round_event(config)


def ask(config, sites):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    model = build_model(config)
    ids = "run", 1, config, Layout.of(model).digest, parameters.flatten(model)
    cohort = Cohort(lambda context: sites[context.node_config["partition-id"]], most=SITES)
    return cohort(asked(Instruction(*ids), range(SITES)), [context_of(n) for n in range(SITES)])


DRIVES = (
    rehearse,
    train,
    agree,
    check_fresh_noise,
    check_charged_noise,
    check_fresh_coins,
    check_equals_loop,
    check_charged_before,
)
PERSON_DRIVES = (rehearse, train, check_charged_noise, check_persons_together)


def both(*applied):
    return lambda patch: [apply(patch) for apply in applied]


def sampler(make):
    return lambda patch: patch.setattr(stacked_step, "poisson_sample", make())


STEP = stacked_step._private_step
RELEASE = "release(own, mechanism, seat.randomness, meter.noise)"

MUTATIONS = {
    "noise off": Mutation(
        noise(lambda draw, stream, count: np.zeros(count)), rehearse, "noise-scale:"
    ),
    "no release at all": Mutation(edit(STEP, (RELEASE, "own")), rehearse, "step-count:"),
    "released twice": Mutation(
        edit(
            STEP,
            (
                RELEASE,
                f"{RELEASE}; gradients = release(walk.by_parameter(sums[place]), "
                "mechanism, seat.randomness, meter.noise)",
            ),
        ),
        rehearse,
        "(step-count|noise-scale):",
    ),
    "noise x0.9": Mutation(
        noise(lambda draw, stream, count: 0.9 * draw(stream, count)), train, "noise-scale:"
    ),
    "one stream of noise for all sites": Mutation(
        edit(
            STEP,
            (RELEASE, "release(own, mechanism, Randomness.seeded(0), meter.noise)"),
        ),
        check_fresh_noise,
        "fresh-noise:",
        AssertionError,
    ),
    "less noise than charged": Mutation(
        edit(
            Trainer._steps_together,
            (
                "mechanism_of(self._config), ",
                "replace(mechanism_of(self._config), noise_multiplier=1.0), ",
            ),
        ),
        check_charged_noise,
        "charged-noise:",
        AssertionError,
    ),
    "noise used twice": Mutation(
        noise(lambda draw, stream, count: draw(Randomness.seeded("again"), count)),
        rehearse,
        "noise-reuse:",
    ),
    "no clipping": Mutation(
        edit(engines.clip_factors, (".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)")),
        rehearse,
        "clip-bound:",
    ),
    "clipping to another bound than the noise's": Mutation(
        edit(STEP, ("mechanism.clip_norm)", "1e3 * mechanism.clip_norm)")),
        rehearse,
        "clip-bound:",
    ),
    "no factors in a slot's sum": Mutation(
        edit(
            stacked.LinearLayers.clipped,
            ("[g * factors[:, None, None] for g in outputs]", "outputs"),
        ),
        agree,
        "agreement:",
        AssertionError,
    ),
    "norms without the bias": Mutation(
        edit(stacked.LinearLayers._tape, ("if use.bias:", "if not use:")),
        agree,
        "agreement:",
        AssertionError,
    ),
    "clipping of a slot, not of its records": Mutation(
        edit(
            stacked.LinearLayers.clipped,
            ("clip_factors(norms, clip_norm)", "clip_factors(norms * 0 + norms.norm(), clip_norm)"),
        ),
        agree,
        "agreement:",
        AssertionError,
    ),
    "fillers that count": Mutation(
        edit(stacked.LinearLayers.clipped, (" & there.flatten()", "")),
        agree,
        "agreement:",
        AssertionError,
    ),
    "sums of other slots": Mutation(
        edit(
            stacked.LinearLayers._sum_up,
            ("given.transpose(1, 2), read,", "given.transpose(1, 2).flip(0), read.flip(0),"),
        ),
        agree,
        "agreement:",
        AssertionError,
    ),
    "sums of the next seat": Mutation(
        edit(STEP, ("walk.by_parameter(sums[place])", "walk.by_parameter(sums[place - 1])")),
        rehearse,
        "clip-bound:",
    ),
    "rows of another seat": Mutation(
        edit(stacked_step._Walk._filled, ("self._seats[place]", "self._seats[0]")),
        check_equals_loop,
        "equals-loop:",
        AssertionError,
    ),
    "parameters of another seat": Mutation(
        edit(
            stacked_step._Walk._at,
            ("self._moved[places]", "self._moved[places[:1] * len(places)]"),
        ),
        check_equals_loop,
        "equals-loop:",
        AssertionError,
    ),
    "a piece that is forgotten": Mutation(
        edit(stacked_step._Walk._added, ("pieces[1:]", "pieces[2:]")),
        check_equals_loop,
        "equals-loop:",
        AssertionError,
    ),
    "a parameter without a step size": Mutation(
        edit(
            Trainer._tried_stack,
            ("fillers, self._groups, pull)", "fillers, self._groups[1:], pull)"),
        ),
        rehearse,
        "optimizer-coverage:",
    ),
    "shuffled instead of Poisson": Mutation(
        sampler(shuffled), train, "sampler-(overlap|passes|dispersion):"
    ),
    "batches of a fixed size": Mutation(sampler(fixed_size), train, "sampler-(dispersion|passes):"),
    "batches with replacement": Mutation(sampler(with_replacement), train, "sampler-repeat:"),
    "more records than declared": Mutation(
        sampler(too_many), train, "sampler-(rate|dispersion|overlap):"
    ),
    "one set of coins for all sites": Mutation(
        edit(
            stacked_step._sample,
            ("coins=seat.randomness", "coins=Randomness.seeded(meters.sampler.steps)"),
        ),
        check_fresh_coins,
        "fresh-coins:",
        AssertionError,
    ),
    "coins seeded anew each step": Mutation(
        edit(stacked_step._sample, ("coins=seat.randomness", "coins=Randomness.seeded(0)")),
        train,
        "sampler-(overlap|rate|dispersion):",
    ),
    "fewer steps than charged": Mutation(
        edit(stacked_step.private_steps_together, ("range(steps)", "range(steps - 1)")),
        rehearse,
        "step-count:",
    ),
    "skipped empty batches": Mutation(
        edit(
            STEP,
            (
                "own, meter =",
                "if not len(drawn[place]): return torch.zeros(len(sums[place]))\n"
                "        own, meter =",
            ),
        ),
        rehearse,
        "step-count:",
    ),
    "realised batch size as divisor": Mutation(
        edit(
            STEP,
            (
                "release(own, mechanism,",
                "release(own, type(mechanism)(mechanism.noise_multiplier, mechanism.clip_norm, "
                "1.0, max(1, len(samples[place]))),",
            ),
        ),
        rehearse,
        "noise-scale:",
    ),
    "trained before it is charged": Mutation(
        lambda patch: patch.setattr("client.cohort._reserve", lambda case: None),
        check_charged_before,
        "charged-before:",
        AssertionError,
    ),
    "noise for one record of a person": Mutation(
        edit(Mechanism.noise_std.fget, ("@property\n", ""), ("self.sensitivity", "self.clip_norm")),
        rehearse,
        "noise-scale:",
        persons=True,
    ),
    "less noise than charged, by person": Mutation(
        edit(
            Trainer._steps_together,
            (
                "mechanism_of(self._config), ",
                "replace(mechanism_of(self._config), noise_multiplier=1.0), ",
            ),
        ),
        check_charged_noise,
        "charged-noise:",
        AssertionError,
        persons=True,
    ),
    "records of persons drawn one by one": Mutation(
        both(
            edit(stacked_step._sample, ("poisson_sample(units,", "poisson_sample(seat.records,")),
            edit(stacked_step._records, ("records_of(sample, seat.owners)", "sample")),
        ),
        train,
        "sampler-(rate|dispersion):",
        persons=True,
    ),
    "records of persons, some of them": Mutation(
        edit(
            stacked_step._records,
            ("records_of(sample, seat.owners)", "records_of(sample, seat.owners)[::2]"),
        ),
        check_persons_together,
        "persons-together:",
        AssertionError,
        persons=True,
    ),
}


PROMISED = {
    "noise off",
    "noise x0.9",
    "no clipping",
    "clipping of a slot, not of its records",
    "a parameter without a step size",
    "shuffled instead of Poisson",
    "skipped empty batches",
    "one stream of noise for all sites",
    "one set of coins for all sites",
    "realised batch size as divisor",
    "sums of other slots",
    "fillers that count",
    "trained before it is charged",
    "noise for one record of a person",
    "records of persons drawn one by one",
}


def test_no_promised_mutation_is_missing():
    assert set(MUTATIONS) >= PROMISED


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught_by_a_named_check(name, tiny_config, person_config, monkeypatch):
    mutation = MUTATIONS[name]
    mutation.apply(monkeypatch)
    with pytest.raises(mutation.error) as caught:
        mutation.drive(of_three(person_config if mutation.persons else tiny_config))
    text = str(caught.value).splitlines()[0]
    assert re.match(mutation.check, text), text


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.__name__)
def test_the_same_drive_passes_on_the_code_as_it_is(drive, tiny_config):
    drive(of_three(tiny_config))


@pytest.mark.parametrize("drive", PERSON_DRIVES, ids=lambda drive: drive.__name__)
def test_the_same_drive_by_person_passes_on_the_code_as_it_is(drive, person_config):
    drive(of_three(person_config))


def test_every_drive_of_the_table_is_also_driven_unmutated():
    driven = {(mutation.drive, mutation.persons) for mutation in MUTATIONS.values()}
    passed = [(drive, False) for drive in DRIVES] + [(drive, True) for drive in PERSON_DRIVES]
    assert driven == set(passed)
