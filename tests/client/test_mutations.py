"""The mutation suite: break the guarantee on purpose, and see a named check say so.

Each row breaks the real code in one way and drives it as a run does: a `Trainer` over rounds at
one site, the ClientApp over messages, or preflight. Most faults stop at run time, many in the
rehearsal and so before anything is charged; a row says which. Some leave nothing to see in one
run (a seed looks as random as its noise): there the check is a test, here a function whose
assertion carries its name, which passes on the code as it is and fails on the mutant.
"""

import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from scipy import stats
from torch import nn
from torch.nn import functional
from transformers import BertModel

import client.app
import client.train
from client import persons, private_step
from client.app import client_app
from client.clipping import capture, engines
from client.clipping.engines import Loop
from client.meters import SamplerMeter
from client.preflight import preflight
from client.site import Site
from client.train import Trainer
from common import messages, parameters
from common.composition import CONF
from common.config import NoiseSource
from common.errors import PrivacyRefusedError
from common.messages import Instruction
from common.parameters import Layout
from common.privacy.accounting import epsilon_pld
from common.privacy.books import Books
from common.privacy.mechanism import Mechanism, mechanism_of, round_event
from common.privacy.noise import Randomness
from common.records import Records
from common.tasks import build_model
from tests.common.toy import save_gpt2, save_t5

from .ledgers import ledger_of

RECORDS = 60
"""At the site; 42 are declared, so a realised number never passes for a declared one."""
ROUNDS = 18
"""Of two steps each: within these a run-time check must have spoken."""
COORDINATOR, SITE = 1, 2


def site_of(records=RECORDS):
    words = ("goal", "match", "team", "coach", "bank", "shares", "market", "loan")
    texts = tuple(f"the {words[i % 8]} {words[i // 8 % 8]} today" for i in range(records))
    patients = tuple(f"patient {i // 4}" for i in range(records))  # one more each than they may
    held = Records(texts, np.arange(records) % 2, patients)
    return Site("site-1", held, ("sport", "money"), ledger_of())


# How the code is driven. A drive returns, or raises what the check raises.


def train(config, rounds=ROUNDS):
    """Rehearses, then trains round after round."""
    trainer, site = Trainer(config), site_of()
    trainer.rehearse()
    vector = parameters.flatten(trainer._model)
    for number in range(1, rounds + 1):
        vector, _ = trainer.train(site, vector, round_number=number)


def rehearse(config):
    """What a site does before it charges anything."""
    Trainer(config).rehearse()


class Whole(nn.Module):
    """An encoder that is trained whole, position table included, with a linear head."""

    def __init__(self, folder):
        super().__init__()
        self.encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids):
        return self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))


def look_before_training_whole(config):
    """Preflight of a model whose position ids are (1, T), shared by the batch.

    A fast engine that fails falls back to a slower one that does not; what refused it is raised.
    """
    model = Whole(config.model.name)

    def made(records):
        ids = torch.randint(5, 20, (records, 9), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(records) % 2
        return lambda at: functional.cross_entropy(model(ids[at]), labels[at], reduction="none")

    verdict = preflight(model, made, precision=torch.float32)
    assert verdict.engine is not None
    if verdict.refused:
        raise PrivacyRefusedError(verdict.refused[0])


# Checks that are tests.


def empty_update(config, round_number=1):
    """What a site of no records answers: noise alone."""
    trainer = Trainer(config)
    vector = parameters.flatten(trainer._model)
    return trainer.train(site_of(0), vector, round_number=round_number)[0] - vector


def check_fresh_noise(config):
    """Two sites that are asked the same, with the same config, add independent noise."""
    torch.manual_seed(config.seed)
    first = empty_update(config)
    torch.manual_seed(config.seed)
    second = empty_update(config)
    # The head's larger steps leave few coordinates to carry the length: far from 0, far from 1.
    assert abs(cosine(first, second)) < 0.9, (
        "fresh-noise: two trainers of one config added the same noise"
    )


def check_charged_noise(config):
    """A step adds the noise that is charged for it: 20 updates of a site without records."""
    event, mechanism = round_event(config), mechanism_of(config)
    trainer, squares = Trainer(config), []
    start = parameters.flatten(trainer._model)
    sizes = {p: g.learning_rate for g in trainer._groups for p in g.parameters}
    units = np.concatenate([np.full(p.numel(), sizes[p]) for p in parameters_of(trainer)])
    for number in range(1, 21):
        change = trainer.train(site_of(0), start, round_number=number)[0] - start
        noise = change / units * mechanism.divisor / config.privacy.clip_norm
        noise /= config.privacy.max_records_per_person or 1
        squares.append(noise**2 / event.noise_multiplier**2 / event.steps)
    measured, count = float(np.sum(squares)), np.size(squares)
    odds = min(stats.chi2.cdf(measured, count), stats.chi2.sf(measured, count))
    assert odds > 1e-9, "charged-noise: the noise is not that of the event that is charged"


def parameters_of(trainer):
    return [p for p in trainer._model.parameters() if p.requires_grad]


def check_fresh_coins(config):
    """Two sites that are asked the same, with the same config, draw different records."""
    original, drawn = SamplerMeter.read, []

    def spying(self, sample, *, units):
        if units == RECORDS:
            drawn[-1].append(sample.tolist())
        original(self, sample, units=units)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerMeter, "read", spying)
        for _ in range(2):
            drawn.append([])
            train(config, rounds=1)
    assert drawn[0], "fresh-coins: nothing was drawn"
    assert drawn[0] != drawn[1], "fresh-coins: two trainers of one config drew the same records"


def check_persons_together(config):
    """In each step a person's records are all drawn or none."""
    original, drawn = private_step._clipped_sums, []

    def spying(engine, loss_of, sample, *rest, **options):
        drawn.append(set(sample.tolist()))
        return original(engine, loss_of, sample, *rest, **options)

    trainer, site = Trainer(config), site_of()
    owners = trainer._prepared(site).owners
    trainer.rehearse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_step, "_clipped_sums", spying)
        trainer.train(site, parameters.flatten(trainer._model), round_number=1)
    held = [set(np.flatnonzero(owners == owner).tolist()) for owner in set(owners.tolist())]
    assert {len(own) for own in held} == {3}
    together = all(own <= step or not own & step for step in drawn for own in held)
    assert together, "persons-together: a person was drawn with some of their records"


def check_accounts_compose(config):
    """A second run beyond the site's cap is refused, though each alone would not be."""
    tight = replace(config, federation=replace(config.federation, rounds=1))
    once = epsilon_pld([round_event(tight)], tight.privacy.delta, 1e-3)
    model = build_model(tight)
    digest, vector = Layout.of(model).digest, parameters.flatten(model)
    site = replace(site_of(), ledger=ledger_of(cap=1.8 * once))
    app = client_app(lambda _: site)
    replies = [ask(app, Instruction(run, 1, tight, digest, vector)) for run in ("one", "two")]
    assert replies[0].has_content(), "accounts-compose: a run within budget was refused"
    exhausted = replies[1].has_error() and replies[1].error.code == messages.BUDGET_EXHAUSTED
    assert exhausted, "accounts-compose: a run beyond the cap was not refused"


def ask(app, instruction):
    """One training message over the real ClientApp, as the grid sends it."""
    content = messages.pack_instruction(instruction)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, COORDINATOR, 1
    outgoing = Message(content, SITE, "train").metadata
    TaskIdentity.node_id = SITE
    metadata = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=COORDINATOR,
        dst_node_id=SITE,
        reply_to_message_id="",
        group_id="1",
        created_at=outgoing.created_at,
        ttl=outgoing.ttl,
        message_type="train",
    )
    return app(Message(content=content, metadata=metadata), Context(1, SITE, {}, RecordDict(), {}))


DRIVES = (
    rehearse,
    train,
    look_before_training_whole,
    check_fresh_noise,
    check_charged_noise,
    check_fresh_coins,
    check_accounts_compose,
)
PERSON_DRIVES = (rehearse, train, check_charged_noise, check_persons_together)


# How the code is broken.


def edit(function, *changes):
    """A mutation that replaces pieces of a function's source, wherever it was imported to."""

    def apply(patch):
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in changes:
            assert source.count(old) == 1, f"{function.__qualname__} has changed: {old}"
            source = source.replace(old, new)
        original = inspect.unwrap(function)
        namespace = dict(original.__globals__)
        exec(compile(source, f"mutated {function.__qualname__}", "exec"), namespace)
        mutant = inspect.unwrap(namespace[function.__name__])
        assert isinstance(mutant, FunctionType)
        patch.setattr(original, "__code__", mutant.__code__)

    return apply


def noise(wrap):
    """A mutation of every Gaussian that is drawn: `wrap(draw, stream, count)`."""
    draw = Randomness.normal
    return lambda patch: patch.setattr(
        Randomness, "normal", lambda stream, count, std: std * wrap(draw, stream, count)
    )


def sampler(make):
    """A mutation of the sampler: `make()` gives one, with a memory of its own."""
    return lambda patch: patch.setattr(private_step, "poisson_sample", make())


def shuffled():
    """Passes over shuffled records in batches of the expected size."""
    draw, waiting = np.random.default_rng(0), {}

    def sample(records, *, sample_rate, coins):
        size, queue = round(records * sample_rate), waiting.setdefault(records, [])
        if len(queue) < size:
            queue[:] = draw.permutation(records).tolist()
        taken, queue[:] = sorted(queue[:size]), queue[size:]
        return np.array(taken, dtype=np.int64)

    return sample


def fixed_size():
    draw = np.random.default_rng(0)

    def sample(records, *, sample_rate, coins):
        return np.sort(draw.choice(records, round(records * sample_rate), replace=False))

    return sample


def with_replacement():
    draw = np.random.default_rng(0)

    def sample(records, *, sample_rate, coins):
        return np.sort(draw.integers(max(1, records), size=draw.binomial(records, sample_rate)))

    return sample


def too_many():
    def sample(records, *, sample_rate, coins):
        return np.flatnonzero(coins.uniform(records) < min(1.0, 1.3 * sample_rate))

    return sample


STEP = "sums = _clipped_sums("
SKIPPED = edit(
    private_step.private_steps,
    (STEP, f"if not len(sample):\n                continue\n            {STEP}"),
)


@dataclass(frozen=True)
class Mutation:
    """One way to break the guarantee, and the check that names it."""

    apply: Callable
    drive: Callable
    check: str
    """What the error's text starts with, as a regular expression."""
    error: type = PrivacyRefusedError
    """AssertionError where the check is a test."""
    persons: bool = False
    """Whether the run is by person."""


MUTATIONS = {
    "noise off": Mutation(
        noise(lambda draw, stream, count: np.zeros(count)), rehearse, "noise-scale:"
    ),
    "noise x0.9": Mutation(
        noise(lambda draw, stream, count: 0.9 * draw(stream, count)), rehearse, "noise-scale:"
    ),
    "one small parameter without noise": Mutation(
        edit(
            private_step.release,
            (
                "noised = torch.cat",
                "totals[-1].copy_(clipped[-len(totals[-1]) :] / mechanism.divisor); "
                "noised = torch.cat",
            ),
        ),
        rehearse,
        "noise-scale:",
    ),
    "less noise than charged": Mutation(
        edit(
            Trainer.train,
            (
                "mechanism = mechanism_of(self._config)",
                "mechanism = replace(mechanism_of(self._config), noise_multiplier=1.0)",
            ),
        ),
        check_charged_noise,
        "charged-noise:",
        AssertionError,
    ),
    "one Gaussian for all coordinates": Mutation(
        noise(lambda draw, stream, count: np.repeat(draw(stream, 1), count)),
        train,
        "noise-(scale|correlation):",
    ),
    "noise used twice": Mutation(
        noise(lambda draw, stream, count: draw(Randomness.seeded("again"), count)),
        rehearse,
        "noise-reuse:",
    ),
    "seeded noise": Mutation(
        edit(
            client.train.randomness_of,
            ("config.privacy.noise is NoiseSource.entropy", "config.seed is None"),
        ),
        check_fresh_noise,
        "fresh-noise:",
        AssertionError,
    ),
    "noise of torch's seeded generator": Mutation(
        noise(lambda draw, stream, count: torch.randn(count, dtype=torch.float64).numpy()),
        check_fresh_noise,
        "fresh-noise:",
        AssertionError,
    ),
    "no clipping": Mutation(
        edit(engines.clip_factors, (".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)")),
        rehearse,
        "clip-bound:",
    ),
    "clipping to another bound than the noise's": Mutation(
        edit(private_step.private_steps, ("mechanism.clip_norm,", "1e3 * mechanism.clip_norm,")),
        rehearse,
        "clip-bound:",
    ),
    "clipping of the batch, not of its records": Mutation(
        edit(
            engines.SingleBackward.add_clipped,
            ("clip_factors(norms, clip_norm)", "clip_factors(norms * 0 + norms.norm(), clip_norm)"),
        ),
        look_before_training_whole,
        "single_backward: per-record gradients are off by",
    ),
    "head outside the optimiser": Mutation(
        edit(Trainer._private_steps, ("sgd(groups,", "sgd(groups[1:],")),
        rehearse,
        "optimizer-coverage:.*classifier.weight",
    ),
    "head unseen by the engine": Mutation(
        edit(
            engines.ClippingEngine.__init__,
            ("if p.requires_grad", "if p.requires_grad and 'classifier' not in name"),
        ),
        rehearse,
        r"model\.name=.*: cannot be trained privately: single_backward: ",
    ),
    "shuffled instead of Poisson": Mutation(
        sampler(shuffled), rehearse, "sampler-(overlap|passes):"
    ),
    "batches of a fixed size": Mutation(
        sampler(fixed_size), rehearse, "sampler-(dispersion|passes):"
    ),
    "batches with replacement": Mutation(sampler(with_replacement), rehearse, "sampler-repeat:"),
    "more records than declared": Mutation(
        sampler(too_many), rehearse, "sampler-(rate|dispersion|overlap):"
    ),
    "sampler coins seeded anew each step": Mutation(
        edit(private_step.private_steps, ("coins=randomness", "coins=Randomness.seeded(0)")),
        train,
        "sampler-(overlap|rate|dispersion):",
    ),
    "sampler coins of one seeded stream": Mutation(
        edit(
            private_step.private_steps,
            ("meters.open_round()", "meters.open_round(); coins = Randomness.seeded(records)"),
            ("coins=randomness", "coins=coins"),
        ),
        check_fresh_coins,
        "fresh-coins:",
        AssertionError,
    ),
    "skipped empty batches": Mutation(SKIPPED, rehearse, "step-count:"),
    "fewer steps than charged": Mutation(
        edit(private_step.private_steps, ("range(steps)", "range(steps - 1)")),
        rehearse,
        "step-count:",
    ),
    "realised batch size as divisor": Mutation(
        edit(
            private_step.private_steps,
            (
                "release(sums, mechanism,",
                "release(sums, type(mechanism)(mechanism.noise_multiplier, mechanism.clip_norm, "
                "1.0, max(1, len(sample))),",
            ),
        ),
        rehearse,
        "noise-scale:",
    ),
    "noise for one record of a person": Mutation(
        edit(Mechanism.noise_std.fget, ("@property\n", ""), ("self.sensitivity", "self.clip_norm")),
        rehearse,
        "noise-scale:",
        persons=True,
    ),
    "noise for one record of a person, drawn": Mutation(
        edit(
            private_step._noise,
            ("mechanism.noise_std", "mechanism.noise_multiplier * mechanism.clip_norm"),
        ),
        rehearse,
        "noise-scale:",
        persons=True,
    ),
    "a person bounded as one record": Mutation(
        edit(
            Mechanism.sensitivity.fget,
            ("@property\n", ""),
            ("(self.max_records_per_person or 1)", "1"),
        ),
        rehearse,
        "clip-bound:",
        persons=True,
    ),
    "less noise than charged, by person": Mutation(
        edit(
            Trainer.train,
            (
                "mechanism = mechanism_of(self._config)",
                "mechanism = replace(mechanism_of(self._config), noise_multiplier=1.0)",
            ),
        ),
        check_charged_noise,
        "charged-noise:",
        AssertionError,
        persons=True,
    ),
    "no capping": Mutation(
        edit(persons.usable, ("return capped(records, most)", "return records")),
        train,
        "person-cap:",
        persons=True,
    ),
    "capping to one more": Mutation(
        edit(persons.capped, ("rank < most", "rank <= most")), train, "person-cap:", persons=True
    ),
    "a mechanism of records for persons": Mutation(
        edit(mechanism_of, ("_most_per_person(config)", "None")),
        train,
        "person-cap:",
        persons=True,
    ),
    "records of persons drawn one by one": Mutation(
        edit(
            private_step.private_steps,
            ("poisson_sample(units,", "poisson_sample(records,"),
            ("records_of(sample, owners)", "sample"),
        ),
        train,
        "sampler-(rate|dispersion):",
        persons=True,
    ),
    "records of persons drawn one by one, and shown as such": Mutation(
        edit(
            private_step.private_steps,
            ("poisson_sample(units,", "poisson_sample(records,"),
            ("records_of(sample, owners)", "sample"),
            ("read(sample, units=units)", "read(sample, units=records)"),
        ),
        check_persons_together,
        "persons-together:",
        AssertionError,
        persons=True,
    ),
    "persons of a fixed number": Mutation(
        sampler(fixed_size), rehearse, "sampler-(dispersion|passes):", persons=True
    ),
    "persons with replacement": Mutation(
        sampler(with_replacement), rehearse, "sampler-repeat:", persons=True
    ),
    "a fresh accountant each round": Mutation(
        edit(
            Books.admits,
            ("[*self.commitments(), *more]", "[*more]"),
            ("[*self._whole_plans(), *more]", "[*more]"),
        ),
        check_accounts_compose,
        "accounts-compose:",
        AssertionError,
    ),
    "broadcast position ids, one gradient for the batch": Mutation(
        edit(
            capture._run_embedding,
            ("ids = ids.expand(capture.tape.records, *ids.shape[1:])", "pass"),
        ),
        look_before_training_whole,
        "single_backward: (per-record gradients are off by|failed)",
    ),
    "broadcast position ids, read by hooks": Mutation(
        lambda patch: patch.setattr(
            "client.preflight.TRIALS", ((engines.EngineName.hooks, 3), (engines.EngineName.loop, 3))
        ),
        look_before_training_whole,
        r"hooks: encoder\.embeddings\.position_embeddings\.weight has 1 gradients for 3 records",
    ),
}

PROMISED = {
    "noise off",
    "noise x0.9",
    "no clipping",
    "head outside the optimiser",
    "shuffled instead of Poisson",
    "a fresh accountant each round",
    "skipped empty batches",
    "seeded noise",
    "sampler coins of one seeded stream",
    "realised batch size as divisor",
    "broadcast position ids, one gradient for the batch",
    "noise for one record of a person",
    "no capping",
    "records of persons drawn one by one",
}


def test_no_promised_mutation_is_missing():
    assert set(MUTATIONS) >= PROMISED


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught_by_a_named_check(name, tiny_config, person_config, monkeypatch):
    mutation = MUTATIONS[name]
    mutation.apply(monkeypatch)
    with pytest.raises(mutation.error) as caught:
        mutation.drive(person_config if mutation.persons else tiny_config)
    text = str(caught.value).splitlines()[0]
    assert re.match(mutation.check, text), text


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.__name__)
def test_the_same_drive_passes_on_the_code_as_it_is(drive, tiny_config):
    drive(tiny_config)


@pytest.mark.parametrize("drive", PERSON_DRIVES, ids=lambda drive: drive.__name__)
def test_the_same_drive_by_person_passes_on_the_code_as_it_is(drive, person_config):
    drive(person_config)


def test_every_drive_of_the_table_is_also_driven_unmutated():
    driven = {(mutation.drive, mutation.persons) for mutation in MUTATIONS.values()}
    both = [(drive, False) for drive in DRIVES] + [(drive, True) for drive in PERSON_DRIVES]
    assert driven == set(both)


# Seeds: in no private config does one reach the noise.


IMAGES = ["task=image_classification", "data=digits", "model.name=made/vit-digits", "tuning=head"]
SOUNDS = [
    "task=audio_classification",
    "data=audio_folder",
    "model.name=made/wav2vec2-tiny",
    "tuning=head",
]
NEEDS = {
    "digits": IMAGES,
    "image_classification": IMAGES,
    "audio_classification": SOUNDS,
    "image_folder": [each for each in IMAGES if not each.startswith("data")],
    "audio_folder": [each for each in SOUNDS if not each.startswith("data")],
}
TEXTS = {
    "question_answering": "data.columns=[question,context,answer]",
    "seq2seq": "data.columns=[source,target]",
}
"""What a choice asks of other groups: a task and a model that read these data."""
OWN = ("csv", "jsonl", "parquet", "image_folder", "audio_folder", "hub")
"""Data that need a path and labels."""


def private_configs(compose_config, tiny_overrides, tiny_csv, models):
    """Every choice of every group under conf/, by record and by person, that draws real noise."""
    files = sorted(CONF.glob("*/*.yaml"))
    needed = NEEDS | {task: [f"model.name={at}", "tuning=full"] for task, at in models.items()}
    needed |= {task: [*needed.get(task, []), columns] for task, columns in TEXTS.items()}
    units = [path.stem for path in files if path.parent.name == "privacy"]
    base = [o for o in tiny_overrides if not o.startswith(("data", "federation.sites"))]
    own = ["data.labels=[sport,money]"]
    few = ["federation.sites=8", "data.declared_records=84", "privacy.noise_multiplier=2"]
    for unit, path in itertools.product(units, files):
        group, choice = path.parent.name, path.stem
        if group in {"privacy", "experiment"}:
            continue  # an experiment is choices of the other groups
        by_person = unit == "person"
        if by_person and (choice in NEEDS or (group == "data" and choice != "csv")):
            continue  # refused: no persons there
        asked = [f"{group}={choice}", f"privacy={unit}", *base, *needed.get(choice, [])]
        asked += ["data=csv", "data.person_column=person"] if by_person else []
        table = {f"data={name}" for name in OWN} & {*asked}
        # Sites of their own have their own files; the coordinator's is public.
        file = "data.test_path" if choice == "superlink" else "data.path"
        asked += [*own, f"{file}={tiny_csv}"] if table else []
        config = compose_config(*dict.fromkeys([*asked, *few]))
        if config.privacy.noise is NoiseSource.entropy:
            yield [f"{group}={choice}", f"privacy={unit}"], config


@pytest.mark.slow
def test_no_seed_of_any_config_reaches_the_noise(
    compose_config, tiny_overrides, tiny_csv, tmp_path
):
    # A node's own settings, the other file, say nothing of noise: an instruction does.
    assert {path.name for path in CONF.glob("*.yaml")} == {"simulate.yaml", "node.yaml"}
    models = {"causal_lm": tmp_path / "gpt2", "seq2seq": tmp_path / "t5"}
    save_gpt2(models["causal_lm"])
    save_t5(models["seq2seq"])
    seen = set()
    for chosen, config in private_configs(compose_config, tiny_overrides, tiny_csv, models):
        check_fresh_noise(config)
        seen |= set(chosen)
    never = {f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml")} - seen
    experiments = {f"experiment={path.stem}" for path in CONF.glob("experiment/*.yaml")}
    assert never == {"privacy=none", *experiments}


def replayed(config, site, round_number):
    """An attack: (cosine of the update with the clean one, the same after a replay of the seed).

    The attacker knows config, site and round, hence any stream derived from these, and the number
    of records. Everybody is drawn (q = 1, by no coin): the clean update is known to the test.
    """
    trainer = Trainer(config)
    vector = parameters.flatten(trainer._model)
    update = trainer.train(site, vector, round_number=round_number)[0] - vector
    parameters.load(trainer._model, vector)
    held = trainer._prepared(site)
    loss_of = trainer._loss_of(held.prepared.rows)
    engine, mechanism, sums = Loop(trainer._model), mechanism_of(config), {}
    engine.add_clipped(loss_of, np.arange(len(site.records)), mechanism.clip_norm, sums)
    stream = Randomness.seeded(config.seed, site.name, round_number)
    sizes = {p: -g.learning_rate / mechanism.divisor for g in trainer._groups for p in g.parameters}
    clean, noise = [], []
    for parameter in engine.parameters:
        clean.append(sizes[parameter] * sums[parameter].flatten().numpy())
        noise.append(np.full(parameter.numel(), sizes[parameter] * mechanism.noise_std))
    clean, noise = np.concatenate(clean), np.concatenate(noise)
    noise *= stream.normal(len(noise))  # as a step draws it, while it fits in one chunk
    return cosine(update, clean), cosine(update - noise, clean)


def cosine(left, right):
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


SIGMA = 5.0


def at_sigma(config, source):
    privacy = replace(config.privacy, noise_multiplier=SIGMA, sample_rate=1.0, noise=source)
    federation = replace(config.federation, local_steps=1)
    return replace(config, privacy=privacy, federation=federation)


@pytest.mark.parametrize("round_number", [1, 2])
def test_replaying_the_seed_recovers_nothing(tiny_config, round_number):
    config = at_sigma(tiny_config, NoiseSource.entropy)
    plain, attacked = replayed(config, site_of(), round_number)
    assert plain < 0.9
    assert attacked < 0.9


@pytest.mark.parametrize("round_number", [1, 2])
def test_replaying_the_seed_recovers_everything_where_noise_is_seeded(tiny_config, round_number):
    """The attack works where it can: why a run with seeded noise is stamped NOT PRIVATE."""
    config = at_sigma(tiny_config, NoiseSource.seeded)
    plain, attacked = replayed(config, site_of(), round_number)
    assert plain < 0.9
    assert attacked > 0.99
