import dataclasses
import json
from enum import Enum

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.canonical import canonical_json
from common.composition import CONF
from common.config import (
    Config,
    NoiseSource,
    check_delta,
    config_hash,
    field_names,
    from_canonical,
    from_composed,
    register_schemas,
    to_canonical,
    to_yaml,
)
from common.errors import ConfigError

YAMLS = sorted(CONF.rglob("*.yaml"))
# What a group's file leaves to the user, who must give it.
OWN_CSV = ["data.path=records.csv", "data.labels=[a,b]"]
OWN_FILES = ["data.path=records", "data.labels=[a,b]"]
OWED = {
    "engine/superlink": ["data.declared_records=900"],
    "data/csv": OWN_CSV,
    "data/jsonl": OWN_CSV,
    "data/parquet": OWN_CSV,
    "privacy/person": ["data=csv", *OWN_CSV, "data.person_column=patient"],
    "data/image_folder": [*OWN_FILES, "task=image_classification"],
    "data/audio_folder": [*OWN_FILES, "task=audio_classification"],
    "data/hub": ["data.path=someone/letters", "data.labels=[a,b]"],
    "data/digits": ["task=image_classification"],
    "task/image_classification": ["data=digits"],
    "task/audio_classification": ["data=audio_folder", *OWN_FILES],
}


def leaves(node, prefix=()):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*prefix, field.name))
        else:
            yield (*prefix, field.name)


def get(config, path):
    for name in path:
        config = getattr(config, name)
    return config


def put(config, path, value):
    name, *rest = path
    inner = put(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def other(value):
    """A value of the same type that is not `value`."""
    if isinstance(value, Enum):
        return Enum("Other", ["another"]).another
    if value is None:
        return 1
    return {bool: not value, str: "another", int: 7919, float: 0.123, list: ["z", "y"]}[type(value)]


def edited(config, path, value):
    """Canonical text with one value put in by hand."""
    values = json.loads(to_canonical(config))
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(values)


LEAVES = sorted(
    name
    for name in field_names()
    if not any(longer.startswith(f"{name}.") for longer in field_names())
)


def test_there_are_as_many_yaml_files_as_we_know_of():
    """The job, its choices in eleven groups, seven experiments, a node's own. A forgotten one goes
    untested.
    """
    assert len(YAMLS) == 59


@pytest.mark.parametrize(
    "path",
    [each for each in YAMLS if each.name != "node.yaml"],
    ids=lambda path: str(path.relative_to(CONF)),
)
def test_every_yaml_composes(path):
    name = str(path.relative_to(CONF).with_suffix(""))
    experiment = name.startswith("experiment/")
    choice = [] if name == "simulate" else ["+" * experiment + name.replace("/", "=")]
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("simulate", [*choice, *OWED.get(name, [])])
    config = from_composed(composed)
    written = OmegaConf.to_container(OmegaConf.load(path))
    if name != "simulate" and not experiment:  # what these set: tests/test_structure.py
        is_global = "@package _global_" in path.read_text()
        for group_name, values in (written if is_global else {path.parent.name: written}).items():
            group = json.loads(to_canonical(config))[group_name]
            missing = {key for key, value in values.items() if value == "???"}
            assert {key: group[key] for key in set(values) - missing} == {
                key: value for key, value in values.items() if key not in missing
            }


@pytest.mark.parametrize("name", ["config", "text"])
def test_canonical_text_round_trips_both_ways(compose_config, tiny_config, person_config, name):
    for config in (compose_config(), compose_config("privacy=none"), tiny_config, person_config):
        text = to_canonical(config)
        if name == "config":
            assert from_canonical(text) == config
        else:
            assert to_canonical(from_canonical(text)) == text == canonical_json(json.loads(text))


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        (["data=digits"], "task=text_classification: data=digits holds images; choose task=image"),
        (["task=image_classification"], "task=image_classification: data=bbc_news holds texts"),
        (["task=audio_classification"], "task=audio_classification: data=bbc_news holds texts"),
        (["+experiment=digits", "data.person_column=p"], "data=digits names no persons"),
        (["+experiment=digits", "data.labels=['1']"], "data.labels=.*two or more"),
    ],
)
def test_data_that_the_task_does_not_read_are_refused_before_they_are_opened(
    compose_config, choice, fault
):
    with pytest.raises(ConfigError, match=fault):
        compose_config(*choice)


def test_the_yaml_people_read_is_the_same_config(tiny_config):
    plain = OmegaConf.to_container(OmegaConf.create(to_yaml(tiny_config)))
    assert from_canonical(json.dumps(plain)) == tiny_config


def test_hash_ignores_where_files_are_and_who_computes_and_nothing_else(tiny_config):
    before = config_hash(tiny_config)
    paths = list(leaves(tiny_config))
    assert sorted(".".join(path) for path in paths) == LEAVES
    ignored = [
        path
        for path in paths
        if config_hash(put(tiny_config, path, other(get(tiny_config, path)))) == before
    ]
    of_submitting = [("superlink", name) for name in ("address", "ca", "detach")]
    followed = [("tracking", name) for name in ("experiment", "name", "uri")]
    wherever = [("heads",), ("ledger",), ("resume",), ("run_dir",)]
    who = ("engine", "workers")
    assert sorted(ignored) == sorted([*wherever, *of_submitting, *followed, who])


def test_a_config_is_frozen_all_through(tiny_config):
    assert len(list(leaves(tiny_config))) > 30
    for path in leaves(tiny_config):
        owner = get(tiny_config, path[:-1])
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, path[-1], get(tiny_config, path))


def test_total_steps_count_every_round(tiny_config):
    assert tiny_config.total_steps == 4


def test_field_names_are_those_of_the_schema():
    assert {"privacy", "privacy.epsilon", "federation.sites", "seed"} <= set(field_names())
    assert len(set(field_names())) == len(list(field_names()))


@pytest.mark.parametrize("override", ["+a=1", "+privacy.a=1", "++privacy.a.b=1"])
def test_a_key_forced_in_is_refused(compose_config, override):
    with pytest.raises(ConfigError, match=r"^(privacy\.)?a(\.b)?: no such setting$"):
        compose_config(override)


BROKEN_RULES = [
    "task.max_tokens=0",
    "task.max_seconds=0",
    "task.max_seconds=nan",
    "task.max_seconds=3601",
    "task.max_target_tokens=0",
    "model.feature_scale=0",
    "model.feature_scale=inf",
    "privacy.epsilon=0",
    "privacy.epsilon=-1",
    "privacy.epsilon=nan",
    "privacy.epsilon=inf",
    "privacy.delta=0",
    "privacy.delta=1",
    "privacy.delta=nan",
    "privacy.clip_norm=0",
    "privacy.clip_norm=inf",
    "privacy.sample_rate=0",
    "privacy.sample_rate=1.01",
    "privacy.sample_rate=nan",
    "privacy.noise_multiplier=0",
    "privacy.noise_multiplier=-1",
    "privacy.noise_multiplier=nan",
    "privacy.noise_multiplier=inf",
    "federation.sites=0",
    "federation.rounds=0",
    "federation.local_steps=-1",
    "federation.dirichlet_alpha=0",
    "federation.quorum=0",
    "federation.quorum=1.5",
    "federation.enough=0",
    "federation.enough=1.5",
    "federation.enough=0.8",
    "federation.round_timeout_s=0",
    "federation.leave_out=site-0",
    "federation.leave_out=site-6",
    "federation.leave_out=site-01",
    "federation.leave_out=site-",
    "federation.leave_out=hospital",
    f"federation.leave_out=site-{'9' * 5000}",
    "evaluation.every=-1",
    "engine.threads=-1",
    "engine.threads=1025",
    "engine.together=-1",
    "engine.workers=-1",
    "engine.workers=257",
    "engine.physical_batch=0",
    "tuning.head_learning_rate=-1",
    "tuning.adapter_learning_rate=0",
    "tuning.rank=0",
    "tuning.alpha=0",
    "tuning.last_layers=-1",
    "data.labels=[a]",
    "data.labels=[a,a]",
    "data.holdout_fraction=1",
    "data.validation_fraction=-0.1",
    "data.declared_records=0",
]


@pytest.mark.parametrize("override", BROKEN_RULES)
def test_a_broken_rule_is_refused_by_name(compose_config, override):
    name = override.split("=")[0]
    with pytest.raises(ConfigError) as refused:
        compose_config(override)
    assert str(refused.value).startswith(f"{name}=")
    assert ": must be " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "privacy.sample_rate=1",
        "federation.quorum=1",
        "data.holdout_fraction=0",
        "engine.threads=0",
        "evaluation.every=0",
        "federation.leave_out=site-5",
        "privacy.noise_multiplier=null",
        "data.declared_records=null",
    ],
)
def test_the_edge_of_a_rule_is_allowed(compose_config, override):
    assert isinstance(compose_config(override), Config)


OWN_FILE = ["data=csv", "data.path=a.csv", "data.labels=[a,b]", "data.group_column=desk"]
GROUPLESS = {
    "data=bbc_news names no groups": ["data.group_column=desk"],
    "must not be the column of persons": [*OWN_FILE, "data.person_column=desk"],
    "evaluation.split=validation names no groups": [
        *OWN_FILE,
        "data.test_path=b.csv",
        "evaluation.split=validation",
    ],
}


@pytest.mark.parametrize("message", GROUPLESS)
def test_groups_are_refused_where_no_public_record_names_one(compose_config, message):
    assert compose_config(*OWN_FILE).data.group_column == "desk"
    with pytest.raises(ConfigError, match=f"^data.group_column=desk: .*{message}") as refused:
        compose_config(*GROUPLESS[message])
    assert "\n" not in str(refused.value)


def test_a_federation_of_one_site_leaves_none_out(compose_config):
    with pytest.raises(ConfigError, match="must be empty with one site"):
        compose_config("federation.sites=1", "federation.leave_out=site-1")


def test_one_site_fewer_trains_where_one_is_left_out(compose_config):
    federation = compose_config("federation.leave_out=site-2").federation
    assert (federation.sites, federation.training_sites) == (5, 4)
    assert compose_config().federation.training_sites == 5


def test_rules_of_adapters_bind_only_adapters(compose_config):
    assert compose_config("tuning=head", "tuning.rank=0").tuning.rank == 0


def test_faults_across_fields_are_reported_together(compose_config):
    with pytest.raises(ConfigError) as refused:
        compose_config(
            "privacy.epsilon=-1",
            "privacy.sample_rate=2",
            "federation.quorum=0",
            "data.holdout_fraction=0.6",
            "data.validation_fraction=0.4",
        )
    clauses = str(refused.value).split("; ")
    assert [clause.split("=")[0] for clause in clauses] == [
        "privacy.epsilon",
        "privacy.sample_rate",
        "federation.quorum",
        "data.holdout_fraction + data.validation_fraction",
    ]


def test_every_missing_value_is_named_at_once(compose_config):
    with pytest.raises(ConfigError, match=r"^no value for data\.labels, data\.path: "):
        compose_config("data=csv")
    with pytest.raises(ConfigError, match=r"data\.labels, .*privacy\.epsilon, .*task\.name"):
        from_canonical("{}")


def test_a_csv_needs_a_path(compose_config):
    with pytest.raises(ConfigError, match=r"^data\.path='': must be the path"):
        compose_config("data=csv", "data.path=''", "data.labels=[a,b]")


@pytest.mark.parametrize(("delta", "refused"), [(0.02, True), (0.01, True), (0.0099, False)])
def test_delta_must_stay_below_one_over_the_records(delta, refused):
    """At 1/N, publishing one record at random would satisfy the definition."""
    if refused:
        with pytest.raises(ConfigError, match=r"privacy\.delta=0\.0\d.*100 records of a site"):
            check_delta(delta, 100, "a site")
    else:
        check_delta(delta, 100, "a site")


HOSTILE = {
    "nothing": "",
    "not JSON": "{",
    "null": "null",
    "list": "[]",
    "list of pairs": '[["seed", 1]]',
    "number": "3",
    "text": '"privacy"',
    "NaN alone": "NaN",
    "empty": "{}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_text_that_is_no_config_is_refused(text):
    with pytest.raises(ConfigError):
        from_canonical(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed":' * 100_000], ids=["lists", "objects"])
def test_text_nested_deeply_is_refused(text):
    """The parser gives up by RecursionError, which must not be what the sender sees."""
    with pytest.raises(ConfigError):
        from_canonical(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("unknown",), 1),
        (("privacy", "unknown"), 1),
        (("privacy",), None),
        (("privacy",), []),
        (("privacy",), "record"),
        (("privacy",), {}),
        (("seed",), None),
        (("seed",), 1.5),
        (("seed",), "one"),
        (("seed",), {}),
        (("seed",), [1]),
        (("privacy", "epsilon"), "much"),
        (("privacy", "epsilon"), None),
        (("privacy", "epsilon"), float("nan")),
        (("privacy", "epsilon"), float("inf")),
        (("privacy", "epsilon"), -1),
        (("privacy", "noise"), "urandom"),
        (("privacy", "noise"), None),
        (("privacy", "mode"), 3),
        (("federation", "rounds"), 1.5),
        (("federation", "rounds"), True),
        (("federation", "rounds"), 0),
        (("data", "labels"), "ab"),
        (("data", "labels"), None),
        (("data", "labels"), {"a": "b"}),
        (("data", "labels"), [["a"], ["b"]]),
        (("model", "name"), None),
        (("model", "name"), "???"),
        (("model", "name"), ["a"]),
    ],
    ids=str,
)
def test_hostile_values_are_refused(tiny_config, path, value):
    with pytest.raises(ConfigError) as refused:
        from_canonical(edited(tiny_config, path, value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", [("run_dir",), ("model", "name"), ("data", "path")], ids=str)
def test_text_from_the_network_cannot_read_the_environment(tiny_config, monkeypatch, path):
    """OmegaConf would put a site's variable where a sender wrote ${oc.env:NAME}."""
    monkeypatch.setenv("COTERIE_TEST_SECRET", "swordfish")
    with pytest.raises(ConfigError) as refused:
        from_canonical(edited(tiny_config, path, "${oc.env:COTERIE_TEST_SECRET}"))
    assert "swordfish" not in str(refused.value)


def test_text_from_the_network_cannot_refer_to_other_fields(tiny_config):
    with pytest.raises(ConfigError):
        from_canonical(edited(tiny_config, ("privacy", "epsilon"), "${privacy.clip_norm}"))


def test_a_missing_key_is_refused(tiny_config):
    values = json.loads(to_canonical(tiny_config))
    del values["privacy"]["epsilon"]
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        from_canonical(json.dumps(values))


def test_noise_is_from_entropy_unless_asked_otherwise(compose_config):
    assert compose_config().privacy.noise is NoiseSource.entropy


PERSON = ["privacy=person", "data=csv", *OWN_CSV, "data.person_column=patient"]
PERSON_FAULTS = {
    "no bound": (
        [*PERSON, "privacy.max_records_per_person=null"],
        "privacy.max_records_per_person=None: must be at least 1 with privacy=person",
    ),
    "bound of none": (
        [*PERSON, "privacy.max_records_per_person=0"],
        "privacy.max_records_per_person=0: must be at least 1 with privacy=person",
    ),
    "a bound without persons": (
        ["privacy.max_records_per_person=2"],
        "privacy.max_records_per_person=2: must be left out with privacy=record; "
        "only privacy=person bounds persons",
    ),
    "no column": (
        [*PERSON, "data.person_column="],
        "data.person_column='': must name the column of person ids with privacy=person; "
        "give it, or choose privacy=record",
    ),
    "data without persons": (
        ["privacy=person"],
        "privacy=person: data=bbc_news names no persons; give data=csv with data.person_column",
    ),
    "a column of data without columns": (
        ["data.person_column=patient"],
        "data.person_column=patient: data=bbc_news names no persons; "
        "give data=csv with data.person_column",
    ),
    "the column of the texts": (
        [*PERSON, "data.person_column=text"],
        "data.person_column=text: must be a column of its own",
    ),
}


@pytest.mark.parametrize("fault", PERSON_FAULTS)
def test_persons_that_are_not_bounded_or_not_named_are_refused_once(compose_config, fault):
    overrides, message = PERSON_FAULTS[fault]
    with pytest.raises(ConfigError) as refused:
        compose_config(*overrides)
    assert str(refused.value) == message


def test_the_unit_is_the_person_only_where_persons_are_protected(compose_config, person_config):
    assert person_config.privacy.unit == "person"
    for mode in ("record", "none"):
        assert compose_config(f"privacy={mode}").privacy.unit == "record"


def test_labels_may_be_left_out_where_the_task_knows_no_classes(compose_config):
    csv = ["data=csv", "data.path=texts.csv", "task=causal_lm"]
    assert compose_config(*csv).data.labels == []
    assert from_canonical(to_canonical(compose_config(*csv))).data.labels == []
    assert compose_config(*csv, "data.labels=[a,b]").data.labels == ["a", "b"]
    with pytest.raises(ConfigError, match=r"^data\.labels=\['a', 'a'\]: .*, or none"):
        compose_config(*csv, "data.labels=[a,a]")
    with pytest.raises(ConfigError, match=r"^no value for data\.labels"):
        compose_config("data=csv", "data.path=texts.csv")
    with pytest.raises(ConfigError, match=r"^data\.labels=\[\]: must be two or more"):
        compose_config("data=csv", "data.path=texts.csv", "data.labels=[]")


DEPLOYED = [
    "engine=superlink",
    "data=csv",
    "data.labels=[a,b]",
    "data.test_path=public.csv",
    "data.declared_records=900",
]


def test_a_deployed_run_needs_no_path_of_private_records_and_has_spares(compose_config):
    config = compose_config(*DEPLOYED)
    assert config.is_deployed
    assert config.data.path == ""
    assert config.privacy.spare_rounds == 2
    assert config.books_last
    assert from_canonical(to_canonical(config)) == config


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data.path=private.csv", "data.path=private.csv: must be left out with engine=superlink"),
        ("data.test_path=''", "data.test_path='': must be the public hold-out"),
        ("data.declared_records=null", "data.declared_records=None: must be given"),
        ("evaluation.split=validation", "evaluation.split=validation: must be holdout"),
        ("ledger=books.db", "ledger=books.db: must be left out"),
        ("federation.leave_out=site-1", "federation.leave_out=site-1: must be empty"),
        ("faults=rough", "faults: must be none"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused_of_a_deployment(compose_config, override, fault):
    with pytest.raises(ConfigError, match=fault):
        compose_config(*DEPLOYED, override)
